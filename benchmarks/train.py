"""Measure training at the locked shapes on one GPU: ours beside stock `transformers`, whole steps.

Place: beside `full_shape_chain`, which carries the stages out; this times the loop in them. Every case runs in a
process of its own, so that no other's memory or compiled kernels are in the way, one after the other in one call on
one card.

A step is what the Trainer does: a batch of rows of 2,048 tokens to the device, forward, backward, clipping,
optimizer, its row in the record. The stock side is `transformers`' Qwen3 of the same hidden size, depth, heads and
matrix sizes (its gated feed-forward gets two thirds of the width, so that the products cost the same), under bfloat16
autocast, with SDPA, layers compiled, cross-entropy in chunks whose scores are made again in the backward pass, and
fused AdamW.

Use: python -m benchmarks.train [--cases NAME …] [--rows N] [--steps N] [--data SYNTH_KD_FOLDER] [--output FILE]
     [--no-table] [--profile FOLDER]
The cases with experts read the tokens of `synth_kd`, all others draw ids at random.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.projects import REPOSITORY
from recipes import runtime
from recipes.data.batches import AlignedDataset
from recipes.data.megatron_dataset import IndexedDatasetWriter
from recipes.model.config import MoeConfig, StudentConfig
from recipes.model.transformer import Student
from recipes.params.training import TrainingParams
from recipes.train.loop import Scratch, Trainer
from recipes.train.state import Identity

TOKENS: Final = 2048
WARM_UP: Final = 3
RESULTS: Final = REPOSITORY / "benchmarks" / "results" / "train.json"
PAGE: Final = REPOSITORY / "docs" / "FULL_SIZE.md"
BEGIN: Final = "<!-- training: begin, written by python -m benchmarks.train -->"
END: Final = "<!-- training: end -->"
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
    rows: int | None = None  # of a step, where the usual number does not fit


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
    table: dict[str, Any] | None = None,
) -> TrainingParams:
    """A run of one micro-batch a step, at the profile's settings; or that of a table which says everything."""
    rates = dict.fromkeys(("embedding_rate", "head_rate", "vector_rate"), 3e-4)
    rates |= {"matrix_rate": 0.004, "frequency_rate": 1e-3, "residual_rate": 1e-3}
    made = {
        "steps": steps, "sequence_length": tokens, "sequences": rows, "micro_sequences": rows, "seed": 1,
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


def ours(case: Case, folder: Path, *, rows: int, steps: int) -> tuple[Callable[[], None], Trainer]:
    """The loop's own step."""
    assert case.config is not None
    with torch.device("meta"):
        model = Student(case.config)
    model = model.to_empty(device="cuda")
    model.draw(torch.Generator("cuda").manual_seed(1))
    with torch.no_grad():  # what `draw` leaves to constructors
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.fill_(1.0)
    params = training_params(precision=case.precision, rows=rows, steps=steps, recompute=case.recompute)
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


def peak_flops() -> float:
    """What this card does on one large bfloat16 product, operations a second."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return 2 * 8192.0**3 / statistics.median(times[5:])


def timed(step: Callable[[], None]) -> float:
    """Seconds of one step, its work on the device included."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def run_case(name: str, *, rows: int, steps: int, data: Path | None, profile: Path | None) -> dict[str, Any]:
    """All figures of one case, in this process."""
    runtime.fix_numerics(8)
    case, peak = CASES[name], peak_flops()
    rows = case.rows or rows
    trainer = None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        if case.config is None:
            step = stock(case, rows=rows)
        else:
            if case.config.moe is not None and data is not None:
                folder = data
            else:
                write_random_data(folder, rows * TOKENS * (steps + WARM_UP + 2))
            step, trainer = ours(case, folder, rows=rows, steps=steps + WARM_UP + 2)
        first = timed(step)
        for _ in range(WARM_UP - 1):
            step()
        seconds = [timed(step) for _ in range(steps)]
        if profile is not None:
            _profiled(step, profile / f"{name}.txt")
    rate = rows * TOKENS / statistics.median(seconds)
    operations = operations_a_token(case.config) if case.config else None
    return {
        "case": name, "what": case.what, "card": torch.cuda.get_device_name(), "torch": torch.__version__,
        "rows": rows, "first_step_s": round(first, 1), "step_s": [round(value, 4) for value in seconds],
        "tokens_per_second": round(rate), "peak_tflops": round(peak / 1e12),
        "share_of_peak": None if operations is None else round(rate * operations / peak, 3),
        "memory_gib": round(torch.cuda.max_memory_allocated() / (1 << 30), 1),
        "optimizer_s": None if trainer is None else round(_optimizer_seconds(trainer), 4),
        "loss": None if trainer is None else [round(row["loss"], 4) for row in trainer.rows],
    }  # fmt: skip


def _optimizer_seconds(trainer: Trainer) -> float:
    for weight in trainer.optimizer.weights.values():
        weight.grad = torch.full_like(weight, 1e-6)
    return statistics.median(timed(lambda: trainer.optimizer.step(0.0)) for _ in range(3))


def _profiled(step: Callable[[], None], path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
        torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
    path.write_text(table, encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """The part of docs/FULL_SIZE.md that is written by the machine."""
    found = {row["case"]: row for row in rows}
    head = rows[0]
    lines = [
        f"One {head['card']}, torch {head['torch']}; rows of {TOKENS} tokens, medians; a large bfloat16 product ran at "
        f"{statistics.median(row['peak_tflops'] for row in rows):.0f} TFLOP/s.",
        "",
        "| what | rows a step | tokens/s | beside stock | share of peak | memory | optimizer | first step |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        beside = found.get(CASES[row["case"]].beside or "")
        ratio = f"{row['tokens_per_second'] / beside['tokens_per_second']:.2f}" if beside else ""
        share = f"{100 * row['share_of_peak']:.0f}%" if row["share_of_peak"] is not None else ""
        update = row["optimizer_s"]
        part = "" if update is None else f"{100 * update / statistics.median(row['step_s']):.0f}%"
        lines.append(
            f"| {row['what']} | {row['rows']} | {row['tokens_per_second']:,} | {ratio} | {share} | "
            f"{row['memory_gib']} GiB | {part} | {row['first_step_s']:.0f} s |"
        )
    return "\n".join(lines)


def write_table(text: str) -> None:
    """Put the table between its marks."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Run the cases one after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--no-table", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        found = run_case(given.cases[0], rows=given.rows, steps=given.steps, data=given.data, profile=given.profile)
        print(json.dumps(found))
        return
    rows = []
    for name in given.cases:
        command = [sys.executable, "-m", "benchmarks.train", "--here", "--cases", name, "--rows", str(given.rows)]
        command += ["--steps", str(given.steps)]
        for option in ("data", "profile"):
            command += [f"--{option}", str(getattr(given, option))] if getattr(given, option) else []
        environment = {**os.environ, **runtime.environment(8)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            rows_text = done.stderr.strip().splitlines()[-12:]
            print(json.dumps({"case": name, "failed": rows_text}, indent=1), flush=True)
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
        given.output.write_text(json.dumps({"schema": 1, "cases": rows}, indent=1) + "\n", encoding="utf-8")
    if rows and not given.no_table:
        write_table(table(rows))


if __name__ == "__main__":
    main()
