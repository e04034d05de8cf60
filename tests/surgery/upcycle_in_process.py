"""Upcycle a model of many experts, as a build would, in a process of its own that says how much memory it took.

Use: python upcycle_in_process.py FOLDER make | plain | mapped; prints JSON. `mapped` reads as the stock library does,
which keeps every page that it has touched. The peak is the kernel's for this program alone: what `getrusage` says
begins with what the process held that started it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from recipes import runtime
from recipes.execute import carry_out
from recipes.job import Job
from recipes.recipe import InputArtifact, PlanRecipe

MODEL: dict[str, Any] = {"hidden_size": 128, "num_layers": 8, "ffn_hidden_size": 512, "attention": "tpa"}
MOE = {"num_experts": 256, "expert_hidden_size": 128, "shared_hidden_size": 512}
PARAMS: dict[str, Any] = {
    "method": "R0", "seed": 1, "fc1_noise": 0.1, "drop_fraction": 0.5, "routed_share": 0.625, "router_std": 0.05,
    "calibration_tokens": 64, "calibration_sequence": 64, "check_tokens": 16, "max_relative_error": 1e-3,
    "min_router_entropy": 0.0, "max_expert_load": 1.0,
}  # fmt: skip


def make(folder: Path) -> None:
    """A parent that says nothing, and texts: shapes are all that matters here."""
    import torch
    from surgery_pico import Workshop, pico_config

    from recipes.checkpoint import expected_tensors
    from recipes.tensors import TORCH_DTYPES

    config = pico_config(**MODEL)
    Workshop.make(
        folder, config, {n: torch.zeros(s, dtype=TORCH_DTYPES[d]) for n, (d, s) in expected_tensors(config).items()}
    )


def peak() -> int:
    """The most memory that this program has held so far, in bytes."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmHWM"].split()[0]) * 1024


def upcycle(folder: Path, scratch: str) -> None:
    """The whole recipe, its gates too."""
    from recipes.model.config import MoeConfig, StudentConfig

    model = StudentConfig(**MODEL, moe=MoeConfig(**MOE)).model_dump(mode="json")
    inputs = {role: InputArtifact(role, role, "blake3:0", folder / role) for role in ("parent", "data", "tokenizer")}
    (folder / scratch).mkdir()
    job = Job("recipes.upcycle_moe", {"model": model, **PARAMS}, 2, inputs, {}, folder / scratch)
    recipe = job.recipe()
    assert isinstance(recipe, PlanRecipe)
    assert recipe.needs is not None
    said = recipe.needs(job.context(lambda label, done, total: None))
    bare = peak()
    carry_out(job, lambda label, done, total: None)
    print(json.dumps({**dataclasses.asdict(said), "held": peak() - bare, "peak": peak()}))


def map_everything() -> None:
    """Let tensors be maps of the files that they lie in."""
    from safetensors import safe_open

    from recipes import tensors

    opened: dict[Path, Any] = {}

    def read(self: tensors.TensorReader, name: str) -> Any:
        path = self.directory / self._shards[name]
        if path not in opened:
            opened[path] = safe_open(path, framework="pt")  # type: ignore[no-untyped-call]
        return opened[path].get_tensor(name)

    def rows(self: tensors.TensorReader, name: str, start: int, stop: int) -> Any:
        return read(self, name)[start:stop]

    tensors.TensorReader.read, tensors.TensorReader.rows = read, rows  # type: ignore[method-assign]


if __name__ == "__main__":
    place, how = Path(sys.argv[1]), sys.argv[2]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # as many threads make tensors as there are cores
    runtime.fix_numerics(2)
    if how == "make":
        make(place)
    else:
        if how == "mapped":
            map_everything()
        upcycle(place, how)
