"""Several processes on this host that train one model together: the one place that starts ranks.

Place in the path: execute -> **launch** -> a recipe's `run` in each rank. torch's elastic agent, which is what torchrun
runs, starts them, watches them, and ends the others when one fails. Beyond one host, training is Megatron's part:
docs/STAGE1.md.

Invariants: every rank gets the same job; what a rank refuses is what the build refuses, word for word; the first rank's
result is the build's.

Example:
    made = on_ranks(carry_out, job, 2, progress)
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from recipes import runtime
from recipes.job import Job
from recipes.recipe import Progress
from vpstore.errors import UsageError, VpstoreError

_T = TypeVar("_T")
_FOLDER = "ranks"  # in the scratch folder
_PROGRESS, _ERROR, _TRACE = "progress", "error-", "trace-"
_LOOK_SECONDS = 0.5
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def on_ranks(work: Callable[[Job, Progress], _T], job: Job, ranks: int, progress: Progress) -> _T:
    """`work(job, progress)` in each of `ranks` processes; what the first one gives.

    Args:    work: a function of a module; it finds the process group ready.
    Raises:  UsageError: more ranks than GPUs; what a rank raised; VpstoreError: a rank died.
    """
    runtime.fix_numerics(job.threads)  # before torch is imported, here and, by the environment, in the ranks
    if runtime.device() == "cuda" and runtime.gpus() < ranks:
        raise UsageError(
            "there are fewer GPUs than ranks",
            where="runtime.ranks of the profile",
            expected=f"at most {runtime.gpus()}",
            found=str(ranks),
            next_step="lower runtime.ranks; it is in no key",
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("", ".elastic.agent.server.api", ".elastic.multiprocessing.api"):  # what failed is said below
        logging.getLogger(f"torch.distributed{name}").setLevel(logging.CRITICAL)
    folder = job.scratch / _FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        local_addr="localhost", max_restarts=0, start_method="spawn", run_id=str(os.getpid()),
    )  # fmt: skip
    try:
        with _passed_on(folder / _PROGRESS, progress), _handlers_kept():
            found: dict[int, _T] = elastic_launch(config, _rank)(work, job, folder)
    except SignalException as error:  # the agent has ended the ranks
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise _ended(job, error.sigval) from error
    except ChildFailedError as error:
        rank, exitcode = _first(error)
        # What a killed rank does to the others is theirs to complain of, and not what went wrong.
        fault = None if exitcode < 0 else _broke(job, folder)
        raise _told(folder) or fault or _death(job, rank, exitcode) from error
    shutil.rmtree(folder, ignore_errors=True)
    return found[0]


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """The agent sets handlers of its own, and leaves them."""
    before = {number: signal.getsignal(number) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rank(work: Callable[[Job, Progress], _T], job: Job, folder: Path) -> _T | None:
    """What runs in each process."""
    runtime.fix_numerics(job.threads)
    import torch
    import torch.distributed as dist

    is_on_gpu, rank = runtime.device() == "cuda", int(os.environ["RANK"])
    try:
        if is_on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if is_on_gpu else "gloo")
        result = work(job, _noted_in(folder / _PROGRESS) if rank == 0 else _silent)
        dist.destroy_process_group()
    except VpstoreError as error:
        (folder / f"{_ERROR}{rank}").write_bytes(pickle.dumps(error))
        raise SystemExit(1) from error  # without waiting for the others, who may wait for this one
    except Exception as error:  # a fault of the code, not of what it was given: nothing else would tell of it
        (folder / f"{_TRACE}{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        raise SystemExit(1) from error
    return result if rank == 0 else None


def _silent(label: str, done: int, total: int) -> None:
    """The first rank tells."""


def _noted_in(path: Path) -> Progress:
    def note(label: str, done: int, total: int) -> None:
        beside = path.with_suffix(".new")
        beside.write_text(f"{done} {total} {label}", encoding="utf-8")
        beside.replace(path)

    return note


@contextmanager
def _passed_on(path: Path, progress: Progress) -> Iterator[None]:
    """Tell what the first rank notes, until the block ends."""
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(_LOOK_SECONDS):
            if path.exists():
                done, total, label = path.read_text(encoding="utf-8").split(" ", 2)
                progress(label, int(done), int(total))

    watcher = threading.Thread(target=look, name="progress of ranks", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def _told(folder: Path) -> VpstoreError | None:
    """What the lowest of the ranks that refused said."""
    for path in sorted(folder.glob(f"{_ERROR}*")):
        error: VpstoreError = pickle.loads(path.read_bytes())
        return error
    return None


def _broke(job: Job, folder: Path) -> VpstoreError | None:
    """What the lowest of the ranks that broke left behind."""
    for path in sorted(folder.glob(f"{_TRACE}*")):
        return VpstoreError(
            "a rank of a training broke, and the others were ended",
            where=f"{job.entry}, rank {path.name.removeprefix(_TRACE)}",
            found=path.read_text(encoding="utf-8").strip().splitlines()[-1],
            next_step=f"its traceback is in {path}; the state that was saved last is kept",
        )
    return None


def _first(error: BaseException) -> tuple[int, int]:
    """The rank that somebody killed, if one was (the agent ends the others by SIGTERM); else the first that failed."""
    failures: dict[int, Any] = error.failures  # type: ignore[attr-defined]
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            return rank, failure.exitcode
    rank, failure = error.get_first_failure()  # type: ignore[attr-defined]
    return rank, failure.exitcode


def _ended(job: Job, number: int) -> VpstoreError:
    return VpstoreError(
        "a training was ended from outside, and so were its ranks",
        where=job.entry,
        found=signal.Signals(number).name,
        next_step="build again: the training goes on from the state that was saved last",
    )


def _death(job: Job, rank: int, exitcode: int) -> VpstoreError:
    return VpstoreError(
        "a rank of a training died, and the others were ended",
        where=f"{job.entry}, rank {rank}",
        found=f"signal {-exitcode}; most often the system ran out of memory"
        if exitcode < 0
        else f"exit code {exitcode}",
        next_step="build again: the training goes on from the state that was saved last",
    )
