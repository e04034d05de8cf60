"""Measure orthogonal matching pursuit beside mergekit's `batch_omp`, on a GPU and on two cores.

Place: beside `full_shape_chain`, which carries the whole stage out. A case is one dictionary; both sides solve the same
targets in one process, in turns, after one round that counts for nothing. Cases run one after the other, each in a
process of its own.

Rows are normal, the worst case for a screen as no atom stands out, or *structured*: a spectrum that falls, a common
part, lengths that differ, rounded to bfloat16 as a checkpoint's are. Two numeric settings on a CPU: `plain`, as a
process finds it, and `recipe`, under which stages compute (decisions/0011). mergekit is never a dependency: the folder
that `--mergekit` names is an environment made for this and thrown away, or holds its `tokensurgeon/omp.py` alone.

Where the two sides differ, float64 decides who is right: the algorithm as it is written down, for every such target.

Use: python -m benchmarks.surgery --mergekit FOLDER [--device cuda] [--cases NAME ...] [--rounds N] [--output FILE]
     [--no-table]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.projects import REPOSITORY
from recipes import runtime
from recipes.ops.omp import Dictionary, Solution
from recipes.tensors import read_safetensors

RESULTS: Final = REPOSITORY / "benchmarks" / "results" / "surgery.json"
PAGE: Final = REPOSITORY / "docs" / "FULL_SIZE.md"
BEGIN: Final = "<!-- surgery: begin, written by python -m benchmarks.surgery -->"
END: Final = "<!-- surgery: end -->"
K: Final = 64
ANCHORS, TARGETS, WIDTH = 98_863, 101_135, 2880  # of the two real vocabularies
THREADS: Final = 2


@dataclass(frozen=True)
class Case:
    """One dictionary, and how many targets each side solves of it."""

    device: str
    atoms: int
    width: int
    targets: int
    theirs: int = 0  # 0: ours alone
    rows: str = "normal"
    numerics: str = "plain"


CASES: Final = {
    **{
        f"gpu, batches of {count}": Case("cuda", ANCHORS, WIDTH, count, min(count, 1024)) for count in (512, 1024, 4096)
    },
    "gpu, structured rows": Case("cuda", ANCHORS, WIDTH, 4096, 512, rows="structured"),
    "gpu, atoms on the host": Case("cuda", ANCHORS, WIDTH, 1024, 0, rows="structured"),
    "gpu, both matrices": Case("cuda", ANCHORS, WIDTH, TARGETS, 0, rows="structured"),
    "cpu, 20,000 x 1024": Case("cpu", 20_000, 1024, 1024, 256),
    "cpu, 20,000 x 1024, recipe": Case("cpu", 20_000, 1024, 1024, 256, numerics="recipe"),
    "cpu, 50,000 x 2880": Case("cpu", 50_000, WIDTH, 512, 128),
    "cpu, 50,000 x 2880, recipe": Case("cpu", 50_000, WIDTH, 512, 128, numerics="recipe"),
    "cpu, full size": Case("cpu", ANCHORS, WIDTH, 256, 32),
}


def mergekit(folder: Path) -> Callable[..., Any]:
    """Its `batch_omp`, from that one file: the package itself asks for much that this does not need."""
    found = next(iter(sorted(folder.rglob("tokensurgeon/omp.py"))), None)
    if found is None:
        raise SystemExit(f"{folder} holds no mergekit/tokensurgeon/omp.py")
    for name in ("mergekit", "mergekit.tokensurgeon"):
        sys.modules[name] = package = types.ModuleType(name)
        package.__path__ = [str(found.parent)]
    spec = importlib.util.spec_from_file_location("mergekit.tokensurgeon.omp", found)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.batch_omp


def rows_of(case: Case, count: int, seed: int) -> torch.Tensor:
    """Rows of a case, on its device."""
    generator = torch.Generator(case.device).manual_seed(seed)
    plain = torch.randn(count, case.width, generator=generator, device=case.device)
    if case.rows == "normal":
        return plain
    fixed = torch.Generator(case.device).manual_seed(0)
    mix = torch.randn(case.width, case.width, generator=fixed, device=case.device)
    mix *= torch.arange(1, case.width + 1, device=case.device)[:, None] ** -0.5
    length = 0.3 + torch.rand(count, 1, generator=generator, device=case.device)
    return (plain.mul_(length) @ mix + 0.5).bfloat16().float()


@dataclass
class Side:
    """Rounds of one side, in ms a target."""

    wall: list[float]
    cpu: list[float]  # of all threads: what another process on these cores does is not in it

    def add(self, work: Callable[[], Any], targets: int, device: str) -> Any:
        """Time one round; what it gave."""
        began = time.process_time()
        seconds, found = timed(work, device)
        self.wall.append(round(1000 * seconds / targets, 4))
        self.cpu.append(round(1000 * (time.process_time() - began) / targets, 4))
        return found


def timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds, work on the card included, and what it gave."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    found = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, found


def reference_support(atoms_ND: torch.Tensor, target_D: torch.Tensor) -> list[int]:
    """The algorithm as it is written down, in float64: largest inner product, least squares on the support, repeat."""
    chosen: list[int] = []
    residual_D = target_D
    for _ in range(K):
        scores_N = torch.cat([(part.double() @ residual_D).abs() for part in atoms_ND.split(16384)])
        scores_N[chosen] = -1
        chosen.append(int(scores_N.argmax()))
        basis_DS = atoms_ND[chosen].double().T
        residual_D = target_D - basis_DS @ torch.linalg.lstsq(basis_DS, target_D[:, None]).solution[:, 0]
    return chosen


def run_case(name: str, *, folder: Path, rounds: int, checked: int) -> dict[str, Any]:
    """All figures of one case, in this process."""
    case = CASES[name]
    if case.numerics == "recipe":
        runtime.fix_numerics(THREADS)
    if case.device == "cpu":
        torch.set_num_threads(THREADS)
    theirs = mergekit(folder)
    atoms_ND, targets_BD = rows_of(case, case.atoms, 1), rows_of(case, case.targets, 2)
    where = {"device": "cuda"} if case.device == "cuda" else {}
    if name == "gpu, atoms on the host":
        from recipes.ops import omp_cuda

        omp_cuda.free_bytes = lambda device: 1 << 30  # as if the card had no more
        atoms_ND = atoms_ND.cpu()
    prepared, dictionary = timed(lambda: Dictionary(atoms_ND, **where), case.device)
    first, found = timed(lambda: dictionary.solve(targets_BD, atoms=K), case.device)
    ours, batch_omp = Side([], []), Side([], [])
    their_support: torch.Tensor | None = None
    if case.theirs:
        theirs(targets_BD[:16], atoms_ND, K)
    for _ in range(rounds):
        found = ours.add(lambda: dictionary.solve(targets_BD, atoms=K), case.targets, case.device)
        if case.theirs:
            work = partial(theirs, targets_BD[: case.theirs], atoms_ND, K)
            their_support, _ = batch_omp.add(work, case.theirs, case.device)
    figures = {
        "case": name, "what": f"{case.atoms:,} x {case.width}, {case.rows} rows",
        "card": torch.cuda.get_device_name() if case.device == "cuda" else f"cpu, {THREADS} threads",
        "torch": torch.__version__, "route": dictionary.route, "numerics": case.numerics, "targets": case.targets,
        "ours_ms": ours.wall, "theirs_ms": batch_omp.wall, "ours_cpu_ms": ours.cpu, "theirs_cpu_ms": batch_omp.cpu,
        "prepare_s": round(prepared, 2), "first_s": round(first, 2), **shares(found),
        "host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20), 1),
    }  # fmt: skip
    if case.device == "cuda":
        figures["card_gib"] = round(torch.cuda.max_memory_allocated() / (1 << 30), 1)
    if their_support is not None:
        figures |= compared(found.support_BK[: case.theirs], their_support, atoms_ND, targets_BD, checked)
    return figures


def shares(found: Solution) -> dict[str, float]:
    """Of the choices, those that float64 made among a few atoms, and those that took a look at all."""
    tally = found.tally
    return {"ranked": round(tally.ranked / tally.steps, 4), "settled": round(tally.settled / tally.steps, 6)}


def compared(
    ours_BK: torch.Tensor, theirs_BK: torch.Tensor, atoms_ND: torch.Tensor, targets_BD: torch.Tensor, checked: int
) -> dict[str, Any]:
    """How many supports agree; where they do not, and for some where they do, what float64 says."""
    is_equal_B = (ours_BK == theirs_BK).all(1)
    differing = (~is_equal_B).nonzero()[:, 0].tolist()
    rows = differing[:checked] + is_equal_B.nonzero()[:checked, 0].tolist()
    exact = {row: reference_support(atoms_ND, targets_BD[row].double()) for row in rows}
    return {
        "supports_equal": f"{int(is_equal_B.sum())} of {len(is_equal_B)}",
        "ours_as_float64": f"{sum(exact[row] == ours_BK[row].tolist() for row in rows)} of {len(rows)}",
        "theirs_as_float64": f"{sum(exact[row] == theirs_BK[row].tolist() for row in rows)} of {len(rows)}",
    }


def both_matrices(name: str) -> dict[str, Any]:
    """Two matrices from a file, all targets of both, results to files: what the stage does of it."""
    from safetensors.torch import save_file

    case = CASES[name]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "reference.safetensors"
        save_file(
            {space: rows_of(case, ANCHORS + TARGETS, seed).bfloat16().cpu() for seed, space in enumerate("eh")}, path
        )
        parts: dict[str, float] = {"read": 0.0, "prepare": 0.0, "solve": 0.0, "write": 0.0}
        started, tallies = time.perf_counter(), []
        for space in "eh":
            spent, matrix_VD = timed(lambda space=space: read_safetensors(path)[space], case.device)
            parts["read"] += spent
            spent, dictionary = timed(lambda m=matrix_VD: Dictionary(m[:ANCHORS], device="cuda"), case.device)
            parts["prepare"] += spent
            for first in range(ANCHORS, len(matrix_VD), 8192):
                span = matrix_VD[first : first + 8192]
                spent, found = timed(lambda span=span, d=dictionary: d.solve(span, atoms=K), case.device)
                parts["solve"] += spent
                values = {"support": found.support_BK.int().cpu(), "coefficients": found.coefficients_BK.float().cpu()}
                spent, _ = timed(
                    lambda v=values, a=first, s=space: save_file(v, Path(scratch) / f"{s}-{a}.safetensors"), case.device
                )
                parts["write"] += spent
                tallies.append(found.tally)
        whole = time.perf_counter() - started
    steps = sum(tally.steps for tally in tallies)
    return {
        "case": name, "what": f"2 x {TARGETS:,} targets, {case.atoms:,} x {case.width}, {case.rows} rows",
        "card": torch.cuda.get_device_name(), "torch": torch.__version__, "targets": 2 * TARGETS,
        "ours_ms": [round(1000 * whole / (2 * TARGETS), 4)], "theirs_ms": [], "whole_s": round(whole, 1),
        "parts_s": {part: round(value, 2) for part, value in parts.items()},
        "ranked": round(sum(tally.ranked for tally in tallies) / steps, 4),
        "settled": round(sum(tally.settled for tally in tallies) / steps, 6),
        "host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20), 1),
        "card_gib": round(torch.cuda.max_memory_allocated() / (1 << 30), 1),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The part of docs/FULL_SIZE.md that is written by the machine."""
    lines = [
        "| case | ours, ms a target | `batch_omp` | times faster | by time of cores | ranked | settled | the same | "
        "memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ours = statistics.median(row["ours_ms"])
        span = f" ({min(row['ours_ms']):.3g} to {max(row['ours_ms']):.3g})" if len(row["ours_ms"]) > 1 else ""
        theirs, faster, by_cores = "", "", ""
        if row["theirs_ms"]:
            median = statistics.median(row["theirs_ms"])
            theirs = f"{median:.3g} ({min(row['theirs_ms']):.3g} to {max(row['theirs_ms']):.3g})"
            faster = f"{median / ours:.1f}"
            if row["card"].startswith("cpu"):
                by_cores = f"{statistics.median(row['theirs_cpu_ms']) / statistics.median(row['ours_cpu_ms']):.1f}"
        memory = f"{row['card_gib']} GiB of the card" if "card_gib" in row else f"{row['host_gib']} GiB"
        lines.append(
            f"| {row['case']} ({row['card']}) | {ours:.3g}{span} | {theirs} | {faster} | {by_cores} | "
            f"{100 * row['ranked']:.0f}% | {100 * row['settled']:.2f}% | {row.get('supports_equal', '')} | {memory} |"
        )
    return "\n".join(lines)


def write_table(text: str) -> None:
    """Put the table between its marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    """Run the cases of a device one after the other; figures of cases that are not run stay in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checked", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--no-table", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.cases or [name for name, case in CASES.items() if case.device == given.device]
    if given.here:
        whole = names[0] == "gpu, both matrices"
        options = {"folder": given.mergekit, "rounds": given.rounds, "checked": given.checked}
        print(json.dumps(both_matrices(names[0]) if whole else run_case(names[0], **options)))
        return
    known = json.loads(given.output.read_text(encoding="utf-8"))["cases"] if given.output.exists() else []
    found = {row["case"]: row for row in known}
    for name in names:
        command = [sys.executable, "-m", "benchmarks.surgery", "--here", "--cases", name]
        command += ["--mergekit", str(given.mergekit), "--rounds", str(given.rounds), "--checked", str(given.checked)]
        environment = dict(os.environ)
        if CASES[name].numerics == "recipe":
            environment |= runtime.environment(THREADS)  # before torch is imported
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(json.dumps({"case": name, "failed": done.stderr.strip().splitlines()[-12:]}, indent=1), flush=True)
            continue
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(found[name]), flush=True)
        ordered = [found[each] for each in CASES if each in found]
        given.output.write_text(json.dumps({"schema": 1, "cases": ordered}, indent=1) + "\n", encoding="utf-8")
    if found and not given.no_table:
        write_table(table([found[each] for each in CASES if each in found]))


if __name__ == "__main__":
    main()
