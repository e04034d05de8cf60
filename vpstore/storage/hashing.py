"""Reading and hashing at the machine's speed: `windows`, `digest_file`, `digest_many`.

Place in the path: under everything that reads blobs whole. verify, audit and push hand all their paths to
`digest_many`; publish reads through `windows`, so that one pass over the bytes serves every digest that is wanted.
Invariants: memory is the same for a file of any size; bytes that cannot be read are an `OSError` of that file, never a
signal and never a wrong digest (docs/decisions/0008-mapped-windows.md); results come in the order of the question.

Example:
    for found in digest_many([store.blobs.path(digest) for digest in wanted]): found.digest, found.error
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, TypeVar

from blake3 import blake3

from vpstore.schema.digest import Digest
from vpstore.storage.stamps import Stat

T = TypeVar("T")
R = TypeVar("R")
WINDOW: Final = 16 << 20
MANY: Final = 32  # files, from which on it pays to have several wait for the disk at once
WAITERS: Final = 16  # how many do
_BUFFER: Final = 1 << 20  # a plain read and its hashing stay in a core's cache
_MAPPED: Final = 1 << 20  # below this size, copying is cheaper than mapping
_PARALLEL: Final = 1 << 20  # below this size, handing the work to threads costs more than it gives
_POPULATE_READ: Final = 22  # MADV_POPULATE_READ, Linux 5.14: read the pages now, and say so if that fails


class Hashed(NamedTuple):
    """What one file was found to be."""

    path: Path
    digest: Digest | None  # None: not readable, see `error`
    size_bytes: int  # bytes that were read
    stat: Stat | None  # of the bytes that were read; None if the file changed meanwhile, so that no stamp is due
    error: OSError | None = None


def digest_many(paths: Sequence[Path], *, workers: int | None = None) -> Iterator[Hashed]:
    """Digest files on all cores.

    Args:    workers: how many files at once; None means one a core.
    Returns: one result a path, in the order of `paths`; an unreadable or missing file is a result with an error.
    """
    count = workers or cores()
    sizes = {path: _size(path) for path in paths}
    total = sum(sizes.values())

    def read(path: Path) -> Hashed:
        return _hashed(path, threads=threads_for(sizes[path], total, workers=count))

    return in_threads(read, paths, workers=count if total >= _PARALLEL else 1)


def threads_for(size_bytes: int, total_bytes: int, *, workers: int) -> int:
    """How many threads should hash a file that is read beside others: one, unless it is a large part of the whole.

    A file that one core would still be reading when the others are done is hashed by all of them together.
    """
    return blake3.AUTO if workers > 1 and size_bytes > total_bytes // (4 * workers) else 1


def digest_file(path: Path, *, threads: int = blake3.AUTO) -> tuple[Digest, int]:
    """The digest and size of a file, in constant memory.

    Args:    threads: of the hashing; `blake3.AUTO` means all cores, for a large file.
    Raises:  OSError.
    """
    state = blake3()
    size = 0
    with path.open("rb", buffering=0) as source:
        if threads != 1 and os.fstat(source.fileno()).st_size >= _PARALLEL:
            state = blake3(max_threads=threads)
        for window in windows(source):
            state.update(window)
            size += len(window)
    return Digest.from_hex(state.hexdigest()), size


def windows(source: BinaryIO) -> Iterator[memoryview]:
    """The bytes of a file from its beginning to its end, a window at a time.

    Windows are mapped where that is possible, so that nothing is copied; whoever takes one keeps no part of it when
    the next is asked for. If a window cannot be mapped or its pages cannot be read, plain reads go on from there and
    give the operating system's own answer.

    Raises:  OSError.
    """
    descriptor = source.fileno()
    size = os.fstat(descriptor).st_size
    at = 0
    while size >= _MAPPED and at < size:
        length = min(WINDOW, size - at)
        mapped = _mapped(descriptor, at, length)
        if mapped is None:
            break
        try:
            with memoryview(mapped) as window:
                yield window
        finally:
            mapped.close()
        at += length
    source.seek(at)
    buffer = memoryview(bytearray(max(1, min(_BUFFER, size - at))))
    while count := source.readinto(buffer):  # type: ignore[attr-defined]  # an unbuffered file has it
        yield buffer[:count]


def in_threads(work: Callable[[T], R], items: Sequence[T], *, workers: int) -> Iterator[R]:
    """Do `work` for every item, so many at once; it should spend its time where Python's lock is not held.

    Returns: the results, in the order of `items`.
    Raises:  what `work` raised for the first such item; what was not begun by then is never begun.
    """
    if workers <= 1 or len(items) <= 1:
        yield from map(work, items)
        return
    ready = threading.Condition()
    done: dict[int, tuple[list[R], BaseException | None]] = {}
    waiting = iter(list(enumerate(items)))  # emptied to stop the threads

    def serve() -> None:
        while True:
            with ready:
                place, item = next(waiting, (-1, None))
            if item is None:
                return
            result: list[R] = []
            failure: BaseException | None = None
            try:
                result.append(work(item))
            except BaseException as error:  # handed to whoever asks for this result
                failure = error
            with ready:
                done[place] = (result, failure)
                ready.notify_all()

    threads = [threading.Thread(target=serve, name="vpstore", daemon=True) for _ in range(min(workers, len(items)))]
    for thread in threads:
        thread.start()
    try:
        for place in range(len(items)):
            with ready:
                ready.wait_for(lambda: place in done)  # noqa: B023  # called before the next place
                result, failure = done.pop(place)
            if failure is not None:
                raise failure
            yield result[0]
    finally:
        with ready:
            for _ in waiting:
                pass
        for thread in threads:
            thread.join()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hashed(path: Path, *, threads: int) -> Hashed:
    size = 0
    try:
        before = Stat.of(path)
        digest, size = digest_file(path, threads=threads)
        after = Stat.of(path)
    except OSError as error:
        return Hashed(path, None, size, None, error)
    return Hashed(path, digest, size, before if after == before else None)


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _mapped(descriptor: int, at: int, length: int) -> mmap.mmap | None:
    """A window whose pages are all there, or None if it cannot be had."""
    if sys.platform != "linux":
        return None
    # The disk reads the next window while this one is hashed.
    os.posix_fadvise(descriptor, at + length, WINDOW, os.POSIX_FADV_WILLNEED)
    try:
        mapped = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=at)
    except (OSError, ValueError):  # a file system that maps nothing; a file that became shorter
        return None
    try:
        mapped.madvise(_POPULATE_READ)
    except OSError:  # an older kernel, or pages that cannot be read: then touching them would end the process
        mapped.close()
        return None
    return mapped
