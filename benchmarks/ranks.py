"""Measure a training on several cards of one host beside the same training on one: whole steps, tokens a second.

Place: beside `train`, whose cases and settings these are. One card runs as a build without ranks does, its passes
captured; several run as `vpstore build` runs them where the profile says `ranks = N`. Both see the same rows from the
same random weights, so their losses are held against each other, too.

Use: python -m benchmarks.ranks [--cases NAME …] [--ranks N] [--rows N] [--micro N] [--steps N] [--data SYNTH_KD_FOLDER]
     [--output FILE] [--profile FOLDER]
A case that one card cannot hold has no row for one card, and no ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks.projects import REPOSITORY
from recipes import runtime
from recipes.job import Job
from recipes.recipe import Progress

RESULTS: Final = REPOSITORY / "benchmarks" / "results" / "ranks.json"
THREADS: Final = 8


def carry_out(job: Job, progress: Progress) -> dict[str, Any]:
    """All figures of one case, in this process or in each of the ranks."""
    from dataclasses import replace

    import torch

    from benchmarks.train import BLOCKS, GIB, WARM_UP, _profiled, timed
    from benchmarks.train_sides import CASES, TOKENS, ours

    given = job.params
    case = replace(CASES[given["case"]], micro_rows=given["micro"])
    step, trainer = ours(case, job.sources["data"], rows=given["rows"], steps=steps_of(given["steps"]))
    first = timed(step)
    for _ in range(WARM_UP - 1):
        step()

    def several() -> None:
        for _ in range(given["steps"]):
            step()

    seconds = [timed(several) / given["steps"] for _ in range(BLOCKS)]
    if given["profile"] and trainer.ranks.is_first:
        _profiled(step, Path(given["profile"]) / f"{given['case']}-{job.ranks}.txt")
    elif given["profile"]:
        step()
    return {
        "case": given["case"], "what": case.what, "ranks": job.ranks, "rows": given["rows"],
        "micro_rows": given["micro"], "card": torch.cuda.get_device_name(), "torch": torch.__version__,
        "first_step_s": round(first, 1), "step_s": [round(value, 4) for value in seconds],
        "tokens_per_second": round(given["rows"] * TOKENS / statistics.median(seconds)),
        "memory_gib": round(torch.cuda.max_memory_allocated() / GIB, 1),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 1),
        "losses": [row["loss"] for row in trainer.rows],
    }  # fmt: skip


def steps_of(timed: int) -> int:
    """All steps of a case in which so many are timed at once: the first ones, the blocks, one for the profile."""
    from benchmarks.train import BLOCKS, WARM_UP

    return BLOCKS * timed + WARM_UP + 2


def run_here(given: argparse.Namespace) -> dict[str, Any]:
    """One case with one number of ranks, started from this process."""
    from benchmarks.train_sides import TOKENS, write_random_data

    runtime.fix_numerics(THREADS)
    params = {"case": given.cases[0], "rows": given.rows, "micro": given.micro, "steps": given.steps}
    params["profile"] = str(given.profile) if given.profile else None
    with tempfile.TemporaryDirectory() as scratch:
        data = given.data
        if data is None:
            data = Path(scratch) / "data"
            write_random_data(data, given.rows * TOKENS * steps_of(given.steps))
        job = Job("benchmarks.ranks", params, THREADS, {}, {"data": data}, Path(scratch), ranks=given.ranks)
        if given.ranks == 1:
            return carry_out(job, _silent)
        from recipes.launch import on_ranks

        return on_ranks(carry_out, job, given.ranks, _silent)


def _silent(label: str, done: int, total: int) -> None:
    """Figures are told at the end."""


def beside(one: dict[str, Any], several: dict[str, Any]) -> dict[str, Any]:
    """How many times faster, and how far the losses of equal steps lie apart."""
    pairs = list(zip(one["losses"], several["losses"], strict=False))
    return {
        "case": one["case"],
        "ranks": several["ranks"],
        "times_one_card": round(several["tokens_per_second"] / one["tokens_per_second"], 3),
        "largest_difference_of_losses": max(abs(a - b) for a, b in pairs),
        "steps_compared": len(pairs),
    }


def run_apart(words: list[str]) -> dict[str, Any] | None:
    """A case in a process of its own; None if it failed, and then why is printed."""
    command = [sys.executable, "-m", "benchmarks.ranks", "--here", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **runtime.environment(THREADS)})
    if done.returncode:
        print(json.dumps({"failed": words, "why": done.stderr.strip().splitlines()[-12:]}, indent=1), flush=True)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({key: value for key, value in found.items() if key != "losses"}), flush=True)
    return found


def main() -> None:
    """Run each case on one card and on several, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["moe-40", "moe"], metavar="NAME")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(run_here(given)))
        return
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    common = ["--rows", str(given.rows), "--micro", str(given.micro), "--steps", str(given.steps)]
    for option in ("data", "profile"):
        common += [f"--{option}", str(getattr(given, option))] if getattr(given, option) else []
    for name in given.cases:
        made = (run_apart(["--cases", name, "--ranks", str(ranks), *common]) for ranks in (1, given.ranks))
        found = [row for row in made if row is not None]
        rows += found
        if len(found) == 2:
            ratios.append(beside(*found))
            print(json.dumps(ratios[-1]), flush=True)
        text = json.dumps({"schema": 1, "rows": rows, "beside_one_card": ratios}, indent=1)
        given.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
