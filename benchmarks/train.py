"""Measure training at the locked shapes on one GPU: ours beside stock `transformers`, whole steps.

Place: beside `full_shape_chain`, which carries the stages out; this times the loop in them. Every case runs in a
process of its own, so that no other's memory or compiled kernels are in the way, one after the other in one call on
one card.

A step is what the Trainer does: a batch of rows of 2,048 tokens to the device, forward, backward, clipping,
optimizer, its row in the record. Steps are timed a few at a time, as a run makes them: the host prepares one while the
card works at the last. The stock side is `transformers`' Qwen3 of the same hidden size, depth, heads and
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
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.projects import REPOSITORY
from benchmarks.train_sides import CASES, TOKENS, operations_a_token, ours, stock, write_random_data
from recipes import runtime
from recipes.train.loop import Trainer
from recipes.train.memory import step_memory

GIB: Final = 1 << 30
WARM_UP: Final = 3
BLOCKS: Final = 3  # timed, of `--steps` steps each
RESULTS: Final = REPOSITORY / "benchmarks" / "results" / "train.json"
PAGE: Final = REPOSITORY / "docs" / "FULL_SIZE.md"
BEGIN: Final = "<!-- training: begin, written by python -m benchmarks.train -->"
END: Final = "<!-- training: end -->"


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
    rows, total, trainer = case.rows or rows, BLOCKS * steps + WARM_UP + 2, None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        if case.config is None:
            step = stock(case, rows=rows)
        else:
            if case.config.moe is not None and data is not None:
                folder = data
            else:
                write_random_data(folder, rows * TOKENS * total)
            step, trainer = ours(case, folder, rows=rows, steps=total)
        first = timed(step)
        for _ in range(WARM_UP - 1):
            step()
        seconds = [timed(partial(_repeat, step, steps)) / steps for _ in range(BLOCKS)]
        if profile is not None:
            _profiled(step, profile / f"{name}.txt")
    rate = rows * TOKENS / statistics.median(seconds)
    operations = operations_a_token(case.config) if case.config else None
    return {
        "case": name, "what": case.what, "card": torch.cuda.get_device_name(), "torch": torch.__version__,
        "rows": rows, "first_step_s": round(first, 1), "step_s": [round(value, 4) for value in seconds],
        "tokens_per_second": round(rate), "peak_tflops": round(peak / 1e12),
        "share_of_peak": None if operations is None else round(rate * operations / peak, 3),
        "memory_gib": round(torch.cuda.max_memory_allocated() / GIB, 1),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 1),
        "estimate_gib": None if trainer is None else round(_estimate(trainer) / GIB, 1),
        "optimizer_s": None if trainer is None else round(_optimizer_seconds(trainer), 4),
        "loss": None if trainer is None else [round(row["loss"], 4) for row in trainer.rows],
    }  # fmt: skip


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


def _estimate(trainer: Trainer) -> int:
    """Bytes that are asked for before the first step: the weights, and what a step takes."""
    weights = sum(weight.numel() * weight.element_size() for weight in trainer.model.parameters())
    return weights + step_memory(trainer.model, trainer.params).total


def _optimizer_seconds(trainer: Trainer) -> float:
    """A step of the optimizer on small gradients, which lie where the captured step reads them."""
    for weight in trainer.optimizer.weights.values():
        if weight.grad is not None:
            weight.grad.fill_(1e-6)

    def step() -> None:
        trainer.optimizer.prepare(0.0)
        trainer.optimizer.step(0.0)

    return statistics.median(timed(step) for _ in range(3))


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
