"""Pico students, conversations and params for the training tests beside this file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from recipes.checkpoint import expected_tensors, student_config_json
from recipes.data.dataset_manifest import FOLDERS, MANIFEST, described
from recipes.data.harmony import HarmonyTokenizer
from recipes.data.megatron_dataset import IndexedDatasetWriter
from recipes.model.config import MoeConfig, StudentConfig
from recipes.model.transformer import Student
from recipes.names import INDEX_FILE, shard_of
from recipes.params.heal import Params as HealParams
from recipes.params.stage1_handoff import Params as Stage1Params
from recipes.recipe import Context, InputArtifact
from recipes.tensors import TORCH_DTYPES
from recipes.train.conversation_validity import CHANNEL, END, MESSAGE, RETURN, START

ROOT = Path(__file__).resolve().parents[2]
ASSISTANT, ANALYSIS, FINAL, USER, EOD = 173781, 35644, 17196, 1428, 199999
VOCABULARY = (16, 64)  # ids that texts are made of


def pico_config(**changes: Any) -> StudentConfig:
    fields: dict[str, Any] = {"hidden_size": 16, "num_layers": 4, "ffn_hidden_size": 16, "attention": "tpa"}
    return StudentConfig(**{**fields, **changes})


def pico_moe() -> StudentConfig:
    return pico_config(
        moe=MoeConfig(num_experts=8, expert_hidden_size=8, shared_hidden_size=16, num_groups=4, top_groups=2, top_k=2)
    )


def pico_weights(config: StudentConfig, *, seed: int = 0) -> dict[str, Tensor]:
    model = Student(config)
    model.draw(torch.Generator().manual_seed(seed))
    specs = expected_tensors(config)
    return {name: tensor.to(TORCH_DTYPES[specs[name][0]]) for name, tensor in model.state_dict().items()}


def write_checkpoint(folder: Path, config: StudentConfig, weights: dict[str, Tensor]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shards: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        shards.setdefault(shard_of(name), {})[name] = tensor
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)  # the stock writer also writes what the project's refuses, such as NaN
    weight_map = {name: shard_of(name) for name in weights}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(student_config_json(config)))


def prose(generator: np.random.Generator) -> tuple[list[int], list[int]]:
    """A text that counts up within a few ids, so that there is something to learn; and its spans."""
    low, high = VOCABULARY
    steps = np.cumsum(generator.integers(1, 3, int(generator.integers(20, 60))))
    ids = [*(low + steps % (high - low)).tolist(), EOD]
    return ids, [0] * len(ids)


def conversation(generator: np.random.Generator) -> tuple[list[int], list[int]]:
    """A user's word, a thought and an answer; spans per token: 1 thought, 2 answer."""
    word = int(generator.integers(*VOCABULARY))
    user = [START, USER, MESSAGE, word, END]
    thought = [START, ASSISTANT, CHANNEL, ANALYSIS, MESSAGE, word, END]
    answer = [START, ASSISTANT, CHANNEL, FINAL, MESSAGE, word, word, RETURN]
    return [*user, *thought, *answer, EOD], [0] * len(user) + [1] * len(thought) + [2] * len(answer) + [0]


def write_data(folder: Path, *, seed: int = 0, make: Callable[[int, Any], Any] | None = None) -> None:
    """Both splits: every second document is a conversation. `make(number, generator)` may give other documents."""
    for split, count in (("train", 40), ("valid", 12)):
        generator = np.random.default_rng([seed, count])
        (folder / split).mkdir(parents=True, exist_ok=True)
        made = [
            make(number, generator) if make else conversation(generator) if number % 2 else prose(generator)
            for number in range(count)
        ]
        masks = [[int(any(spans) <= (span > 0)) for span in spans[1:]] + [0] for _, spans in made]
        arrays = {
            "tokens": (np.int32, [ids for ids, _ in made]),
            "lossmask": (np.uint8, masks),
            "span": (np.uint8, [[*spans[1:], 0] for _, spans in made]),
        }
        for part, (dtype, documents) in arrays.items():
            with IndexedDatasetWriter(folder / split / f"text_{part}", dtype) as writer:
                for document in documents:
                    writer.add_document(document)
    write_manifest(folder)


def write_manifest(folder: Path) -> None:
    """manifest.json of what lies in a data set's folder."""
    paths = [path for split in FOLDERS for path in sorted((folder / split).iterdir())]
    files = {path.relative_to(folder).as_posix(): described(path) for path in paths}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "kind": "synth_kd", "files": files}))


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    shutil.copyfile(ROOT / "assets/o200k_base.tiktoken", folder / "o200k_base.tiktoken")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens.json"):
        (folder / name).write_text("{}")


@cache
def tokenizer() -> HarmonyTokenizer:
    """The one of this process: reading the rank file takes longer than a pico's training."""
    return HarmonyTokenizer.from_directory(ROOT / "assets")


@contextmanager
def one_tokenizer() -> Iterator[None]:
    """Whoever asks for a tokenizer gets the same one."""
    made = tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HarmonyTokenizer, "from_directory", lambda path: made)
        yield


