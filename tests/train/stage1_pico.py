"""A pico Stage 1: four directories as `vpstore resolve` would show them, and the run over them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from blake3 import blake3
from training_pico import Workshop, pico_moe, stage1_params

from recipes import stage1_handoff
from recipes.recipe import Context, InputArtifact
from recipes.train.stage1_inputs import ROLES, Stage1Inputs, open_inputs

FOLDERS = {"checkpoint": "parent", "data": "data", "tokenizer": "tokenizer"}


def write_view(folder: Path) -> str:
    """Put artifact.json into a folder, so that it is the directory of an artifact; the artifact's digest."""
    (folder / "artifact.json").unlink(missing_ok=True)
    rows = [
        {
            "path": path.relative_to(folder).as_posix(),
            "digest": "blake3:" + blake3(path.read_bytes()).hexdigest(),
            "size_bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    (folder / "artifact.json").write_text(json.dumps({"files": rows}))
    return "blake3:" + blake3((folder / "artifact.json").read_bytes()).hexdigest()


@dataclass(frozen=True)
class Stage1Shop:
    """The run's directory beside those of its inputs."""

    root: Path

    @classmethod
    def make(cls, root: Path, **changes: Any) -> Stage1Shop:
        Workshop.make(root, pico_moe())
        shop = cls(root)
        shop.write_run(**changes)
        return shop

    def copy(self, root: Path) -> Stage1Shop:
        """The same, to be changed."""
        shutil.copytree(self.root, root)
        return Stage1Shop(root)

    def write_run(self, **changes: Any) -> None:
        """Hand over what lies here now."""
        inputs = {
            role: InputArtifact(role, f"{role}@main", write_view(self.root / folder), self.root / folder)
            for role, folder in FOLDERS.items()
        }
        plan = stage1_handoff.plan(Context(stage1_params(**changes), inputs, {}, self.root))
        run = self.root / "run"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        for file in plan.files:
            out = BytesIO()
            file.write(out)
            (run / file.name).write_bytes(out.getvalue())
        write_view(run)

    def inputs(self) -> Stage1Inputs:
        """Everything verified."""
        return open_inputs(self.root / "run", {role: self.root / FOLDERS[role] for role in ROLES})

    def command(self, out: Path) -> list[str]:
        """The arguments of `train`."""
        folders = [text for role in ROLES for text in (f"--{role}", str(self.root / FOLDERS[role]))]
        return ["train", "--run", str(self.root / "run"), *folders, "--out", str(out)]
