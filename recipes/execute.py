"""Carries a recipe out: intermediates, tensors, files, gates; resumable, in any order, in any number of processes.

Place in the path: recipe -> tensors -> **here** -> publish. It moves bytes but decides none, so it is not part of a
code closure: the digests come out the same whatever the order, the number of processes and the interruptions.

What is in the scratch folder, all of it safe to find again after a kill:
    intermediates/NN-<name>.safetensors    whole or absent
    shards/, shards.done/, files/          see recipes.tensors.ShardWriter; files are written anew each time

Example:
    >>> staged = carry_out(Job("recipes.expand_depth", params, threads, inputs, sources, scratch), progress)
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes import config, runtime
from recipes.recipe import Context, InputArtifact, Plan, PlannedFile, PlannedTensor, Progress, Report, json_file
from vpstore.errors import GateMissed, RecipeRefused, UsageError, VpstoreError

if TYPE_CHECKING:
    from torch import Tensor

    from recipes.tensors import ShardWriter

WORKERS_VARIABLE = "VPSTORE_WORKERS"  # processes that compute a plan's tensors; does not decide bytes


@dataclass(frozen=True)
class Job:
    """One build, as plain values that a worker process can be given."""

    entry: str
    params: Mapping[str, Any]
    threads: int
    inputs: Mapping[str, InputArtifact]
    sources: Mapping[str, Path]
    scratch: Path
    intermediates: Mapping[str, Path] = field(default_factory=dict)

    def context(self, progress: Progress) -> Context:
        """What the recipe sees."""
        model = config.params_model(self.entry)
        params = config.validated(model, self.params, where=self.entry)
        return Context(params, self.inputs, self.sources, self.scratch, progress, self.intermediates)

    def recipe(self) -> Any:
        """The recipe's module, imported under fixed numerics."""
        runtime.fix_numerics(self.threads)
        return importlib.import_module(self.entry)


@dataclass(frozen=True)
class Made:
    """Where the finished files lie: name in the artifact -> (media type, path), and the intermediates."""

    files: Mapping[str, tuple[str, Path]]
    intermediates: Mapping[str, Path]
    report: Report


def carry_out(job: Job, progress: Progress, *, order: Callable[[list[str]], list[str]] = sorted) -> Made:
    """Run a recipe to the end and hold its result against its gates.

    Args:    order: in which order a plan's tensors are computed; the result does not depend on it.
    Raises:  RecipeRefused, GateMissed: with the figures; what was computed stays in the scratch folder.
    """
    recipe = job.recipe()
    if hasattr(recipe, "run"):
        result = recipe.run(job.context(progress))
        tensors = [_finished(name, value) for name, value in sorted(result.tensors.items())]
        made = _stage(job, Plan(tensors, result.files), progress, order)
        report = result.report
    else:
        job = replace(job, intermediates=compute_intermediates(recipe, job, progress))
        plan = recipe.plan(job.context(progress))
        made = _stage(job, plan, progress, order)
        report = plan.report or Report()
    if hasattr(recipe, "check"):
        from recipes.tensors import TensorReader

        report = _joined(report, recipe.check(job.context(progress), TensorReader(job.scratch / "shards")))
    refuse_missed(job.entry, report)
    reports = report_files(report)
    _refuse_twice([*made, *(file.name for file in reports)])
    return Made({**made, **write_files(job.scratch / "files", reports)}, job.intermediates, report)


def _finished(name: str, value: Tensor) -> PlannedTensor:
    from recipes.tensors import DTYPE_NAMES

    if value.dtype not in DTYPE_NAMES:
        next_step = "cast it in the recipe to one of " + ", ".join(DTYPE_NAMES.values())
        raise RecipeRefused("no shard can hold this dtype", where=name, found=str(value.dtype), next_step=next_step)
    return PlannedTensor(name, DTYPE_NAMES[value.dtype], tuple(value.shape), lambda: value)


def compute_intermediates(recipe: Any, job: Job, progress: Progress) -> dict[str, Path]:
    """A recipe's intermediates, in their order; files that an interrupted build left are taken up."""
    if not hasattr(recipe, "intermediates"):
        return {}
    from recipes.tensors import write_safetensors

    folder = job.scratch / "intermediates"
    folder.mkdir(parents=True, exist_ok=True)
    steps = recipe.intermediates(job.context(progress))
    _refuse_twice([step.name for step in steps])
    done: dict[str, Path] = {}
    for number, step in enumerate(steps):
        progress("intermediates", number, len(steps))
        path = folder / f"{number:03d}-{step.name}.safetensors"
        if not path.exists():
            write_safetensors(path, step.compute(dict(done)))
        done[step.name] = path
    return done


def _stage(
    job: Job, plan: Plan, progress: Progress, order: Callable[[list[str]], list[str]]
) -> dict[str, tuple[str, Path]]:
    from recipes.names import INDEX_FILE
    from recipes.tensors import ShardWriter

    _refuse_twice([t.name for t in plan.tensors])
    writer = ShardWriter(job.scratch / "shards", plan.tensors)
    files = [*plan.files, *([json_file(INDEX_FILE, writer.index())] if plan.tensors else [])]
    _refuse_twice([*writer.shards(), *(f.name for f in files)])
    _refuse_full_disk(job.scratch, writer.size_bytes)
    writer.prepare()
    # What a training has made is at hand and cheap to write; only a plan's tensors are worth finding again.
    is_kept = writer.is_done if hasattr(job.recipe(), "plan") else lambda name: False
    missing = [t.name for t in plan.tensors if not is_kept(t.name)]
    _compute(job, plan, writer, order(missing), progress)
    found = {shard: ("application/vnd.safetensors", writer.directory / shard) for shard in writer.shards()}
    return {**found, **write_files(job.scratch / "files", files)}


