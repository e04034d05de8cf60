"""A small project of its own for a test: a checkout with a runner of a few lines, driven through the real commands."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from command_server import CommandServer

REPOSITORY = Path(__file__).resolve().parents[2]

PYPROJECT = """
[tool.vpstore]
objects = "configs/objects.toml"
profiles = "configs/profiles"
lock = "vpstore.lock"
weights = "weights"
reports = "reports"
"""

OBJECTS = """
format = 1
runner = "small.run"

[summary]
file = "metrics.json"
key = "score"
from = "reports"

[objects.seed]
default_stage = "main"
[objects.seed.stages.main]
recipe = "small.seed"
sources = { donor = "configs/donor.json" }

[objects.plant]
default_stage = "bloom"
[objects.plant.stages.sprout]
recipe = "small.grow"
mode = "green"
inputs = { parent = "seed" }
config = ["configs/plant.toml"]
[objects.plant.stages.bloom]
recipe = "small.grow"
mode = "red"
inputs = { parent = "plant.green" }
config = ["configs/plant.toml"]

[objects.reports]
default_stage = "plant-bloom"
build_all = true
[objects.reports.stages.plant-sprout]
recipe = "small.judge"
inputs = { parent = "plant@sprout" }
[objects.reports.stages.plant-bloom]
recipe = "small.judge"
inputs = { parent = "plant@bloom" }
"""

RUN = """
import json
import os
from pathlib import Path

from vpstore.errors import UsageError
from vpstore.runner import Prepared, PreparedSource, Staged, StagedFile


def prepare(checkout, object, stage):
    import tomllib

    declared = next(s for o in checkout.objects.objects.values() for s in o.stages.values()
                    if (s.ref.object, s.ref.stage) == (object, stage))
    params = {}
    for path in declared.config:
        params.update(tomllib.loads((checkout.root / path).read_text()).get(stage, {}))
    sources = []
    for role, path in declared.sources.items():
        document = json.loads((checkout.root / path).read_text())
        for row in document["files"]:
            sources.append(PreparedSource(f"{role}/{row['path']}", checkout.root / document["root"] / row["path"],
                                          row["sha256"], row["size_bytes"]))
    return Prepared(declared.recipe, params, code_always=("small.soil",), code_exclude=("small.run", "vpstore"),
                    sources=tuple(sources), verbatim=bool(sources))


def environment(prepared):
    return {"device": os.environ.get("SMALL_DEVICE", "cpu")}


def produce(prepared, inputs, scratch, progress):
    import importlib

    return importlib.import_module(prepared.recipe_entry).make(prepared, inputs, scratch)
"""

SEED = """
import shutil

from vpstore.runner import Staged, StagedFile


def make(prepared, inputs, scratch):
    return Staged([StagedFile(s.role.split("/", 1)[1], "application/octet-stream", s.path) for s in prepared.sources])
"""

SOIL = '''
import json
import struct


def shard(path, tensors):
    """Write {name: bytes} as a safetensors file of U8 vectors, by hand."""
    header, at = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"".join(tensors.values()))


def tensors_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return {n: data[8 + length :][slice(*row["data_offsets"])] for n, row in header.items()}
'''

GROW = """
import json
import os
import time

from small.soil import shard, tensors_of
from vpstore.errors import GateMissed
from vpstore.runner import Staged, StagedFile


def make(prepared, inputs, scratch):
    with (scratch / "attempts.txt").open("a") as log:
        log.write("x")
    ran = os.environ.get("SMALL_LOG")
    if ran:
        with open(ran, "a") as log:
            log.write(prepared.recipe_entry + " " + str(prepared.params) + "\\n")
    if os.environ.get("SMALL_SLEEP"):
        time.sleep(float(os.environ["SMALL_SLEEP"]))
    step = prepared.params["step"]
    if step < 0:
        raise GateMissed("growth is negative", where="small.grow", expected=">= 0", found=str(step))
    parent = tensors_of(inputs["parent"].path / "model.safetensors")
    grown = {name: bytes((byte + step) % 256 for byte in data) for name, data in parent.items()}
    grown["kept"] = parent["kept"]
    if os.environ.get("SMALL_NOISE"):
        grown["noisy"] = os.urandom(16)
    shard(scratch / "model.safetensors", grown)
    shard(scratch / "statistics.safetensors", {"mean": bytes(64)})
    (scratch / "metrics.json").write_text(json.dumps({"step": step}) + "\\n")
    return Staged(
        [StagedFile("model.safetensors", "application/vnd.safetensors", scratch / "model.safetensors"),
         StagedFile("reports/metrics.json", "application/json", scratch / "metrics.json")],
        [StagedFile("statistics", "application/vnd.safetensors", scratch / "statistics.safetensors")],
    )
