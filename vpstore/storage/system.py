"""The system calls that change a disk, behind one object.

Place in the path: under `atomic`, which is under everything else. Nothing but this module calls the operating system to
write, make durable, rename, link or remove; a test puts another object in the place of `disk`, which kills the process
or refuses at the n-th call, and so reaches every point at which a machine can fail.
Invariants: one method a system call, no policy; `disk` is replaced only by tests.

Example:
    system.disk.fsync(descriptor)
"""

from __future__ import annotations

import os
from pathlib import Path


class Disk:
    """The real calls."""

    def write(self, descriptor: int, data: memoryview) -> int:
        """write(2): may write less than it was given."""
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        """fsync(2), of a file or a directory."""
        os.fsync(descriptor)

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

    def rmdir(self, path: Path) -> None:
        """rmdir(2)."""
        os.rmdir(path)


disk: Disk = Disk()
