"""The small project with a tokenizer and a stage of three parents, so that there are roles to swap."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

from small_project import GROW, OBJECTS, RUN, Project, make_project, write

from vpstore.schema.digest import Digest

RANKS = b"bGVhZg== 0\nc3RlbQ== 1\n"

MORE_OBJECTS = f"""
[tokenizers.leaf]
digest = "{Digest.of(RANKS)}"
padded_vocab = 128

[objects.leaves]
default_stage = "main"
[objects.leaves.stages.main]
recipe = "small.ranks"
tokenizer = "leaf"
sources = {{ ranks = "configs/ranks.json" }}

[objects.graft]
default_stage = "main"
[objects.graft.stages.main]
recipe = "small.grow"
tokenizer = "leaf"
inputs = {{ parent = "plant@bloom", data = "plant@sprout", tokenizer = "leaves" }}
config = ["configs/plant.toml"]
"""

COPY_RANKS = """
from vpstore.runner import Staged, StagedFile


def make(prepared, inputs, scratch):
    return Staged([StagedFile("leaf.tiktoken", "text/plain", source.path) for source in prepared.sources])
"""


def make_orchard(root: Path, cache: Path) -> Project:
    """A checkout in which nothing is built."""
    project = make_project(root, cache)
    pin = {"path": "leaf.tiktoken", "sha256": hashlib.sha256(RANKS).hexdigest(), "size_bytes": len(RANKS)}
    run = RUN.replace(
        "verbatim=bool(sources))",
        """verbatim=object == "seed",
                    tokenizer=TokenizerRecord(declared.tokenizer, Digest(table["digest"]), table["padded_vocab"])
                    if (table := checkout.objects.tokenizers.get(declared.tokenizer)) else None)""",
    ).replace(
        "import Prepared, PreparedSource, Staged, StagedFile",
        "import Prepared, PreparedSource, Staged, StagedFile, TokenizerRecord\n"
        "from vpstore.schema.digest import Digest",
    )
    assert run.count("TokenizerRecord") == 2
    files = {
        "configs/objects.toml": OBJECTS + MORE_OBJECTS,
        "configs/plant.toml": "[sprout]\nstep = 1\n[bloom]\nstep = 2\n[main]\nstep = 3\n",
        "configs/ranks.json": json.dumps({"root": "assets", "files": [pin]}),
        "small/run.py": run,
        "small/ranks.py": COPY_RANKS,
        "small/grow.py": GROW,
        ".gitignore": ".vpstore/\nweights/\n",
    }
    for path, text in files.items():
        write(root, path, text)
    (root / "assets" / "leaf.tiktoken").write_bytes(RANKS)
    return project


def git(project: Project, *arguments: str) -> str:
    """Run git in the checkout, away from this machine's configuration."""
    identity = {
        f"GIT_{who}_{what}": f"{who}@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    environment = {**os.environ, **identity, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    command = ["git", "-C", str(project.root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def commit(project: Project) -> None:
    """Commit all that git sees."""
    if not (project.root / ".git").exists():
        git(project, "init", "-q")
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "as it is")
