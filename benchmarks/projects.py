"""The small checkouts that the measures work on, made in a temporary folder: one of vpstore's, one of DVC's.

Place: under the measures. A runner of a few lines stages shards of a given number and size; the same shards lie in a
folder that DVC adds.
Invariants: nothing outside the temporary folder is written: home, caches and DVC's site cache lie in it.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sides import Command

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
_BLOCK = 1 << 20

PYPROJECT = """[tool.vpstore]
objects = "configs/objects.toml"
profiles = "configs/profiles"
lock = "vpstore.lock"
weights = "weights"
reports = "reports"
"""

OBJECTS = """format = 1
runner = "bench.run"

[objects.big]
default_stage = "main"
[objects.big.stages.main]
recipe = "bench.make"
config = ["configs/big.toml"]
"""

RUN = '''"""Stage the shards of a folder."""

import tomllib

from vpstore.runner import Prepared


def prepare(checkout, object, stage):
    params = tomllib.loads((checkout.root / "configs" / "big.toml").read_text())
    return Prepared("bench.make", params, code_exclude=("bench.run", "vpstore"))


def environment(prepared):
    return {}


def produce(prepared, inputs, scratch, progress):
    from bench.make import make

    return make(prepared.params, scratch)
'''

MAKE = '''"""Copy the shards into the scratch folder."""

import shutil
from pathlib import Path

from vpstore.runner import Staged, StagedFile


def make(params, scratch):
    files = []
    for source in sorted(Path(params["folder"]).iterdir()):
        target = Path(shutil.copyfile(source, scratch / source.name))
        files.append(StagedFile(target.name, "application/vnd.safetensors", target))
    return Staged(files)
'''


@dataclass(frozen=True)
class Place:
    """A temporary folder, and the variables under which every command of the benchmark runs."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of the person's own: no configuration, no cache, no store."""
        dropped = ("VPSTORE_", "DVC_", "GIT_", "XDG_", "PYTHON")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        return kept | {
            "HOME": str(self.root / "home"),
            "XDG_CACHE_HOME": str(self.root / "cache"),
            "DVC_SITE_CACHE_DIR": str(self.root / "site"),
            "DVC_NO_ANALYTICS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "GIT_AUTHOR_NAME": "b", "GIT_AUTHOR_EMAIL": "b@b", "GIT_COMMITTER_NAME": "b", "GIT_COMMITTER_EMAIL": "b@b",
        }  # fmt: skip

    def command(self, cwd: Path, *arguments: str, **more: str) -> Command:
        """A command that runs in one of the checkouts."""
        return Command(arguments, cwd, self.environment | more)

    def vpstore(self, cwd: Path, *arguments: str, **more: str) -> Command:
        """One of ours."""
        return self.command(cwd, str(BIN / "vpstore"), *arguments, **more)

    def dvc(self, cwd: Path, *arguments: str) -> Command:
        """One of DVC's."""
        return self.command(cwd, str(BIN / "dvc"), *arguments)

    def python(self, cwd: Path, code: str, *arguments: str) -> Command:
        """A few lines of Python with vpstore at hand."""
        return self.command(cwd, sys.executable, "-P", "-c", code, *arguments, PYTHONPATH=str(REPOSITORY))


def write_shards(folder: Path, *, count: int, size_bytes: int) -> None:
    """Safetensors shards of eight tensors each, all bytes different from shard to shard."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        part = max(size_bytes // 8, 1)
        rows = {
            f"t{row}": {"dtype": "U8", "shape": [part], "data_offsets": [row * part, (row + 1) * part]}
            for row in range(8)
        }
        head = json.dumps(rows).encode()
        with (folder / f"model-{number:05}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            left = 8 * part
            block = os.urandom(min(_BLOCK, left))
            while left:
                data = (left.to_bytes(8, "little") + block[8:])[:left]
                file.write(data)
                left -= len(data)
            os.fsync(file.fileno())


def write_project(root: Path, *, shards: Path) -> Path:
    """A checkout of vpstore's whose one stage stages the shards."""
    files = {
        "pyproject.toml": PYPROJECT,
        "params.yaml": "profile: tiny\n",
        "configs/objects.toml": OBJECTS,
        "configs/big.toml": f"folder = {json.dumps(str(shards))}\n",
        "configs/profiles/tiny.toml": "",
        "bench/__init__.py": "",
        "bench/run.py": RUN,
        "bench/make.py": MAKE,
        ".gitignore": "/.vpstore\n/weights\n__pycache__\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def dvc_repository(place: Place, root: Path, *, remote: Path | None = None, config: Sequence[str] = ()) -> Path:
    """A git and DVC repository, with a local directory as its remote if one is given."""
    root.mkdir(parents=True, exist_ok=True)
    (place.root / "home").mkdir(exist_ok=True)
    place.command(root, "git", "init", "-q").run()
    place.dvc(root, "init", "-q").run()
    if remote is not None:
        place.dvc(root, "remote", "add", "-q", "-d", "shared", str(remote)).run()
    for setting in ("core.analytics=false", "core.check_update=false", *config):
        name, _, value = setting.partition("=")
        place.dvc(root, "config", name, value).run()
    return root


def remove(path: Path) -> None:
    """Remove a folder, read-only files included."""
    shutil.rmtree(path, ignore_errors=True)
