"""Carries a recipe out: intermediates, tensors, files, gates; resumable, in any order, in any number of processes.

Place in the path: recipe -> tensors -> **here** -> publish. All bytes go through it, so it is in each code closure; the
digests come out the same whatever the order, the number of processes and the interruptions.

What is in the scratch folder, all of it safe to find again after a kill:
    intermediates/NN-<name>.safetensors    whole or absent
    shards/, shards.done/, files/          see recipes.tensors.ShardWriter; files are written anew each time

Example:
    >>> staged = carry_out(Job("recipes.expand_depth", params, threads, inputs, sources, scratch), progress)
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from recipes import launch
from recipes.job import Job
from recipes.outputs import refuse_twice, report_files, write_files
from recipes.planned import PlannedTensor
from recipes.recipe import Plan, PlanRecipe, Progress, Report, RunRecipe, json_file, refuse_missed
from vpstore.errors import RecipeRefused, UsageError, VpstoreError

if TYPE_CHECKING:
    from torch import Tensor

    from recipes.shards import ShardWriter

WORKERS_VARIABLE = "VPSTORE_WORKERS"  # processes that compute a plan's tensors; does not decide bytes
_MOST_THREADS = 16  # each holds some pieces of PIECE_BYTES in several dtypes


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
    if job.ranks > 1:
        return launch.on_ranks(_carry_out_on_rank, replace(job, ranks=1), job.ranks, progress)
    recipe = job.recipe()
    if isinstance(recipe, RunRecipe):
        result = recipe.run(job.context(progress))
        tensors = [_finished(name, value) for name, value in sorted(result.tensors.items())]
        plan = Plan(tensors, result.files, result.report)
    else:
        job = replace(job, intermediates=compute_intermediates(recipe, job, progress))
        plan = recipe.plan(job.context(progress))
    writer = _laid_out(job, plan)
    names = [tensor.name for tensor in plan.tensors]
    if isinstance(recipe, RunRecipe):
        # What a training has made is at hand and cheap to write; only a plan's tensors are worth finding again.
        compute(plan, writer, order(names), progress)
    else:
        _compute_missing(job, plan, writer, order([name for name in names if not writer.is_done(name)]), progress)
    made = staged_files(job, plan, writer)
    report = plan.report or Report()
    if isinstance(recipe, PlanRecipe) and recipe.check is not None:
        from recipes.tensors import TensorReader

        report = _joined(report, recipe.check(job.context(progress), TensorReader(writer.directory)))
    refuse_missed(report.gates, where=job.entry)
    reports = report_files(report)
    refuse_twice([*made, *(file.name for file in reports)])
    return Made({**made, **write_files(job.scratch / "files", reports)}, job.intermediates, report)


def _carry_out_on_rank(job: Job, progress: Progress) -> Made:
    """Every rank runs the recipe; the first one writes what came out, and what the others give is not looked at."""
    from recipes.train.ranks import ranks_here

    if ranks_here().is_first:
        return carry_out(job, progress)
    recipe = job.recipe()
    assert isinstance(recipe, RunRecipe)  # nothing else runs on ranks
    refuse_missed(recipe.run(job.context(progress)).report.gates, where=job.entry)
    return Made({}, {}, Report())


def _finished(name: str, value: Tensor) -> PlannedTensor:
    from recipes.tensors import DTYPE_NAMES

    if value.dtype not in DTYPE_NAMES:
        next_step = "cast it in the recipe to one of " + ", ".join(DTYPE_NAMES.values())
        raise RecipeRefused("no shard can hold this dtype", where=name, found=str(value.dtype), next_step=next_step)
    return PlannedTensor(name, DTYPE_NAMES[value.dtype], tuple(value.shape), lambda: value)


def compute_intermediates(recipe: PlanRecipe, job: Job, progress: Progress) -> dict[str, Path]:
    """A recipe's intermediates, in their order; files that an interrupted build left are taken up."""
    from recipes.tensors import write_safetensors

    folder = job.scratch / "intermediates"
    folder.mkdir(parents=True, exist_ok=True)
    steps = recipe.intermediates(job.context(progress))
    refuse_twice([step.name for step in steps])
    done: dict[str, Path] = {}
    for number, step in enumerate(steps):
        progress("intermediates", number, len(steps))
        path = folder / f"{number:03d}-{step.name}.safetensors"
        if not path.exists():
            write_safetensors(path, step.compute(dict(done)))
        done[step.name] = path
    return done


