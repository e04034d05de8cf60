"""A checkout with the recipes of this repository and three pico artifacts, from which vpMoE@upcycle can be built.

python pico_checkout.py ROOT
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PYPROJECT = """
[tool.vpstore]
objects = "configs/objects.toml"
profiles = "configs/profiles"
lock = "vpstore.lock"
weights = "weights"
reports = "reports"
resume = true
"""
OBJECTS = """
format = 1
runner = "recipes.run"
[objects.parent]
default_stage = "main"
[objects.parent.stages.main]
recipe = "recipes.heal"
[objects.data]
default_stage = "main"
[objects.data.stages.main]
recipe = "recipes.heal"
[objects.tokenizer]
default_stage = "main"
[objects.tokenizer.stages.main]
recipe = "recipes.heal"
[objects.vpMoE]
default_stage = "upcycle"
[objects.vpMoE.stages.upcycle]
recipe = "recipes.upcycle_moe"
inputs = { parent = "parent", data = "data", tokenizer = "tokenizer" }
config = ["configs/vpMoE.toml"]
"""


def toml(table: dict[str, Any], name: str) -> str:
    """One table and those below it; JSON's scalars and lists are TOML's."""
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    lines = [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in plain.items())]
    below = [toml(value, f"{name}.{key}") for key, value in table.items() if isinstance(value, dict)]
    return "\n".join([*lines, *below])


def make(root: Path) -> None:
    from recipes import runtime

    runtime.fix_numerics(1)
    from surgery_pico import Workshop, random_tensors
    from test_moe_recipe import PARENT, params

    Workshop.make(root / "pico", PARENT, random_tensors(PARENT))
    shutil.copytree(REPOSITORY / "recipes", root / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    quick = params(calibration_tokens=400, check_tokens=16, min_router_entropy=0.5, max_expert_load=0.3)
    values = quick.model_dump(mode="json", exclude_none=True)
    model = values.pop("model")
    (root / "vpstore").symlink_to(REPOSITORY / "vpstore")  # as in the repository: not one of the packages from outside
    (root / "configs" / "profiles").mkdir(parents=True)
    texts = {
        "pyproject.toml": PYPROJECT,
        "params.yaml": "profile: pico\n",
        "configs/objects.toml": OBJECTS,
        "configs/profiles/pico.toml": "[runtime]\nthreads = 1\n",
        "configs/vpMoE.toml": f"{toml(values, 'upcycle')}\n{toml(model, 'model')}\n",
    }
    for path, text in texts.items():
        (root / path).write_text(text)
    for name in ("parent", "data", "tokenizer"):
        register(root, name)


def register(root: Path, name: str) -> None:
    """Publish a folder of pico files as if a recipe had made them."""
    from vpstore.runner import Staged, StagedFile
    from vpstore.schema.manifest import BuildRecord
    from vpstore.schema.ref import StageRef
    from vpstore.storage.pointers import Pointer
    from vpstore.surroundings import Stopwatch
    from vpstore.verbs.publish import Publication, publish
    from vpstore.workspace import Workspace

    work = Workspace.find(root, create=True)
    folder, ref = root / "pico" / name, StageRef(name, "main")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    staged = Staged([StagedFile(p.relative_to(folder).as_posix(), "application/octet-stream", p) for p in files])
    publication = Publication(ref, BuildRecord(f"pico.{name}", (), {}), staged, root / "none")
    manifest = publish(work, publication, facts=lambda: Stopwatch().facts(root, {}))
    work.checkout.pointers.write(Pointer(ref, manifest.digest, manifest.build.key()))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
