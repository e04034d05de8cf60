"""Threads that move bytes: a fixed number of them, one account of what they moved, one way to stop.

Place in the path: under push, pull, repair and `verify --remote`, over the transports.
Invariants: a failure of one blob stops nobody; a remote or disk that keeps failing, or Ctrl-C, stops all, between two
chunks; when the context is left no thread is at work any more.

Example:
    with Crew(narrator, "push", workers=8) as crew:
        jobs = [crew.start(lambda: remote.upload(name, path, digest, moved=crew.moved))]
        failures = [crew.failure(job) for job in jobs]
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final, TypeVar

from vpstore.errors import BadManifest, BlobMissing, DigestMismatch, Interrupted, VpstoreError
from vpstore.narration import Narrator
from vpstore.schema.digest import Digest
from vpstore.storage.remotes.base import Remote, blob_name

DEFAULT_WORKERS: Final = 8
MAX_WORKERS: Final = 256
PATIENCE: Final = 5  # so many failures of a remote or a disk, each after the transport's own retries, end the command
MANY: Final = 256  # from so many blobs on, listing the folders they lie in is cheaper than asking for each
T = TypeVar("T")


class _StoppedError(BaseException):
    """Ends a thread's work; not an Exception, so that no transport takes it for a failure and tries again."""


class Crew:
    """The threads of one command."""

    def __init__(self, narrator: Narrator, label: str, *, workers: int = DEFAULT_WORKERS) -> None:
        self._narrator, self._label = narrator, label
        self._pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="vpstore")
        self._lock = threading.Lock()
        self._is_stopped = False
        self._failures = 0
        self._fatal: VpstoreError | None = None
        self.moved_bytes, self.total_bytes = 0, 0

    def expect(self, size_bytes: int) -> None:
        """Count bytes that are going to move, for the progress line."""
        with self._lock:
            self.total_bytes += size_bytes

    def moved(self, count: int) -> None:
        """Count bytes that have moved; every transport calls this between two chunks."""
        with self._lock:
            if self._is_stopped:
                raise _StoppedError
            self.moved_bytes += count
            self._narrator.transfer(self._label, self.moved_bytes, max(self.total_bytes, self.moved_bytes))

    def watched(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """The same chunks, for reading that nothing else counts."""
        for chunk in chunks:
            self.moved(len(chunk))
            yield chunk

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Have something done by the next free thread."""
        return self._pool.submit(self._guarded, work)

    def each(self, work: Callable[[str], T], names: Sequence[str]) -> list[T]:
        """Do the same for many names; the results in their order.

        Raises:  what the first that failed raised.
        """
        jobs = [self.start(lambda name=name: work(name)) for name in names]  # type: ignore[misc]
        return [self.result(job) for job in jobs]

    def result(self, job: Future[T]) -> T:
        """Wait for one job.

        Raises:  what it raised; if the whole crew was stopped, what stopped it.
        """
        try:
            return job.result()
        except (_StoppedError, CancelledError):
            raise self._fatal or Interrupted("interrupted") from None
        except VpstoreError:
            if self._fatal is not None:
                raise self._fatal from None
            raise

    def failure(self, job: Future[T]) -> VpstoreError | None:
        """Wait for one job, and return its own failure instead of raising it.

        Raises:  what stopped the whole crew.
        """
        try:
            self.result(job)
        except VpstoreError as error:
            if error is self._fatal or isinstance(error, Interrupted):
                raise
            return error
        return None

    def _guarded(self, work: Callable[[], T]) -> T:
        if self._is_stopped:
            raise _StoppedError
        try:
            return work()
        except (BlobMissing, DigestMismatch, BadManifest):
            raise  # of this one blob
        except VpstoreError as error:  # of the remote or of a disk: a few may pass
            with self._lock:
                self._failures += 1
                if self._failures >= PATIENCE:
                    self._stop(error)
            raise

    def _stop(self, error: VpstoreError | None) -> None:
        self._is_stopped = True
        self._fatal = self._fatal or error

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what is at work if something went wrong, and wait for it."""
        if error is not None:
            with self._lock:
                self._stop(None)
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        if error is None and self.total_bytes:
            self._narrator.transfer(self._label, self.total_bytes, self.total_bytes)


def blob_sizes(crew: Crew, remote: Remote, digests: Sequence[Digest]) -> dict[Digest, int]:
    """The sizes of those blobs that a remote has.

    Raises:  RemoteFailure.
    """
    names = {blob_name(digest): digest for digest in digests}
    if len(names) < MANY or not remote.lists:
        sizes = zip(names, crew.each(remote.size, list(names)), strict=True)
        return {names[name]: size for name, size in sizes if size is not None}
    folders = sorted({name.rpartition("/")[0] + "/" for name in names})
    listed = crew.each(lambda folder: list(remote.list(folder)), folders)
    return {names[name]: size for rows in listed for name, size in rows if name in names}
