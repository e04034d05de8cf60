"""The two sides that `train` times: the students through the loop, and stock `transformers` by stock parts.

Place: below `train` and `precision`. What is measured is written here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from recipes.data.batches import AlignedDataset
from recipes.data.megatron_dataset import IndexedDatasetWriter
from recipes.model.config import MoeConfig, StudentConfig
from recipes.model.transformer import Student
from recipes.params.training import TrainingParams
from recipes.train.loop import Scratch, Trainer
from recipes.train.state import Identity

TOKENS: Final = 2048
_STOCK_WIDTH: Final = 344  # two thirds of 512, rounded up to what matrix units take


@dataclass(frozen=True)
class Case:
    """One model and how it is trained."""

    what: str
    config: StudentConfig | None = None  # None: stock
    layers: int = 0
    precision: str = "bfloat16"
    recompute: bool = False
    beside: str | None = None  # the case that its figure is held against
    rows: int | None = None  # of a step, where that is not the usual number
    micro_rows: int | None = None  # of a micro-batch; None: the step is one


def _config(attention: Any, layers: int, *, experts: int = 0) -> StudentConfig:
    moe = MoeConfig(num_experts=experts) if experts else None
    return StudentConfig(hidden_size=1024, num_layers=layers, ffn_hidden_size=512, attention=attention, moe=moe)


CASES: Final = {
    "compat": Case("vpDense0-5_28 compat", _config("gqa", 28), beside="stock-28"),
    "real": Case("vpDense0-5_28 real", _config("tpa", 28), beside="stock-28"),
    "stock-28": Case("stock Qwen3, 28 layers", layers=28),
    "dense": Case("vpDense, 80 layers", _config("tpa", 80), beside="stock-80"),
    "stock-80": Case("stock Qwen3, 80 layers", layers=80),
    "moe-20": Case("vpMoE, 20 of its 80 layers", _config("tpa", 20, experts=256)),
    "moe-40": Case("vpMoE, 40 of its 80 layers", _config("tpa", 40, experts=256)),
    "moe": Case("vpMoE, all 80 layers", _config("tpa", 80, experts=256), rows=4),
    "moe-step": Case(
        "vpMoE, all 80 layers, the profile's step", _config("tpa", 80, experts=256), rows=48, micro_rows=4
    ),
    "moe-recompute": Case("vpMoE, all 80 layers, recomputed", _config("tpa", 80, experts=256), recompute=True),
    "compat-float32": Case(
        "vpDense0-5_28 compat in float32", _config("gqa", 28), precision="float32", beside="stock-28"
    ),
}


def training_params(
    *,
    precision: str = "bfloat16",
    rows: int = 8,
    steps: int = 8,
    tokens: int = TOKENS,
    recompute: bool = False,
    micro_rows: int | None = None,
    table: dict[str, Any] | None = None,
) -> TrainingParams:
    """A run of one micro-batch a step, at the profile's settings; or that of a table which says everything."""
    rates = dict.fromkeys(("embedding_rate", "head_rate", "vector_rate"), 3e-4)
    rates |= {"matrix_rate": 0.004, "frequency_rate": 1e-3, "residual_rate": 1e-3}
    made = {
        "steps": steps, "sequence_length": tokens, "sequences": rows, "micro_sequences": micro_rows or rows, "seed": 1,
        "save_every_steps": max(1, steps - 1), "precision": precision, "recompute": recompute,
        "schedule": {"warmup_steps": 1, "shape": "cosine", "final": 0.1},
        "optimizer": {
            **rates, "matrix_decay": 0.01, "table_decay": 0.0, "clip_norm": 1.0, "orthogonal_dtype": precision,
        },
        "loss": {"kind": "plain", "chunk": 8192}, "spikes": {"window": 8, "factor": 2.0},
    }  # fmt: skip
    return TrainingParams.model_validate_json(json.dumps(table or made))


def write_random_data(folder: Path, tokens: int) -> None:
    """A data set of rows of random ids, each one document."""
    generator = np.random.default_rng(1)
    (folder / "train").mkdir(parents=True)
    rows = generator.integers(0, 199_998, (tokens // TOKENS, TOKENS), dtype=np.int32)
    ones, zeros = np.ones(TOKENS, np.uint8), np.zeros(TOKENS, np.uint8)
    ones[-1] = 0
    for part, dtype in (("tokens", np.int32), ("lossmask", np.uint8), ("span", np.uint8)):
        with IndexedDatasetWriter(folder / "train" / f"text_{part}", dtype) as writer:
            for row in rows:
                writer.add_document({"tokens": row, "lossmask": ones, "span": zeros}[part])


def operations_a_token(config: StudentConfig) -> float:
    """Floating-point operations of forward and backward, a token: twice a multiplication, three passes.

    Recomputed activations are not counted; attention over the visible half of the row, or the window.
    """
    with torch.device("meta"):
        model = Student(config)
    total = sum(p.numel() for p in model.parameters() if p.ndim > 1) - model.model.embed_tokens.weight.numel()
    if config.moe is not None:
        stacks = [p.numel() for name, p in model.named_parameters() if "experts.fc" in name and name.endswith("weight")]
        total -= sum(stacks) * (1 - config.moe.top_k / config.moe.num_experts)
    width = config.num_query_heads * config.head_dim
    windows = [config.layer_window(number) or TOKENS / 2 for number in range(1, config.num_layers + 1)]
    return 6.0 * total + 12.0 * width * sum(windows)


def drawn_on(config: StudentConfig, device: str) -> Student:
    """A student of random weights, drawn where it lies."""
    with torch.device("meta"):
        model = Student(config)
    model = model.to_empty(device=device)
    model.draw(torch.Generator(device).manual_seed(1))
    with torch.no_grad():  # what `draw` leaves to constructors
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.fill_(1.0)
    return model


def ours(case: Case, folder: Path, *, rows: int, steps: int) -> tuple[Callable[[], None], Trainer]:
    """The loop's own step."""
    assert case.config is not None
    model = drawn_on(case.config, "cuda")
    params = training_params(
        precision=case.precision, rows=rows, steps=steps, recompute=case.recompute, micro_rows=case.micro_rows
    )
    identity = Identity({}, params.model_dump(mode="json"))
    trainer = Trainer(model, params, AlignedDataset(folder, "train"), Scratch(folder / "state", identity))
    model.train()
    batches = trainer.batches()

    def step() -> None:
        if trainer.train_step(next(batches)) is None:
            raise SystemExit(f"a step was refused: {trainer.record['stopped']}")
        trainer.step += 1

    return step, trainer


def stock(case: Case, *, rows: int) -> Callable[[], None]:
    """The same step by stock parts."""
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=201088, hidden_size=1024, num_hidden_layers=case.layers, intermediate_size=_STOCK_WIDTH,
        num_attention_heads=8, num_key_value_heads=2, head_dim=128, tie_word_embeddings=False, use_cache=False,
        attn_implementation="sdpa", max_position_embeddings=TOKENS,
    )  # fmt: skip
    torch.use_deterministic_algorithms(False)  # stock does not ask for them
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config)
    model.train()
    for layer in model.model.layers:
        layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    head = model.lm_head.weight
    ids = torch.randint(0, 199_998, (rows, TOKENS + 1), device="cuda")

    def chunk_loss(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(functional.linear(hidden, head).float(), labels, reduction="sum")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state.flatten(0, 1)
            labels = ids[:, 1:].flatten()
            parts = zip(hidden.split(4096), labels.split(4096), strict=True)
            loss = sum(checkpoint(chunk_loss, *part, use_reentrant=False) for part in parts) / labels.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        float(loss)

    return step