def _laid_out(job: Job, plan: Plan) -> ShardWriter:
    """Shards of the plan's full size on the disk, once its names and its size are seen to be possible."""
    from recipes.names import INDEX_FILE
    from recipes.shards import ShardWriter

    refuse_twice([t.name for t in plan.tensors])
    writer = ShardWriter(job.scratch / "shards", plan.tensors)
    refuse_twice([*writer.shards(), *(f.name for f in plan.files), *([INDEX_FILE] if plan.tensors else [])])
    _refuse_full_disk(job.scratch, writer.size_bytes)
    writer.prepare()
    return writer


def _compute_missing(job: Job, plan: Plan, writer: ShardWriter, names: Sequence[str], progress: Progress) -> None:
    workers, kept = min(_workers(), len(names)), len(plan.tensors) - len(names)
    if workers <= 1:
        compute(plan, writer, names, progress, kept=kept)
        return
    for done in _in_processes(job, [list(names[i::workers]) for i in range(workers)]):
        kept += done
        progress("tensors", kept, len(plan.tensors))


def compute(plan: Plan, writer: ShardWriter, names: Sequence[str], progress: Progress, *, kept: int = 0) -> None:
    """Compute these of a plan's tensors in this process: those without rows in this order, the others beside them.

    Threads that compute rows have the intra-op threads of the process: sums inside them come out as anywhere else.
    Args:    kept: how many were computed before, for the progress.
    Raises:  RecipeRefused: another tensor than was planned.
    """
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    done, telling = count(kept + 1), threading.Lock()

    def work(name: str) -> None:
        writer.write(name, by_name[name].value())
        with telling:
            progress("tensors", next(done), kept + len(names))

    in_pieces = [name for name in names if by_name[name].rows is not None]
    with ThreadPoolExecutor(_threads()) as pool:
        beside = [pool.submit(work, name) for name in in_pieces]
        try:
            for name in names:
                if by_name[name].rows is None:
                    work(name)
            for one in beside:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _threads() -> int:
    """Tensors that this process computes at a time, in pieces: what the cores allow, shared with its siblings."""
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // _workers()))


def staged_files(job: Job, plan: Plan, writer: ShardWriter) -> dict[str, tuple[str, Path]]:
    """The shards, and beside them the plan's files and the index, written now."""
    from recipes.names import INDEX_FILE

    index = [json_file(INDEX_FILE, writer.index())] if plan.tensors else []
    found = {shard: ("application/vnd.safetensors", writer.directory / shard) for shard in writer.shards()}
    return {**found, **write_files(job.scratch / "files", [*plan.files, *index])}


def _workers() -> int:
    found = os.environ.get(WORKERS_VARIABLE, "1")
    if not (found.isascii() and found.isdigit() and int(found) > 0):
        next_step = "unset it, or give it a whole number from 1 on: as many processes as memory allows"
        raise UsageError("not a number of processes", where=WORKERS_VARIABLE, found=repr(found), next_step=next_step)
    return int(found)


def _in_processes(job: Job, shares: Sequence[Sequence[str]]) -> Iterator[int]:
    with ProcessPoolExecutor(len(shares), multiprocessing.get_context("spawn"), initializer=_leave_with_parent) as pool:
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


def _silent(label: str, done: int, total: int) -> None:
    """One process of many has nothing to tell: the parent counts for all."""


def compute_share(job: Job, names: Sequence[str]) -> int:
    """Compute some of a plan's tensors into the shards of the scratch folder: the work of one process.

    Returns: how many were computed.
    Raises:  RecipeRefused: as for the whole plan.
    """
    from recipes.shards import ShardWriter

    recipe = job.recipe()
    assert isinstance(recipe, PlanRecipe)  # nothing else is shared out
    plan = recipe.plan(job.context(_silent))
    compute(plan, ShardWriter(job.scratch / "shards", plan.tensors), names, _silent)
    return len(names)


def _joined(first: Report, second: Report) -> Report:
    refuse_twice([*first.metrics, *second.metrics])
    refuse_twice([*first.plots, *second.plots])
    return Report({**first.metrics, **second.metrics}, [*first.gates, *second.gates], {**first.plots, **second.plots})


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
