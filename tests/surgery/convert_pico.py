"""A small donor that is really trained, on bytes, and the inputs of convert_dense around it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.checkpoint import donor_config_json
from recipes.data.megatron_dataset import IndexedDatasetWriter
from recipes.model.config import PADDED_VOCAB, DonorConfig, StudentConfig
from recipes.model.donor import Donor
from recipes.names import EMBEDDING, HEAD, shard_of
from recipes.params.convert_dense import Params
from recipes.recipe import Context, InputArtifact
from recipes.tensors import write_safetensors

ROOT = Path(__file__).resolve().parents[2]
BYTES = 256
HIDDEN, LAYERS, INNER, WIDTH = 32, 2, 96, 32


def pico_donor(**changes: Any) -> DonorConfig:
    fields = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": INNER, "vocab_size": BYTES}
    return DonorConfig(**{**fields, "tie_word_embeddings": False, **changes})


def pico_student(**changes: Any) -> StudentConfig:
    fields = {"hidden_size": HIDDEN, "num_layers": LAYERS, "ffn_hidden_size": WIDTH, "attention": "gqa"}
    return StudentConfig(**{**fields, **changes})


def pico_params(**changes: Any) -> Params:
    fields: dict[str, Any] = {
        "model": pico_student(),
        "method": "fitted",
        "sequence_length": 128,
        "calibration_tokens": 2560,
        "probe_tokens": 512,
        "ridge": 1e-4,
        "drift": 0.5,
        "token_limit": 30.0,
        "value_residual": 4.0,
        "pair_scale": 0.5,
        "ffn_steps": 60,
        "ffn_step_tokens": 512,
        "ffn_learning_rate": 0.01,
        "seed": 0,
        "max_loss_over_unigram": 1.0,
    }
    return Params(**{**fields, **changes})


@cache
def prose() -> tuple[Tensor, Tensor]:
    """Bytes of the corpus that ships with the project: for training, and held out."""
    texts = []
    with (ROOT / "assets/corpus/prose.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"].encode()[:2000])
            if sum(map(len, texts)) > 160_000:
                break
    both = torch.tensor(np.frombuffer(b"".join(texts), np.uint8).astype(np.int64))
    return both[:-20_000], both[-20_000:]


@cache
def trained_donor(steps: int = 90) -> Donor:
    """A donor of bytes after some real training."""
    torch.manual_seed(0)
    donor = Donor(pico_donor())
    for name, value in donor.named_parameters():
        if value.dim() == 2:
            torch.nn.init.normal_(value, std=0.3 if "embed" in name else value.shape[1] ** -0.5 * 0.7)
    training, _ = prose()
    optimizer = torch.optim.Adam(donor.parameters(), lr=6e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 6e-3 * (1 - step / steps)
        starts = torch.randint(len(training) - 49, (3, 1))
        rows = training[starts + torch.arange(49)]
        loss = F.cross_entropy(donor(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return donor.requires_grad_(False)


def padded_tensors(donor: Donor) -> dict[str, Tensor]:
    """The donor over the full vocabulary; the ids beyond the bytes get rows that no hidden state likes."""
    tensors = {name: value.clone().bfloat16() for name, value in donor.state_dict().items()}
    hidden_NH = donor.forward_hidden(prose()[1][:4096].view(-1, 128)).flatten(0, 1)
    ones_H = torch.linalg.lstsq(hidden_NH, torch.ones(len(hidden_NH), 1)).solution[:, 0]
    for name, fill_H in ((EMBEDDING, torch.zeros(HIDDEN)), (HEAD, -30 * ones_H)):
        rows = fill_H.bfloat16().repeat(PADDED_VOCAB, 1)
        rows[:BYTES] = tensors[name]
        tensors[name] = rows
    return tensors


@dataclass(frozen=True)
class Bench:
    """A folder with convert_dense's inputs."""

    root: Path

    @classmethod
    def make(cls, root: Path, donor: Donor) -> Bench:
        config = donor.config.model_copy(update={"vocab_size": PADDED_VOCAB})
        (root / "parent").mkdir(parents=True)
        tensors = padded_tensors(donor)
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            groups.setdefault(shard_of(name), {})[name] = value
        for shard, group in groups.items():
            write_safetensors(root / "parent" / shard, group)
        (root / "parent/config.json").write_text(json.dumps(donor_config_json(config)))
        for split, ids in zip(("train", "valid"), prose(), strict=True):
            _write_split(root / "data" / split, ids[:12_000].numpy())
        (root / "tokenizer").mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens.json"):
            (root / "tokenizer" / name).write_text("{}")
        return cls(root)

    def context(self, params: Params, scratch: str) -> Context:
        roles = ("parent", "data", "tokenizer")
        inputs = {role: InputArtifact(role, f"{role}@test", "blake3:0", self.root / role) for role in roles}
        (self.root / scratch).mkdir(exist_ok=True)
        return Context(params, inputs, {}, self.root / scratch)


def _write_split(folder: Path, ids: np.ndarray[Any, Any]) -> None:
    folder.mkdir(parents=True)
    values = {"tokens": (ids, np.int32), "lossmask": (np.ones_like(ids), np.uint8), "span": (0 * ids, np.uint8)}
    for part, (value, dtype) in values.items():
        with IndexedDatasetWriter(folder / f"text_{part}", dtype) as writer:
            for start in range(0, len(ids), 300):
                writer.add_document(value[start : start + 300].astype(dtype))
