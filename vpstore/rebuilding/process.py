"""The process of one run: forked where that is safe, else started anew, and in either case alone with its tree.

Place in the path: under `running`, which converses with it. A fork costs 5 ms, and a start 150; but a process with
threads, or with torch in it under its own numerics, must not be forked.
Invariants: the process is in a session of its own, so that what is meant for it is passed on once; it has none of the
checkout's modules, and of the files that this one holds open only the two pipes; it is killed at the end.

Example:
    with started(job, module_path) as process: process.tell(line); process.hear()
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, NoReturn

from vpstore.rebuilding import worker
from vpstore.rebuilding.worker import Job

_LOOK_SECONDS: Final = 0.2
_THREADS: Final = "/proc/self/task"


class Process:
    """A process by its id and its two pipes."""

    def __init__(self, pid: int, given: int, said: int) -> None:
        self.pid, self._given, self._said = pid, given, said
        self._code: int | None = None

    def tell(self, data: bytes) -> None:
        """Write all of some bytes to it.

        Raises:  BrokenPipeError: it has ended.
        """
        left = memoryview(data)
        while left:
            left = left[os.write(self._given, left) :]

    def hear(self) -> bytes:
        """What it says next; nothing once it ended or closed its end, whoever else has that open."""
        while not select.select([self._said], [], [], _LOOK_SECONDS)[0]:
            if self._look(os.WNOHANG):
                return b""
        return os.read(self._said, 1 << 16)

    def wait(self) -> int:
        """Its exit code; negative: the signal that ended it."""
        while not self._look(0):
            pass
        assert self._code is not None
        return self._code

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if not self._look(os.WNOHANG):
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _look(self, how: int) -> bool:
        """Whether it has ended."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, how)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code is not None

    def close(self) -> None:
        """Kill it if it lives, and let go of the pipes."""
        self.send_signal(signal.SIGKILL)
        self.wait()
        for end in (self._given, self._said):
            os.close(end)


@contextmanager
def started(job: Job, path: Sequence[str]) -> Iterator[Process]:
    """A process that does a job.

    Args:    path: its module path.
    """
    to_read, given = os.pipe()
    said, to_write = os.pipe()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it takes none before it can answer one
    try:
        pid = _begun(job, path, to_read, to_write)
    except BaseException:
        os.close(given)
        os.close(said)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(to_read)
        os.close(to_write)
    process = Process(pid, given, said)
    try:
        yield process
    finally:
        process.close()


def _begun(job: Job, path: Sequence[str], to_read: int, to_write: int) -> int:
    is_alone = _is_alone()
    if is_alone and "torch" not in sys.modules:
        return _forked(job, path, to_read, to_write)
    try:
        return _spawned(job, path, to_read, to_write)
    except PermissionError:  # this user may not run this Python, only go on in it
        if not is_alone:
            raise
        return _forked(job, path, to_read, to_write)


def _is_alone() -> bool:
    """Whether this process has one thread, of whatever library, so that a fork of it can go on."""
    try:
        return len(os.listdir(_THREADS)) == 1
    except OSError:  # not Linux
        return False


def _spawned(job: Job, path: Sequence[str], to_read: int, to_write: int) -> int:
    environment = {**os.environ, **job.prepared.variables, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-P", "-m", worker.__name__]
    process = subprocess.Popen(
        command, cwd=job.scratch, env=environment, stdin=to_read, stdout=to_write, start_new_session=True
    )
    process.returncode = 0  # it is waited for by its id
    return process.pid


def _forked(job: Job, path: Sequence[str], to_read: int, to_write: int) -> int:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError, ValueError):  # one that is closed
            stream.flush()
    pid = os.fork()
    if pid == 0:
        _be_worker(job, path, to_read, to_write)
    return pid


def _be_worker(job: Job, path: Sequence[str], to_read: int, to_write: int) -> NoReturn:
    """Become, in a fork, what a start would have given."""
    code = 1
    try:
        gc.freeze()  # what the other process holds open is not this one's to close
        os.setsid()
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(to_read, 0)
        os.dup2(to_write, 1)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.chdir(job.scratch)
        os.environ.update({**job.prepared.variables, "PYTHONPATH": os.pathsep.join(path)})
        sys.path[:] = path
        _forget(str(os.path.realpath(job.root)))
        worker.main()
        code = 0
    except SystemExit:
        pass
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def _forget(root: str) -> None:
    """Drop the modules of the checkout, so that they are imported again, from the tree."""
    for name, module in list(sys.modules.items()):
        known = getattr(module, "__dict__", {})  # torch has modules that make up whatever attribute they are asked for
        places = [known.get("__file__"), *(known.get("__path__") or ())]
        if name.partition(".")[0] in ("vpstore", "__main__"):  # this program runs itself
            continue
        if any(os.path.realpath(place).startswith(root + os.sep) for place in places if place):
            del sys.modules[name]
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
