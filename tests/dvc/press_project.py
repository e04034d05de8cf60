"""A checkout of the small project that the real `dvc`, `git` and `vpstore` work on."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from command_server import CommandServer
from press_files import FILES

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent  # dvc and the vpstore that dvc's stages call


@cache
def server() -> CommandServer:
    started = CommandServer(REPOSITORY, str(Path(__file__).with_name("press_server.py")))
    atexit.register(started.close)
    return started


@dataclass(frozen=True)
class Press:
    """One checkout, and a home of its own for what git, DVC and vpstore keep outside a checkout."""

    root: Path
    home: Path

    @classmethod
    def create(cls, root: Path, home: Path) -> Press:
        """Write the project, let vpstore write its dvc.yaml, commit."""
        press = cls(root, home)
        home.mkdir()
        for path, text in FILES.items():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text.lstrip("\n"))
        press.run("git", "init", "-q", "-b", "main")
        press.run("dvc", "init", "-q")
        for option in ("analytics", "check_update", "autostage"):
            press.run("dvc", "config", f"core.{option}", "false")
        press.run("vpstore", "pipeline", "--write")
        press.commit("the project")
        return press

    def copy(self, folder: Path) -> Press:
        """The same checkout with all that is built in it, elsewhere."""
        shutil.copytree(self.root, folder / "checkout", symlinks=True)
        (folder / "home").mkdir()
        return Press(folder / "checkout", folder / "home")

    def variables(self) -> dict[str, str]:
        """The environment of every command."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("VPSTORE_", "GIT_", "DVC_", "PRESS_", "XDG_"))}
        own = {f"GIT_{who}_{what}": f"press{at}" for who in ("AUTHOR", "COMMITTER") for what, at in PERSON.items()}
        return kept | own | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.home),
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(self.home / "dvc"),
            "GIT_CONFIG_NOSYSTEM": "1",
            "PRESS_LOG": str(self.home / "recipes.log"),
        }  # fmt: skip

    def run(self, *command: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """One command in the root; `code` is the exit code it must have, None: any but 0."""
        if command[0] in ("dvc", "vpstore"):
            with tempfile.TemporaryDirectory(prefix="vpstore-press-") as folder:
                found = server().run(list(command), cwd=self.root, environment=self.variables(), folder=Path(folder))
            done = subprocess.CompletedProcess(command, *found)
        else:
            done = self.installed(*command)
        said = f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == code if code is not None else done.returncode != 0, said
        return done

    def installed(self, *command: str) -> subprocess.CompletedProcess[str]:
        """One command as it lies in PATH, however it ends."""
        return subprocess.run(
            command, cwd=self.root, env=self.variables(), text=True, capture_output=True, timeout=120, check=False
        )

    def repro(self) -> list[str]:
        """`dvc repro`: the stages whose command it ran, in order."""
        return re.findall(r"^Running stage '([^']+)'", self.run("dvc", "repro").stdout, re.MULTILINE)

    def json(self, *command: str, code: int | None = 0) -> Any:
        """What a command with --json prints."""
        return json.loads(self.run(*command, "--json", code=code).stdout)

    def commit(self, message: str) -> None:
        """Everything git does not ignore."""
        self.run("git", "add", "--all")
        self.run("git", "commit", "-q", "-m", message)

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace what must be there once."""
        file = self.root / path
        assert file.read_text().count(old) == 1
        file.write_text(file.read_text().replace(old, new))

    def ran(self) -> list[str]:
        """The recipes that have run since this was last asked."""
        log = self.home / "recipes.log"
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    def pointer(self, slug: str) -> Path:
        """Where a pointer lies."""
        return self.root / "weights" / "tiny" / "refs" / f"{slug}.json"

    def pointers(self) -> dict[str, Any]:
        """Every pointer by its slug."""
        return {file.stem: json.loads(file.read_text()) for file in sorted(self.pointer("x").parent.glob("*.json"))}

    def artifact(self, slug: str) -> str:
        """Which artifact a pointer is."""
        seen = json.loads(self.pointer(slug).read_text())
        rows = json.loads(self.pointer(slug).with_suffix(".artifact").read_text())["artifacts"]
        return next(
            str(row["artifact"]) for row in rows if (row["key"], row["content"]) == (seen["key"], seen["content"])
        )

    def text(self, ref: str) -> str:
        """What the artifact of a ref says, through `vpstore resolve`."""
        return (Path(self.run("vpstore", "resolve", ref).stdout.strip()) / "text.txt").read_text()


PERSON = {"NAME": "", "EMAIL": "@example.org"}
