"""The system calls that change a disk, behind one object.

Place in the path: under `atomic`, which is under everything else. Nothing but this module calls the operating system to
write, make durable, rename, link, lock, remove or change the mode of a path; a test puts another object in the place of
`disk`, which kills the process or refuses at the n-th call, and so reaches every point at which a machine can fail.
Invariants: one method a system call, no policy; a refusal names the file, also where the call has only its descriptor;
`disk` is replaced only by tests.

Example:
    system.disk.fsync(descriptor)
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

_RANGE_WRITE: Final = 2  # SYNC_FILE_RANGE_WRITE: begin to write what is dirty, wait for nothing


class Disk:
    """The real calls."""

    def write(self, descriptor: int, data: memoryview) -> int:
        """write(2): may write less than it was given."""
        with _naming(descriptor):
            return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        """fsync(2), of a file or a directory."""
        with _naming(descriptor):
            os.fsync(descriptor)

    def flock(self, descriptor: int, kind: int) -> None:
        """flock(2)."""
        with _naming(descriptor):
            fcntl.flock(descriptor, kind)

    def fchmod(self, descriptor: int, mode: int) -> None:
        """fchmod(2)."""
        with _naming(descriptor):
            os.fchmod(descriptor, mode)

    def begin_writing(self, descriptor: int, start: int, size_bytes: int) -> None:
        """sync_file_range(2), where there is one: the disk may begin with these bytes now. A hint, no promise.

        Args:    size_bytes: from `start` on; 0: to the end of the file. What goes wrong is told by the fsync to come.
        """
        if (call := _sync_file_range()) is not None:
            call(descriptor, start, size_bytes, _RANGE_WRITE)

    def rename(self, source: Path, target: Path) -> None:
        """rename(2): replaces the target."""
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """link(2)."""
        os.link(source, target)

    def symlink(self, text: str, target: Path) -> None:
        """symlink(2)."""
        os.symlink(text, target)

    def unlink(self, path: Path) -> None:
        """unlink(2)."""
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """mkdir(2), under the umask."""
        os.mkdir(path)

    def chmod(self, path: Path, mode: int) -> None:
        """chmod(2)."""
        os.chmod(path, mode)

    def rmdir(self, path: Path) -> None:
        """rmdir(2)."""
        os.rmdir(path)


@contextmanager
def _naming(descriptor: int) -> Iterator[None]:
    """Let a refusal say which file it is about: the kernel was told a number."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            with suppress(OSError):  # no /proc
                error.filename = os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)")
        raise


@cache
def _sync_file_range() -> Callable[..., Any] | None:
    """The C library's function; Python has none."""
    import ctypes  # only those who write much need it

    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):  # not Linux
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


disk: Disk = Disk()
