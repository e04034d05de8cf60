"""Pico students, data sets and a plain runner for surgery recipes, for the tests beside this file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.checkpoint import student_config_json
from recipes.data.megatron_dataset import IndexedDatasetWriter
from recipes.model.config import StudentConfig
from recipes.model.transformer import Student
from recipes.names import INDEX_FILE, shard_of
from recipes.recipe import Context, InputArtifact, Plan, Report
from recipes.shards import ShardWriter
from recipes.tensors import TensorReader, write_safetensors

TOKENS = 60  # ids that occur in the pico texts


def split_qkv(fused: Tensor, *, queries: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `fuse_qkv` put together: q [Q, D, ...], k [G, D, ...], v [G, D, ...]."""
    parts = torch.unflatten(fused, 0, (groups, queries // groups + 2, -1))
    return parts[:, :-2].flatten(0, 1), parts[:, -2], parts[:, -1]


def pico_config(**changes: Any) -> StudentConfig:
    fields: dict[str, Any] = {"hidden_size": 16, "num_layers": 4, "ffn_hidden_size": 32, "attention": "gqa"}
    return StudentConfig(**{**fields, **changes})


def random_tensors(config: StudentConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """Weights of a lively model: biases and norms off their neutral values, activations with a shared mean."""
    torch.manual_seed(seed)
    model = Student(config)
    tensors = {}
    for name, value in model.state_dict().items():
        fresh = value.clone()
        if name.endswith("norm.weight"):
            fresh = 1.0 + 0.2 * torch.randn(value.shape)
        elif name.endswith("value_residual"):
            fresh = torch.tensor(2.0)
        elif name.endswith("softmax_offset"):
            fresh = torch.full(value.shape, -4.0)
        elif name == "model.embed_tokens.weight":
            fresh = 0.3 + torch.randn(value.shape) * 0.3
        elif name.endswith("bias") and "expert_bias" not in name:
            fresh = torch.randn(value.shape) * 0.05
        elif value.dim() >= 2:
            fresh = torch.randn(value.shape) * value.shape[-1] ** -0.5
        pinned = name.endswith(("value_residual", "softmax_offset", "log_freq", "expert_bias"))
        tensors[name] = fresh if pinned else fresh.bfloat16()
    return tensors


def write_checkpoint(folder: Path, config: StudentConfig, tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        shards.setdefault(shard_of(name), {})[name] = value
    for shard, group in shards.items():
        write_safetensors(folder / shard, group)
    weight_map = {name: shard_of(name) for name in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(student_config_json(config)))


def write_texts(folder: Path, *, seed: int = 0) -> None:
    """A train and a valid split of random walks over a few ids, documents of uneven lengths."""
    for split, documents in (("train", 40), ("valid", 12)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng([seed, documents])
        parts = [("tokens", np.int32), ("lossmask", np.uint8), ("span", np.uint8)]
        texts = [
            np.cumsum(generator.integers(1, 5, int(generator.integers(20, 160)))) % TOKENS for _ in range(documents)
        ]
        for part, dtype in parts:
            with IndexedDatasetWriter(folder / split / f"text_{part}", dtype) as writer:
                for text in texts:
                    writer.add_document(
                        {"tokens": text, "lossmask": np.ones_like(text)}.get(part, 0 * text).astype(dtype)
                    )


@dataclass(frozen=True)
class Workshop:
    """A folder with the three inputs that the surgery recipes take."""

    root: Path

    @classmethod
    def make(cls, root: Path, config: StudentConfig, tensors: Mapping[str, Tensor]) -> Workshop:
        write_checkpoint(root / "parent", config, tensors)
        write_texts(root / "data")
        (root / "tokenizer").mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens.json"):
            (root / "tokenizer" / name).write_text("{}")
        return cls(root)

    def context(self, params: Any, scratch: str = "scratch") -> Context:
        roles = ("parent", "data", "tokenizer")
        inputs = {role: InputArtifact(role, f"{role}@test", "blake3:0", self.root / role) for role in roles}
        (self.root / scratch).mkdir(exist_ok=True)
        return Context(params, inputs, {}, self.root / scratch)


@dataclass(frozen=True)
class Built:
    """What a recipe made."""

    plan: Plan
    staged: TensorReader
    report: Report | None
    context: Context

    def bytes_by_shard(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.staged.directory.glob("*.safetensors"))}


def build(
    recipe: ModuleType,
    context: Context,
    *,
    order: Callable[[list[str]], list[str]] = sorted,
    with_check: bool = True,
) -> Built:
    """Intermediates, tensors in the given order, check: what the project's runner does, without its store."""
    done: dict[str, Path] = {}
    if hasattr(recipe, "intermediates"):
        for step in recipe.intermediates(context):
            path = context.scratch / f"{step.name}.safetensors"
            if not path.exists():
                write_safetensors(path, step.compute(dict(done)))
            done[step.name] = path
    context = replace(context, intermediates=done)
    plan: Plan = recipe.plan(context)
    writer = ShardWriter(context.scratch / "shards", plan.tensors)
    writer.prepare()
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    for name in order(list(by_name)):
        writer.write(name, by_name[name].value())
    staged = TensorReader(context.scratch / "shards")
    return Built(plan, staged, recipe.check(context, staged) if with_check else None, context)


def shuffled(names: Sequence[str]) -> list[str]:
    mixed = sorted(names)
    random.Random(7).shuffle(mixed)
    return mixed


def damaged(built: Built, name: str, change: Callable[[Tensor], Tensor], folder: Path) -> TensorReader:
    """The staged tensors with one of them changed."""
    for path in built.staged.directory.glob("*.safetensors"):
        (folder / path.name).write_bytes(path.read_bytes())
    shard = TensorReader(built.staged.directory)
    tensors = {n: shard.read(n) for n in shard.names() if shard_of(n) == shard_of(name)}
    tensors[name] = change(tensors[name].clone())
    write_safetensors(folder / shard_of(name), tensors)
    return TensorReader(folder)


def gates(report: Report | None) -> dict[str, str]:
    assert report is not None
    return {gate.name: gate.verdict for gate in report.gates}
