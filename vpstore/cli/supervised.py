"""A command in a process of its own, watched by one that cannot be ended by the project's code.

Place in the path: `main` calls this before anything heavy is imported, so a fork costs milliseconds. A recipe may end
its process in ways that Python never hears of: `os._exit(0)`, a C library's `exit(0)`, a handler of a signal. The exit
code would then be 0, the pointer the old one, and DVC would book the new params as done.
Invariants: the exit code is 0 only if the command itself said so as its last act; a signal that ends the child ends the
parent likewise; a signal sent to the parent alone reaches the child, and one from the terminal reaches it once; the
child does not outlive the parent; signals that were ignored stay so.

Example:
    sys.exit(supervise(lambda: run(given), ended=report))
"""

from __future__ import annotations

import gc
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, Final

from vpstore.errors import VpstoreError

# Signals that end a process, and those that people use to tell a program something.
_PASSED_ON: Final = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT")
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Bytes of the shared memory: how often SIGINT was passed on; whether the exit code has been said; the exit code.
_PASSED, _IS_SAID, _CODE = range(3)
_PAIR_SECONDS: Final = 5.0  # between the two ways of one signal, on a machine that is busy
_DIE_WITH_PARENT: Final = 1  # PR_SET_PDEATHSIG


def supervise(act: Callable[[], int], *, ended: Callable[[str], int]) -> int:
    """Do something in a child, and leave with its exit code.

    Args:    act: gives the exit code; ended: called in this process with what was found, if the child ended, not by a
             signal, before `act` did; gives the exit code then.
    Returns: the exit code, in the child alone; where the system has no such signals, `act` is done in this process.
    Raises:  VpstoreError: the system starts no process.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return act()
    heard = _heard()
    on_child = signal.getsignal(signal.SIGCHLD)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, its end would be told to nobody
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*heard, signal.SIGCHLD})
    shared = mmap.mmap(-1, 3)  # memory of both processes: no descriptor that the project's code could close or write to
    _flush()
    gc.freeze()  # what a collection does not touch, the two processes go on sharing: this saves 20 ms a command
    parent, child = os.getpid(), _fork()
    if child == 0:
        _die_with(parent)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _Interrupt(shared))
        signal.signal(signal.SIGCHLD, on_child if on_child is not None else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return _saying(act, shared)
    code = os.waitstatus_to_exitcode(_wait(child, heard, shared))
    said = shared[_CODE] if shared[_IS_SAID] else None
    if code < 0:
        code = _end_by(-code)
    elif said is None:
        code = ended(f"exit status {code}")
    _flush()
    os._exit(code or said or 0)  # there is nothing to tidy up, and that takes Python 10 ms


def _fork() -> int:
    try:
        return os.fork()
    except OSError as error:
        next_step = "raise the limit on processes (ulimit -u), or wait until fewer run"
        raise VpstoreError("no process can be started", found=str(error.strerror), next_step=next_step) from error


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # a stream that is closed is None
            stream.flush()


def _heard() -> set[signal.Signals]:
    """What is passed on: not what is ignored, as by `nohup` or in the background of a shell."""
    known = (signal.Signals[name] for name in _PASSED_ON)
    return {number for number in known if signal.getsignal(number) is not signal.SIG_IGN}


# In the child.


def _die_with(parent: int) -> None:
    """Be killed when the parent is; on Linux, as nothing else has a way."""
    if sys.platform != "linux":
        return
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before that
        os.kill(os.getpid(), signal.SIGKILL)


class _Interrupt:
    """Python's own answer to SIGINT, once a signal: a second one would break off the tidying up of the first.

    What a process sends to the group comes twice, directly and through the parent, in whichever order. The parent
    counts what it passes on before it does, so the two can be told apart and paired. All that a terminal sends counts.
    """

    def __init__(self, shared: mmap.mmap) -> None:
        self._shared, self._seen = shared, 0
        self._alone = {True: -_PAIR_SECONDS, False: -_PAIR_SECONDS}  # passed on or not: when one came without the other

    def __call__(self, number: int, frame: Any) -> None:
        is_passed = self._shared[_PASSED] != self._seen
        self._seen = self._shared[_PASSED]
        now = time.monotonic()
        if now - self._alone[not is_passed] < _PAIR_SECONDS:
            self._alone[not is_passed] = -_PAIR_SECONDS
            return
        self._alone[is_passed] = now
        signal.default_int_handler(number, frame)


def _saying(act: Callable[[], int], shared: mmap.mmap) -> int:
    """Do it, and say the exit code; a process that the project's code forked and let run on to here says nothing."""
    process, code = os.getpid(), 1
    try:
        code = act()
    finally:
        if os.getpid() == process:
            shared[_CODE] = code
            shared[_IS_SAID] = 1
    return code


# In the parent.


def _wait(child: int, heard: Collection[signal.Signals], shared: mmap.mmap) -> int:
    """Wait for the child and pass signals on; its status."""

    def pass_on(number: int) -> None:
        if number == signal.SIGINT:
            shared[_PASSED] = (shared[_PASSED] + 1) % 256
        os.kill(child, number)
        if number in _ENDING:  # a child that is stopped hears of it only then
            os.kill(child, signal.SIGCONT)

    # What came before the fork, whoever sent it, the child knows nothing of.
    while early := signal.sigtimedwait(heard, 0):
        pass_on(early.si_signo)
    while True:
        found = signal.sigwaitinfo({*heard, signal.SIGCHLD})
        if found.si_signo == signal.SIGCHLD:
            process, status = os.waitpid(child, os.WNOHANG)
            if process == child:
                return status
        # The terminal sends to the whole group; that it is gone it may tell the leader alone.
        elif found.si_code <= 0 or found.si_signo == signal.SIGHUP:
            pass_on(found.si_signo)


def _end_by(number: int) -> int:
    """End as the child did, without another core file; an exit code for a process that signals do not end."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with suppress(OSError):  # SIGKILL has no handler to be put back
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    return 128 + number