def params_table(**train: Any) -> dict[str, Any]:
    """Heal's params as a TOML would give them."""
    steps = train.get("steps", 8)
    rates = {f"{kind}_rate": 0.02 for kind in ("matrix", "embedding", "head", "vector", "frequency", "residual")}
    return {
        "train": {
            "steps": steps,
            "sequence_length": 64,
            "sequences": 2,
            "micro_sequences": 1,
            "seed": 7,
            "save_every_steps": max(1, min(3, steps - 1)),
            "schedule": {"warmup_steps": 2, "shape": "cosine", "final": 0.1},
            "optimizer": {**rates, "matrix_decay": 0.01, "table_decay": 0.01, "clip_norm": 1.0},
            "loss": {"kind": "plain", "chunk": 256},
            "spikes": {"window": 3, "factor": 3.0},
            **train,
        },
        "gates": {
            "max_spikes": 0,
            "numeric": {
                "three_digit_stride": 500,
                "accuracy_margin": 0.1,
                "nll_margin": 0.5,
                "measurable_accuracy": 0.1,
                "measurable_gain": 0.05,
            },
            "harmony": {"mode": "control_token_accuracy", "threshold": 0.0, "rows": 3},
            "held_out": {"tokens": 200, "sequence_length": 64, "improvement": 0.1},
            "router": {"max_dead": 0.9, "max_load": 0.95},
        },
    }


def heal_params(**train: Any) -> HealParams:
    return HealParams.model_validate_json(json.dumps(params_table(**train)))


@dataclass(frozen=True)
class Workshop:
    """Three inputs in a folder."""

    root: Path

    @classmethod
    def make(cls, root: Path, config: StudentConfig, *, seed: int = 0) -> Workshop:
        write_checkpoint(root / "parent", config, pico_weights(config, seed=seed))
        write_data(root / "data")
        write_tokenizer(root / "tokenizer")
        return cls(root)

    def context(self, params: Any, *, scratch: str = "scratch", **digests: str) -> Context:
        inputs = {
            role: InputArtifact(role, f"{role}@test", digests.get(role, "blake3:0"), self.root / role)
            for role in ("parent", "data", "tokenizer")
        }
        (self.root / scratch).mkdir(exist_ok=True)
        return Context(params, inputs, {}, self.root / scratch)


def checkpoint_context(workshop: Workshop, params: Any) -> Context:
    """The same inputs under the roles of evaluate and stage1_handoff."""
    inputs = {
        role: InputArtifact(role, f"{role}@test", f"blake3:{role}", workshop.root / folder)
        for role, folder in (("checkpoint", "parent"), ("data", "data"), ("tokenizer", "tokenizer"))
    }
    return Context(params, inputs, {}, workshop.root)


def stage1_params(**changes: Any) -> Stage1Params:
    """Stage 1's params as a TOML would give them; the rehearsal is as small as it can be."""
    table = {
        "batch": {
            "sequence_length": 2048,
            "global_sequences": 256,
            "micro_sequences": 4,
            "target_tokens": 1_000_000_000,
            "precision": "bf16",
        },
        "loss_weights": {"reasoning": 1.0, "final": 1.0},
        "schedule": {"warmup_steps": 100, "shape": "cosine", "final": 0.1},
        "optimizer": params_table()["train"]["optimizer"],
        "seeds": {"model": 1, "data_order": 2},
        "periods": {"save": 250, "evaluate": 100, "router_log": 50},
        "evaluation": {
            "held_out_tokens": 1_048_576,
            "control_rows": 256,
            "prompts": 200,
            "max_new_tokens": 1536,
            "decoding": "greedy",
        },
        "stop": {
            "min_format_validity": 0.95,
            "format_window": 3,
            "flat_improvement": 0.002,
            "flat_window": 5,
            "max_dead": 0.1,
            "max_load": 0.04,
            "alarm_after_steps": 200,
        },
        "packing": "best_fit",
        "teacher": "openai/gpt-oss-120b",
        "later_stages": [
            {
                "name": "stage2",
                "starts_from": "stage1",
                "tokens": 2_000_000_000,
                "objective": "teacher-confidence weighted CE",
                "teacher_gives": "probabilities",
                "data": "new rows",
            },
            {
                "name": "stage3",
                "starts_from": "stage2",
                "tokens": 8_000_000_000,
                "objective": "on-policy distillation",
                "teacher_gives": "scores",
                "data": "prompts",
            },
        ],
        "smoke": STAGE1_SMOKE,
        **changes,
    }
    return Stage1Params.model_validate_json(json.dumps(table))


STAGE1_SMOKE = {
    "steps": 6,
    "sequence_length": 64,
    "global_sequences": 4,
    "micro_sequences": 1,
    "processes": 2,
    "warmup_steps": 1,
    "save": 2,
    "evaluate": 3,
    "router_log": 2,
    "kill_after_step": 3,
    "held_out_tokens": 128,
    "control_rows": 2,
    "answers": 2,
    "max_new_tokens": 3,
    "loss_chunk": 256,
    "threads": 1,
}