"""

JUDGE = """
import json

from small.soil import tensors_of
from vpstore.runner import Staged, StagedFile


def make(prepared, inputs, scratch):
    score = sum(tensors_of(inputs["parent"].path / "model.safetensors")["body"]) / 1000
    (scratch / "metrics.json").write_text(json.dumps({"score": score}) + "\\n")
    return Staged([StagedFile("reports/metrics.json", "application/json", scratch / "metrics.json")])
"""


def pointed(path: Path) -> dict[str, Any]:
    """The pointer in a file, with the artifact that the file beside it has."""
    seen: dict[str, Any] = json.loads(path.read_text())
    if seen["format"] == 1:
        return seen
    rows = json.loads(path.with_suffix(".artifact").read_text())["artifacts"]
    (artifact,) = (row["artifact"] for row in rows if (row["key"], row["content"]) == (seen["key"], seen["content"]))
    return {"format": 1, "object": seen["object"], "stage": seen["stage"], "key": seen["key"], "artifact": artifact}


@cache
def server() -> CommandServer:
    started = CommandServer(REPOSITORY)
    atexit.register(started.close)
    return started


@dataclass
class Project:
    """A temporary checkout and the real command line in it."""

    root: Path
    cache: Path
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "vpstore", *arguments]

    def variables(self, **more: str) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("VPSTORE_", "SMALL_", "GIT_"))
        }
        kept |= {"PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(self.cache), "PYTHONDONTWRITEBYTECODE": "1"}
        return {**kept, **self.environment, **more}

    def outcome(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command, however it ends."""
        folder = self.cache / "output"
        folder.mkdir(parents=True, exist_ok=True)
        found, out, err = server().run(
            list(arguments), cwd=self.root, environment=self.variables(**more), folder=folder
        )
        return subprocess.CompletedProcess(arguments, found, out, err)

    def run(self, *arguments: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        done = self.outcome(*arguments, **more)
        assert done.returncode == code, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str, code: int = 0, **more: str) -> Any:
        document = json.loads(self.run(*arguments, "--json", code=code, **more).stdout)
        assert document["schema"] == 1
        return document

    @property
    def store(self) -> Path:
        return self.root / ".vpstore"

    def pointer(self, slug: str, profile: str = "tiny") -> Path:
        return self.root / "weights" / profile / "refs" / f"{slug}.json"

    def pointed(self, slug: str, profile: str = "tiny") -> dict[str, Any]:
        """What a pointer means, in the form that the first format had; written back, it is a sound pointer, too."""
        return pointed(self.pointer(slug, profile))

    def blob(self, digest: str) -> Path:
        digits = digest.removeprefix("blake3:")
        return self.store / "blobs" / "blake3" / digits[:2] / digits[2:]

    def listing(self) -> dict[str, bytes]:
        """Every file of the store and of the weights, without what is temporary or says which checkouts there are."""
        found = {}
        for top in (self.store, self.root / "weights", self.root / "reports"):
            for path in sorted(top.rglob("*")):
                parts = path.relative_to(self.root).parts
                if path.is_file() and not path.is_symlink() and not {"work", "locks", "tmp", "roots"} & set(parts):
                    found["/".join(parts)] = path.read_bytes()
        return found


def write(root: Path, path: str, text: str) -> None:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(textwrap.dedent(text).lstrip())


def make_project(root: Path, cache: Path) -> Project:
    sys.path.insert(0, str(root))
    namespace: dict[str, Any] = {}
    exec(SOIL, namespace)  # the project's own helper writes the donor, too
    sys.path.remove(str(root))
    donor = root / "assets" / "donor"
    donor.mkdir(parents=True)
    namespace["shard"](donor / "model.safetensors", {"kept": bytes(range(32)), "body": bytes(range(64)), "void": b""})
    (donor / "config.json").write_text('{"hidden": 64}\n')
    rows = []
    for path in sorted(donor.iterdir()):
        data = path.read_bytes()
        size = len(data) if path.suffix == ".json" else None
        rows.append({"path": path.name, "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": size})
    files = {
        "pyproject.toml": PYPROJECT,
        "params.yaml": "profile: tiny\n",
        "configs/objects.toml": OBJECTS,
        "configs/profiles/tiny.toml": "",
        "configs/profiles/large.toml": "",
        "configs/plant.toml": "[sprout]\nstep = 1\n[bloom]\nstep = 2\n",
        "configs/donor.json": json.dumps({"root": "assets/donor", "files": rows}),
        "small/__init__.py": "",
        "small/run.py": RUN,
        "small/seed.py": SEED,
        "small/soil.py": SOIL,
        "small/grow.py": GROW,
        "small/judge.py": JUDGE,
    }
    for path, text in files.items():
        write(root, path, text)
    return Project(root, cache)
