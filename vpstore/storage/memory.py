"""Answers that are worth remembering, each as long as none of the files that decided it has changed.

Place in the path: beside the stamps, in the same person's cache directory. Preparing a stage costs the imports of the
project's runner; whether an artifact is stale is asked at every `resolve`.
Invariants: an answer is given only if every file and folder that decided it has the device, inode, size, mtime and
ctime that it had then; ctime cannot be set back, so an edit with size and mtime restored counts. An answer is kept only
if all of them were at rest since before the work began. A damaged memory is an empty one; losing it costs time only.

Example:
    memory = Memory(); memory.recall(question) or memory.remember(question, work_out(), paths=paths, since_ns=begun)
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from vpstore.schema.digest import Digest
from vpstore.storage import atomic
from vpstore.storage.stamps import COARSE_RACY_NS, MAX_AGE, Stat, cache_directory

FORMAT: Final = 1
MAX_ANSWERS: Final = 128  # one is up to 100 KB; the oldest make room


class Memory:
    """The answers of one person, one file an answer."""

    def __init__(self, folder: Path | None = None, *, max_age: int = MAX_AGE) -> None:
        self._folder = folder if folder is not None else cache_directory() / "answers"
        self._max_age = max_age

    def recall(self, question: str) -> Any:
        """What was answered last, or None if there is no answer, or something that decided it has changed since."""
        try:
            head, _, body = self._path(question).read_bytes().partition(b"\n")
            if head.decode("ascii") != Digest.of(body):
                return None
            kept = json.loads(body)
        except (OSError, ValueError):
            return None
        if kept["question"] != question or not 0 <= time.time() - kept["unix"] <= self._max_age:
            return None
        found = _stats(kept["paths"])
        return kept["answer"] if found is not None and _fingerprint(found) == kept["stats"] else None

    def remember(self, question: str, answer: Any, *, paths: Iterable[str], since_ns: int) -> bool:
        """Keep an answer, unless something that decided it is too young to be trusted or is not there.

        Args:    question: everything that decides the answer and is no file; answer: JSON; paths: absolute, of every
                 file and folder that decided it, not of what depends on chance or time; since_ns: a moment before the
                 first of them was read.
        Returns: whether it was kept.
        """
        named = sorted(set(paths))
        stats = _stats(named)
        if stats is None or any(stat.ctime_ns > since_ns - COARSE_RACY_NS for stat in stats):
            return False
        kept = {
            "format": FORMAT, "question": question, "unix": int(time.time()), "answer": answer,
            "stats": _fingerprint(stats), "paths": named,
        }  # fmt: skip
        body = json.dumps(kept, ensure_ascii=False).encode("utf-8", "surrogatepass")
        with suppress(OSError):
            atomic.make_directory(self._folder)
            self._make_room()
            return atomic.write_if_different(self._path(question), Digest.of(body).encode() + b"\n" + body, mode=0o600)
        return False

    def _path(self, question: str) -> Path:
        return self._folder / f"{Digest.of(question.encode('utf-8', 'surrogatepass')).hex}.json"

    def _make_room(self) -> None:
        files = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for path in files[: max(0, len(files) - MAX_ANSWERS + 1)]:
            atomic.remove(path)


def _stats(paths: Iterable[str]) -> list[Stat] | None:
    """The stats of all paths, or None if one is not there."""
    found = []
    try:
        for path in paths:
            row = os.stat(path)
            found.append(Stat(row.st_dev, row.st_ino, row.st_size, row.st_mtime_ns, row.st_ctime_ns))
    except (OSError, ValueError):
        return None
    return found


def _fingerprint(stats: list[Stat]) -> str:
    return Digest.of(repr([tuple(stat) for stat in stats]).encode())
