"""An interrupted `vpstore build` of a training stage goes on, and names the same artifact: through the real command."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from training_pico import ROOT, Workshop, params_table, pico_moe

from recipes.train.run_files import to_toml
from recipes.train.state import TENSORS

STEPS = 16  # enough that a kill finds the run under way, few enough to wait for
INPUTS = ("parent", "data", "tokenizer")
PYPROJECT = """
[tool.vpstore]
objects = "configs/objects.toml"
profiles = "configs/profiles"
lock = "vpstore.lock"
weights = "weights"
reports = "reports"
resume = true
"""
# A recipe of the test's own: takes its sources over as they are.
TAKE_OVER = '''
"""Take the sources over, byte for byte."""

from recipes.params.take_over import Params
from recipes.recipe import Context, Plan, copy_file


def plan(context: Context) -> Plan:
    """Every source under its own name."""
    params: Params = context.params
    kinds = {"safetensors": "application/vnd.safetensors"}
    named = {name.partition("/")[2]: path for name, path in context.sources.items()}
    return Plan((), [copy_file(n, p, kinds.get(n.rpartition(".")[2], params.kind)) for n, p in sorted(named.items())])
'''
TAKE_OVER_PARAMS = '''
"""Knobs of the take-over."""

from recipes.params.base import ParamsBase


class Params(ParamsBase):
    """What files are that nobody knows better."""

    kind: str = "application/octet-stream"
'''


class Project:
    """A checkout with the project's own recipes, three taken-over inputs and one stage that trains."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def make(cls, root: Path) -> Project:
        shop = Workshop.make(root / "inputs", pico_moe())
        shutil.copytree(ROOT / "recipes", root / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
        (root / "recipes/take_over.py").write_text(TAKE_OVER)
        (root / "recipes/params/take_over.py").write_text(TAKE_OVER_PARAMS)
        (root / "configs/profiles").mkdir(parents=True)
        (root / "pyproject.toml").write_text(PYPROJECT)
        (root / "params.yaml").write_text("profile: pico\n")
        (root / "configs/profiles/pico.toml").write_text("[runtime]\nthreads = 1\n")
        objects: dict[str, Any] = {"format": 1, "runner": "recipes.run", "objects": {}}
        for role in INPUTS:
            (root / f"configs/{role}.json").write_text(json.dumps(provenance(shop.root / role, root)))
            (root / f"configs/{role}.toml").write_text("[main]\n")
            stage = {"recipe": "recipes.take_over", "sources": {role: f"configs/{role}.json"}}
            objects["objects"][role] = stages("main", {**stage, "config": [f"configs/{role}.toml"]})
        inputs = {role: f"{role}@main" for role in INPUTS}
        stage = {"recipe": "recipes.heal", "inputs": inputs, "config": ["configs/student.toml"]}
        objects["objects"]["student"] = stages("heal", stage)
        (root / "configs/objects.toml").write_text(to_toml(objects))
        project = cls(root)
        project.configure()
        return project

    def configure(self, **train: Any) -> None:
        """The params of the stage that trains."""
        (self.root / "configs/student.toml").write_text(
            to_toml({"heal": params_table(steps=STEPS, save_every_steps=4, **train)})
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("VPSTORE_")}
        environment = {**kept, "PYTHONPATH": str(self.root), "XDG_CACHE_HOME": str(self.root / "cache")}
        command = [sys.executable, "-m", "vpstore", *arguments]
        return subprocess.Popen(
            command, cwd=self.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str, code: int = 0) -> Any:
        process = self.start(*arguments, "--json")
        out, errors = process.communicate(timeout=250)
        assert process.returncode == code, f"{out}\n{errors}"
        return json.loads(out)

    def states(self) -> list[Path]:
        """Saved states of builds under way."""
        return sorted(self.root.glob(".vpstore/work/**/training/state-*"))

    def kill_build(self) -> Path:
        """SIGKILL a build of the stage after its first saved state; the state that is left."""
        process = self.start("build", "student")
        while process.poll() is None and not self.states():
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
        return self.states()[-1]

    def artifact(self) -> str:
        (row,) = json.loads((self.root / "weights/pico/refs/student-heal.artifact").read_text())["artifacts"]
        return str(row["artifact"])


def stages(name: str, stage: dict[str, Any]) -> dict[str, Any]:
    return {"default_stage": name, "stages": {name: stage}}


def provenance(folder: Path, root: Path) -> dict[str, Any]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    rows = [
        {
            "path": path.relative_to(folder).as_posix(),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size_bytes": path.stat().st_size,
        }
        for path in files
    ]
    return {"format": 1, "root": folder.relative_to(root).as_posix(), "files": rows}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = Project.make(tmp_path_factory.mktemp("project"))
    made.run("build", *INPUTS)
    return made


@pytest.mark.slow
def test_a_killed_build_goes_on_and_gives_the_same_artifact(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Project(tmp_path_factory.mktemp("twin") / "project")
    shutil.copytree(project.root, other.root, symlinks=True)
    left = project.kill_build()
    assert left.name < f"state-{STEPS:08d}"
    tensors = left / TENSORS
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    # The control: a build that began afresh would not mind.
    assert project.run("build", "student", code=20)["error"]["what"] == "a training state is damaged"
    tensors.write_bytes(whole)
    project.run("build", "student")
    other.run("build", "student")  # never interrupted
    assert project.artifact() == other.artifact()
    report = "reports/pico/student-heal/metrics.json"
    assert (project.root / report).read_bytes() == (other.root / report).read_bytes()
