"""The threads of a transfer: many at once, one account, one way to stop; and what a terminal shows of it."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable

import pytest

from vpstore.errors import BlobMissing, RemoteFailure
from vpstore.narration import Console, Silent
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import BuildRecord, InputRecord, Manifest
from vpstore.sharing import plan
from vpstore.sharing.crew import PATIENCE, Crew


def test_so_many_work_at_once() -> None:
    meeting = threading.Barrier(6, timeout=20)
    with Crew(Silent(), "push", workers=6) as crew:
        jobs = [crew.start(meeting.wait) for _ in range(12)]  # each waits until six are there
        assert sorted(crew.result(job) for job in jobs) == sorted([*range(6)] * 2)


def failing(error: Exception, calls: list[int]) -> Callable[[], None]:
    def work() -> None:
        calls.append(1)
        raise error

    return work


def test_a_remote_that_keeps_failing_stops_all() -> None:
    calls: list[int] = []

    def hundred() -> None:
        with Crew(Silent(), "push", workers=1) as crew:
            for job in [crew.start(failing(RemoteFailure("down"), calls)) for _ in range(100)]:
                crew.failure(job)

    with pytest.raises(RemoteFailure):
        hundred()
    assert len(calls) == PATIENCE


def test_a_blob_that_fails_stops_nobody() -> None:
    calls: list[int] = []
    with Crew(Silent(), "push", workers=3) as crew:
        jobs = [crew.start(failing(BlobMissing("gone"), calls)) for _ in range(100)]
        assert all(isinstance(crew.failure(job), BlobMissing) for job in jobs)
    assert len(calls) == 100


def test_an_interruption_ends_what_is_at_work_between_two_chunks() -> None:
    begun = threading.Event()
    ended = threading.Event()

    def endless(crew: Crew) -> None:
        try:
            while True:
                crew.moved(1)
                begun.set()
        finally:
            ended.set()

    def interrupted() -> None:
        with Crew(Silent(), "pull", workers=2) as crew:
            crew.start(lambda: endless(crew))
            begun.wait(20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ended.is_set()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_bytes_a_rate_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stream = Terminal()
    console = Console(stream)
    for done in (0, 10, 20):
        console.transfer("push", done << 20, 40 << 20)
        clock[0] += 1.0
    lines = re.findall(r"push  ([^\r]*)", stream.getvalue())
    assert lines[-1].strip() == "20.0/40.0 MiB  10.0 MiB/s  2 s left"
    console.transfer("push", 40 << 20, 40 << 20)
    assert stream.getvalue().endswith("\r\x1b[K")
    quiet = io.StringIO()
    Console(quiet).transfer("push", 1, 2)
    assert quiet.getvalue() == ""


def chain(length: int) -> dict[Digest, Manifest]:
    """Artifacts that are each built from the one before."""
    made: dict[Digest, Manifest] = {}
    inputs: tuple[InputRecord, ...] = ()
    for number in range(length):
        manifest = Manifest("plant", "bloom", BuildRecord("x", (), {"n": number}, inputs), ())
        made[manifest.digest] = manifest
        inputs = (InputRecord("parent", manifest.digest, manifest.content),)
    return made


def test_parents_come_first_and_the_depth_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = chain(30)
    last = list(made)[-1]
    found = plan.gather({last: "plant@bloom"}, lambda artifact, label: made[artifact])
    assert list(found.manifests) == list(made)
    assert list(plan.gather({last: "x"}, lambda a, _: made[a], ancestors=False).manifests) == [last]
    monkeypatch.setattr(plan, "MAX_DEPTH", 28)
    with pytest.raises(plan.BadManifest, match="larger than any"):
        plan.gather({last: "plant@bloom"}, lambda artifact, label: made[artifact])
