"""A disk that fails at one chosen call, and knows what a power cut would take back.

It takes the place of `vpstore.storage.system.disk`. Every call is counted; at the chosen one the process is killed, the
power goes, the call is refused, or a write is short. Beside that it keeps a journal of what no fsync has made durable
yet: names (entries of directories) and bytes (of files that were given a final name). A power cut empties those files
and undoes those names, newest first, or keeps the names: the worst two that POSIX allows.
"""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from vpstore.storage.system import Disk

T = TypeVar("T")

KILLS = ("kill before", "kill after", "power cut", "power cut, names kept")
REFUSALS = ("EIO", "ENOSPC", "full from here on")
WRITES = ("short write", "torn write")  # for calls of write only
KINDS = KILLS + REFUSALS + WRITES
# What NFS, Lustre, SMB or FUSE say of a call that they do not have, each time it is made.
LACKS = (
    "lacks flock ENOLCK", "lacks flock ENOSYS", "lacks flock EOPNOTSUPP", "lacks fsync EINVAL",
    "lacks fchmod EOPNOTSUPP", "lacks rename EINVAL", "lacks rename ENOTEMPTY", "lacks mkdir EMLINK",
    "lacks mkdir ENOSYS",
)  # fmt: skip
_FILLING = {"write", "mkdir", "link", "symlink"}  # what a full disk refuses


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and at which call (1 is the first)."""

    kind: str
    at: int


@dataclass
class Journal:
    """What is not durable yet. `folder` holds second names of what was replaced or removed, on the same file system."""

    folder: Path
    names: list[list[Any]] = field(default_factory=list)  # [directory, how, path, other path, kept copy]
    placed: dict[str, int] = field(default_factory=dict)  # final name -> inode
    durable: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)  # their fsync failed once: the kernel has dropped the pages

    @classmethod
    def load(cls, folder: Path) -> Journal:
        """The journal that an earlier process left, or a new one."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "journal.json"
        if not file.exists():
            return cls(folder)
        names, placed, durable, lost = json.loads(file.read_text())
        return cls(folder, names, placed, set(durable), set(lost))

    def save(self) -> None:
        """Leave it to the next process."""
        document = [self.names, self.placed, sorted(self.durable), sorted(self.lost)]
        (self.folder / "journal.json").write_text(json.dumps(document))

    def keep(self, path: Path) -> str | None:
        """A second name for what is about to lose its name."""
        if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink()):
            return None
        kept = self.folder / os.urandom(8).hex()
        os.link(path, kept, follow_symlinks=False)
        return str(kept)

    def enter(self, how: str, path: Path, other: Path | None = None, kept: str | None = None) -> None:
        """A directory entry has changed."""
        self.names.append([str(path.parent), how, str(path), None if other is None else str(other), kept])

    def directory_synced(self, path: str) -> None:
        """The entries of one directory are durable now."""
        self.names = [row for row in self.names if row[0] != path]

    def cut(self, *, with_names: bool = True) -> None:
        """The power goes: what is not durable is taken back, names too unless they happened to be written."""
        for path, inode in self.placed.items():
            if inode not in self.durable and os.path.isfile(path) and os.stat(path).st_ino == inode:
                os.chmod(path, 0o644)
                os.truncate(path, 0)
        for _, how, path, other, kept in reversed(self.names) if with_names else ():
            match how:
                case "rename" if os.path.lexists(path):
                    os.rename(path, other if not os.path.lexists(other) else self.folder / os.urandom(8).hex())
                case "make" if os.path.lexists(path):
                    os.rename(path, self.folder / os.urandom(8).hex())
                case "rmdir" if os.path.isdir(os.path.dirname(path)) and not os.path.lexists(path):
                    os.mkdir(path)
            if kept is not None and os.path.isdir(os.path.dirname(path)) and not os.path.lexists(path):
                os.rename(kept, path)
        self.names.clear()
        self.placed.clear()