def _compute(job: Job, plan: Plan, writer: ShardWriter, names: Sequence[str], progress: Progress) -> None:
    workers, total, kept = min(_workers(), len(names)), len(plan.tensors), len(plan.tensors) - len(names)
    if workers > 1 and not hasattr(job.recipe(), "run"):
        for done in _in_processes(job, [list(names[i::workers]) for i in range(workers)]):
            kept += done
            progress("tensors", kept, total)
        return
    by_name = {t.name: t for t in plan.tensors}
    for number, name in enumerate(names):
        progress("tensors", kept + number, total)
        writer.write(name, by_name[name].compute())


def _workers() -> int:
    found = os.environ.get(WORKERS_VARIABLE, "1")
    if not (found.isascii() and found.isdigit() and int(found) > 0):
        next_step = "unset it, or give it a whole number from 1 on: as many processes as memory allows"
        raise UsageError("not a number of processes", where=WORKERS_VARIABLE, found=repr(found), next_step=next_step)
    return int(found)


def _in_processes(job: Job, shares: Sequence[Sequence[str]]) -> Iterator[int]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(shares), spawn, initializer=_leave_with_parent) as pool:
        try:
            for done in as_completed([pool.submit(compute_share, job, share) for share in shares]):
                yield done.result()
        except BrokenProcessPool as error:
            raise VpstoreError(
                "a process that computed tensors was killed",
                where=job.entry,
                found="most often the system ran out of memory",
                next_step=f"build again with a smaller {WORKERS_VARIABLE}: what is finished is kept",
            ) from error


def _leave_with_parent() -> None:
    """A killed build must not leave processes behind that hold memory and wait for work for ever."""

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def compute_share(job: Job, names: Sequence[str]) -> int:
    """Compute some of a plan's tensors into the shards of the scratch folder: the work of one process.

    Returns: how many were computed.
    Raises:  RecipeRefused: as for the whole plan.
    """
    recipe = job.recipe()
    from recipes.tensors import ShardWriter

    plan: Plan = recipe.plan(job.context(lambda label, done, total: None))
    writer = ShardWriter(job.scratch / "shards", plan.tensors)
    by_name = {t.name: t for t in plan.tensors}
    for name in names:
        writer.write(name, by_name[name].compute())
    return len(names)


def write_files(folder: Path, files: Sequence[PlannedFile]) -> dict[str, tuple[str, Path]]:
    """Write files beside the shards."""
    made: dict[str, tuple[str, Path]] = {}
    for planned in files:
        path = folder / planned.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            planned.write(out)
        made[planned.name] = (planned.media_type, path)
    return made


def report_files(report: Report) -> list[PlannedFile]:
    """metrics.json, always, and one file a plot, under reports/.

    Raises:  RecipeRefused: a figure that JSON cannot say, or a gate twice.
    """
    _refuse_twice([gate.name for gate in report.gates])
    gates = {
        gate.name: {
            "value": gate.value,
            "relation": gate.relation,
            "threshold": gate.threshold,
            "verdict": gate.verdict,
            **({"reason": gate.reason} if gate.reason else {}),
        }
        for gate in report.gates
    }
    metrics = {**report.metrics, **({"gates": gates} if gates else {})}
    values = {"metrics": metrics, **{name: list(rows) for name, rows in sorted(report.plots.items())}}
    _refuse_twice(["metrics", *report.plots])
    return [_report_file(f"reports/{name}.json", value) for name, value in values.items()]


def _report_file(name: str, value: Any) -> PlannedFile:
    try:
        return json_file(name, value)
    except (TypeError, ValueError) as error:
        raise RecipeRefused(
            "a recipe reports a figure that JSON cannot say",
            where=name,
            expected="finite numbers and strings",
            found=str(error),
            next_step="look for NaN or infinity in what the recipe measured; nothing was published",
        ) from error


def refuse_missed(entry: str, report: Report) -> None:
    """Raise if a gate is on the wrong side of its threshold.

    Raises:  GateMissed: every missed gate with its figure.
    """
    missed = [gate for gate in report.gates if gate.verdict == "missed"]
    if missed:
        raise GateMissed(
            f"{len(missed)} of {len(report.gates)} gates missed: nothing was published",
            where=entry,
            expected="; ".join(f"{g.name} {g.relation} {g.threshold:g}" for g in missed),
            found="; ".join(f"{g.name} = {g.value:g}" for g in missed),
            next_step="change the config or the parent and build again; the state is kept in the scratch folder",
        )


def _joined(first: Report, second: Report) -> Report:
    _refuse_twice([*first.metrics, *second.metrics])
    _refuse_twice([*first.plots, *second.plots])
    return Report({**first.metrics, **second.metrics}, [*first.gates, *second.gates], {**first.plots, **second.plots})


def _refuse_twice(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise RecipeRefused("a recipe yields a name twice", where=name, next_step="mend the recipe's plan")
        seen.add(name)


def _refuse_full_disk(folder: Path, needed: int) -> None:
    already = sum(p.stat().st_blocks * 512 for p in (folder / "shards").glob("*"))
    free = shutil.disk_usage(folder).free + already
    if needed > free:
        raise VpstoreError(
            "the disk is too full for this artifact",
            where=str(folder),
            expected=f"{needed:,} bytes free",
            found=f"{free:,} bytes free",
            next_step="free some space, or point VPSTORE_ROOT at a larger disk; what is finished is kept",
        )
