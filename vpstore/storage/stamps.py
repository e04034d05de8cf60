"""Stat stamps: which files were already found to have which digest.

Place in the path: beside the blobs. Hashing twelve gigabytes to print one path would make `resolve` useless, so a
file whose device, inode, size, mtime_ns and ctime_ns are the ones at its last verification is taken as unchanged, for
at most MAX_AGE seconds. The stamps are one person's own (their cache directory), never part of a shared store.
Invariants: ctime cannot be set back by chmod, touch or cp, so damage with mode and mtime restored voids a stamp; a file
that changed less than RACY_NS before it was looked at gets none; losing the stamps costs time and nothing else.

Example:
    stamps = Stamps(); stamps.holds(path, digest) or (verify(path), stamps.record(path, digest))
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import sqlite3

MAX_AGE: Final = 7 * 24 * 3600
RACY_NS: Final = 50_000_000  # kernels stamp files by a tick of up to 10 ms
COARSE_RACY_NS: Final = 2_000_000_000  # file systems without sub-second times
_SCHEMA: Final = """
create table if not exists stamps (
    device integer, inode integer, digest text, size integer, mtime_ns integer, ctime_ns integer, verified_at integer,
    primary key (device, inode, digest)
) without rowid
"""


class Stat(NamedTuple):
    """What identifies an unchanged file."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> Stat:
        """The stamp fields of a file (links are followed)."""
        found = os.stat(path)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def is_settled(self, now_ns: int) -> bool:
        """Whether a change from now on would show in the times."""
        margin = COARSE_RACY_NS if self.ctime_ns % 1_000_000_000 == 0 else RACY_NS
        return now_ns - self.ctime_ns > margin


def cache_directory() -> Path:
    """This person's cache: XDG_CACHE_HOME/vpstore, else ~/.cache/vpstore.

    Somebody without a home, as a user of a mere number in a container is, is given a path at which nothing can be:
    there are no stamps then, as with a home that cannot be written.
    """
    base, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    if os.path.isabs(base):
        return Path(base) / "vpstore"
    return Path(home if os.path.isabs(home) else os.devnull) / ".cache" / "vpstore"


class Stamps:
    """The stamps of one person, in one SQLite file that many processes may use at once.

    Any trouble with the file (no home, or a read-only one, damage, a lock held too long) turns stamps off for this
    process.
    """

    def __init__(self, folder: Path | None = None, *, max_age: int = MAX_AGE) -> None:
        self._folder = folder if folder is not None else cache_directory()
        self._max_age = max_age
        self._connection: sqlite3.Connection | None = None
        self._is_off = False
        self._turn = threading.Lock()  # the threads of a pull share the one connection

    def holds(self, path: Path, digest: str) -> bool:
        """Whether `path` was verified to have `digest` and has not changed since.

        Args:    digest: a Digest, or `sha256:` and hex for files from outside.
        """
        try:
            stat = Stat.of(path)
        except OSError:
            return False
        row = self._query(
            "select size, mtime_ns, ctime_ns, verified_at from stamps where device=? and inode=? and digest=?",
            (_signed(stat.device), _signed(stat.inode), digest),
        )
        age = time.time() - row[3] if row else -1
        return row is not None and tuple(row[:3]) == stat[2:] and 0 <= age <= self._max_age

    def record(self, entries: Iterable[tuple[Stat, str]]) -> None:
        """Remember that files with these stats, taken before they were read, have these digests.

        Files that changed a moment ago are left out: a change in the same tick of the clock would not show.
        """
        now = time.time_ns()
        rows = [
            (_signed(stat.device), _signed(stat.inode), digest, *stat[2:], now // 1_000_000_000)
            for stat, digest in entries
            if stat.is_settled(now)
        ]
        if rows:
            self._execute("insert or replace into stamps values (?, ?, ?, ?, ?, ?, ?)", rows)

    def forget(self, path: Path) -> None:
        """Drop what is known about a file."""
        try:
            stat = Stat.of(path)
        except OSError:
            return
        self._execute("delete from stamps where device=? and inode=?", [(_signed(stat.device), _signed(stat.inode))])

    def _open(self) -> sqlite3.Connection | None:
        if self._connection is None and not self._is_off:
            import sqlite3

            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                connection = sqlite3.connect(
                    self._folder / "stamps.sqlite", timeout=5, isolation_level=None, check_same_thread=False
                )
                connection.execute("pragma journal_mode=wal")
                connection.execute("pragma synchronous=off")
                connection.execute(_SCHEMA)
                self._connection = connection
            except (OSError, sqlite3.Error):
                self._is_off = True
        return self._connection

    def _query(self, sql: str, values: tuple[int | str, ...]) -> tuple[int, int, int, int] | None:
        import sqlite3

        with self._turn:
            connection = self._open()
            if connection is None:
                return None
            try:
                row: tuple[int, int, int, int] | None = connection.execute(sql, values).fetchone()
            except sqlite3.Error:
                self._is_off, self._connection = True, None
                return None
            return row

    def _execute(self, sql: str, rows: Sequence[tuple[int | str, ...]]) -> None:
        import sqlite3

        with self._turn:
            connection = self._open()
            if connection is None:
                return
            try:
                connection.execute("begin immediate")
                connection.executemany(sql, rows)
                connection.execute("commit")
            except sqlite3.Error:
                self._is_off, self._connection = True, None


def _signed(number: int) -> int:
    """SQLite's integers are signed; inode numbers are not."""
    return number - (1 << 64) if number >= 1 << 63 else number