@dataclass
class FaultyDisk(Disk):
    """The real calls, counted, journalled, and one of them spoilt."""

    journal: Journal
    fault: Fault | None = None
    log: list[tuple[str, str, str]] = field(default_factory=list)  # operation, path, second path

    def write(self, descriptor: int, data: memoryview) -> int:
        """write(2)."""
        self.journal.durable.discard(os.fstat(descriptor).st_ino)
        if self._is_now(len(self.log) + 1) and self.fault is not None and self.fault.kind in WRITES:
            self.log.append(("write", _name(descriptor), ""))
            written = super().write(descriptor, data[: max(1, len(data) // 2)])
            if self.fault.kind == "torn write":
                raise _refusal(errno.ENOSPC, _name(descriptor))
            return written
        return self._call(("write", _name(descriptor), ""), lambda: super(FaultyDisk, self).write(descriptor, data))

    def fsync(self, descriptor: int) -> None:
        """fsync(2)."""
        path, inode = _name(descriptor), os.fstat(descriptor).st_ino
        is_folder = os.path.isdir(path)

        def done() -> None:
            if is_folder:
                self.journal.directory_synced(path)
            elif inode not in self.journal.lost:
                self.journal.durable.add(inode)

        try:
            self._call(("fsync", path, ""), lambda: super(FaultyDisk, self).fsync(descriptor), done)
        except OSError:
            if not is_folder:
                self.journal.lost.add(inode)
            raise

    def flock(self, descriptor: int, kind: int) -> None:
        """flock(2); not counted, as it changes nothing."""
        self._refuse_lacking("flock", _name(descriptor))
        super().flock(descriptor, kind)

    def fchmod(self, descriptor: int, mode: int) -> None:
        """fchmod(2); not counted."""
        self._refuse_lacking("fchmod", _name(descriptor))
        super().fchmod(descriptor, mode)

    def _refuse_lacking(self, call: str, path: str) -> None:
        if self.fault is not None and self.fault.kind.startswith(f"lacks {call} "):
            raise _refusal(getattr(errno, self.fault.kind.split()[2]), path)

    def rename(self, source: Path, target: Path) -> None:
        """rename(2)."""
        source, target = _real(source), _real(target)
        kept = self.journal.keep(target)
        self._call(("rename", str(source), str(target)), lambda: super(FaultyDisk, self).rename(source, target),
                   lambda: self._renamed(source, target, kept))  # fmt: skip

    def _renamed(self, source: Path, target: Path, kept: str | None) -> None:
        self.journal.enter("rename", target, source, kept)
        if target.is_file() and not target.is_symlink():
            self.journal.placed[str(target)] = target.stat().st_ino

    def link(self, source: Path, target: Path) -> None:
        """link(2)."""
        source, target = _real(source), _real(target)
        self._call(("link", str(source), str(target)), lambda: super(FaultyDisk, self).link(source, target),
                   lambda: self.journal.enter("make", target))  # fmt: skip

    def symlink(self, text: str, target: Path) -> None:
        """symlink(2)."""
        target = _real(target)
        self._call(("symlink", text, str(target)), lambda: super(FaultyDisk, self).symlink(text, target),
                   lambda: self.journal.enter("make", target))  # fmt: skip

    def mkdir(self, path: Path) -> None:
        """mkdir(2)."""
        path = _real(path)
        self._call(("mkdir", str(path), ""), lambda: super(FaultyDisk, self).mkdir(path),
                   lambda: self.journal.enter("make", path))  # fmt: skip

    def unlink(self, path: Path) -> None:
        """unlink(2)."""
        path = _real(path)
        kept = self.journal.keep(path)
        self._call(("unlink", str(path), ""), lambda: super(FaultyDisk, self).unlink(path),
                   lambda: self.journal.enter("unlink", path, None, kept))  # fmt: skip

    def rmdir(self, path: Path) -> None:
        """rmdir(2)."""
        path = _real(path)
        self._call(("rmdir", str(path), ""), lambda: super(FaultyDisk, self).rmdir(path),
                   lambda: self.journal.enter("rmdir", path))  # fmt: skip

    def _is_now(self, number: int) -> bool:
        return self.fault is not None and number == self.fault.at

    def _call(self, entry: tuple[str, str, str], real: Callable[[], T], done: Callable[[], None] = lambda: None) -> T:
        self.log.append(entry)
        fault, number = self.fault, len(self.log)
        self._refuse_lacking(entry[0], entry[2] or entry[1])
        if fault is not None and fault.kind == "full from here on" and number >= fault.at and entry[0] in _FILLING:
            raise _refusal(errno.ENOSPC, entry[2] or entry[1])
        if not self._is_now(number) or fault is None or fault.kind in ("full from here on", *WRITES, *LACKS):
            result = real()
            done()
            return result
        if fault.kind == "kill before":
            self._die()
        if fault.kind.startswith("power cut"):
            self.journal.cut(with_names=fault.kind == "power cut")
            self._die()
        if fault.kind == "kill after":
            with suppress(FileNotFoundError):  # the removal of what may be there
                real()
                done()
            self._die()
        raise _refusal(getattr(errno, fault.kind), entry[2] or entry[1])

    def _die(self) -> NoReturn:
        self.journal.save()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("killed processes do not go on")


def _refusal(code: int, path: str) -> OSError:
    return OSError(code, os.strerror(code), path)


def _real(path: Path) -> Path:
    """The name of a path that was given by the descriptor of its folder: the journal outlives the process."""
    return Path(os.path.realpath(path.parent), path.name) if str(path).startswith("/proc/self/fd/") else path


def _name(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)")
