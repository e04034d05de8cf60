"""Pico students as artifacts, exported, with what Megatron has to find beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from core_stack import STRIDE
from student_builder import SMALL_MOE, config_of, ids_of, student_of
from torch import Tensor

from recipes.checkpoint import TOKENIZER_FILES, expected_tensors, load_student, student_config_json
from recipes.megatron import torch_dist
from recipes.megatron.export import export
from recipes.megatron.layout import megatron_key
from recipes.megatron.torch_dist import Folder, write_folder
from recipes.model.config import StudentConfig
from recipes.planned import PlannedTensor
from recipes.recipe import InputArtifact
from recipes.tensors import DTYPE_NAMES, TORCH_DTYPES, TensorReader, write_safetensors

CONFIGS = {
    "compat": config_of("gqa", layers=2),
    "real": config_of("tpa"),
    "experts": config_of("tpa", moe=SMALL_MOE),
}


def silent(label: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def artifact(folder: Path, config: StudentConfig, *, seed: int = 3) -> InputArtifact:
    """A student on disk, as an artifact's view would show it."""
    folder.mkdir(parents=True)
    weights = student_of(config, seed, torch.float32).state_dict()
    specs = expected_tensors(config)
    # Shaken weights are for float64; halved, float32 is enough for what is compared.
    write_safetensors(
        folder / "model.safetensors",
        {name: (0.5 * weights[name]).to(TORCH_DTYPES[dtype]) for name, (dtype, _) in specs.items()},
    )
    (folder / "config.json").write_text(json.dumps(student_config_json(config)))
    for name in TOKENIZER_FILES:
        (folder / name).write_text("{}")
    return InputArtifact("source", "pico@main", "blake3:" + "0" * 64, folder)


def exported(folder: Path, source: InputArtifact, target: str) -> Path:
    folder.mkdir(parents=True)
    export(target, source, folder, silent)
    return folder


def expect(case: Path, source: InputArtifact, config: StudentConfig, *, tokens: int = 150) -> None:
    """Put what our student makes of some packed documents beside an export."""
    student = load_student(TensorReader(source.path), config)
    ids = ids_of(1, tokens)
    documents = torch.zeros_like(ids)
    documents[:, tokens // 5 * 4 :] = 1  # the first is longer than half a window, the second has keys to keep off
    logits = student.forward_hidden(ids, documents) @ student.head_weight.T
    rows = logits[:, :-1]
    loss = (torch.logsumexp(rows, -1) - rows.gather(-1, ids[:, 1:, None])[..., 0]).mean()
    loss.backward()
    gradients = {megatron_key(name): p.grad for name, p in student.named_parameters()}
    last = f"model.layers.{config.num_layers - 1}.mlp.experts.fc1_weight"
    experts = student.state_dict()[last] if config.moe else None
    expected = {
        "ids": ids, "documents": documents, "logits": logits[..., ::STRIDE].detach(), "loss": loss.item(),
        "gradients": gradients, "experts": experts,
    }  # fmt: skip
    torch.save(expected, case / "expected.pt")


def made(root: Path, name: str, target: str, change: Callable[[Path], None] = lambda _: None) -> Path:
    """A case: the artifact in `root/artifact-NAME`, the export with its expectations in `root/NAME-TARGET`."""
    config = CONFIGS[name]
    source = InputArtifact("source", "pico@main", "blake3:" + "0" * 64, root / f"artifact-{name}")
    if not source.path.exists():
        artifact(source.path, config)
    case = exported(root / f"{name}-{target}", source, target)
    expect(case, source, config)
    change(case)
    return case


def rewritten(release: Path, change: Callable[[dict[str, Tensor]], None], *, is_checked: bool = True) -> None:
    """Write a torch_dist folder anew with other tensors, as its writer would have.

    Args:    is_checked: whether values must be finite, as our own writer asks.
    """
    folder = Folder(release)
    tensors = {key: folder.read(key) for key in folder.tensors()}
    states = folder.states()
    change(tensors)
    for path in release.iterdir():
        path.unlink()
    rows = [
        PlannedTensor(key, DTYPE_NAMES[value.dtype], value.shape, lambda v=value: v) for key, value in tensors.items()
    ]
    with pytest.MonkeyPatch.context() as patch:
        if not is_checked:
            patch.setattr(torch_dist, "require_finite", lambda *_: None)
        stacks = [key for key in tensors if ".experts.experts." in key]
        write_folder(release, rows, states=states, stacks=stacks)


def in_plain_order(case: Path) -> None:
    """Let q of all groups come first, then k, then v, as most other stacks have them."""

    def reorder(tensors: dict[str, Tensor]) -> None:
        for key, value in tensors.items():
            if key.endswith(("linear_qkv.weight", "linear_qkv.bias")):
                groups = value.reshape(2, 6, 128, *value.shape[1:])
                parts = groups[:, :4].flatten(0, 2), groups[:, 4].flatten(0, 1), groups[:, 5].flatten(0, 1)
                tensors[key] = torch.cat(parts)

    rewritten(case / "release", reorder)
