"""Files that are read, changed and written back: by one at a time, so that nobody's change is lost."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_project import Project

from vpstore import building
from vpstore.checkout import Checkout
from vpstore.narration import Silent
from vpstore.schema.attestation import Statement
from vpstore.schema.digest import Digest
from vpstore.schema.lockfile import Lockfile
from vpstore.schema.ref import StageRef
from vpstore.storage.locks import Locks
from vpstore.storage.pointers import Pointer
from vpstore.verbs import lock, materialize
from vpstore.workspace import Workspace

STAGES = ("seed@main", "plant@sprout", "plant@bloom", "reports@plant-sprout", "reports@plant-bloom")


def stage(text: str) -> StageRef:
    return StageRef(*text.split("@"))


def at_once(acts: list[Callable[[], object]]) -> None:
    """Run all from one moment on; an error of one is the test's."""
    barrier, errors = threading.Barrier(len(acts)), []

    def run(act: Callable[[], object]) -> None:
        barrier.wait(10)
        try:
            act()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []


def test_six_locks_at_once_lose_no_entry(built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five stages, and one of another profile, as all profiles share the file."""
    large = built.pointer("seed-main", "large")
    large.parent.mkdir(parents=True)
    for suffix in (".json", ".artifact"):
        shutil.copy(built.pointer("seed-main").with_suffix(suffix), large.with_suffix(suffix))
    monkeypatch.setenv("XDG_CACHE_HOME", str(built.cache))
    read: Callable[[Checkout], Lockfile] = Checkout.lock

    def slowly(self: Checkout) -> Lockfile:
        found = read(self)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(Checkout, "lock", slowly)
    heard = Silent()
    works = {(p, s): Workspace.find(built.root, profile=p, narrator=heard) for p in ("tiny",) for s in STAGES}
    works["large", "seed@main"] = Workspace.find(built.root, profile="large", narrator=heard)
    at_once([lambda work=work, ref=ref: lock.lock_refs(work, [stage(ref)]) for (_, ref), work in works.items()])
    found = read(works["large", "seed@main"].checkout)
    assert {(profile, str(ref)) for profile, rows in found.profiles.items() for ref in rows} == set(works)
    assert "another process changes vpstore.lock; waiting" in heard.warnings


def test_a_dry_run_waits_for_nobody_and_a_refused_lock_makes_nothing(built: Project, project: Project) -> None:
    with Locks(built.root / "weights").exclusive(lock.LOCK):
        assert "added" in built.run("lock", "--dry-run").stdout
    made = sorted(project.root.rglob("*"))
    project.run("lock", code=10)
    project.run("lock", "seed", code=11, VPSTORE_ROOT=str(built.store))
    assert sorted(project.root.rglob("*")) == made


def test_a_pointer_that_appears_meanwhile_stays(built: Project) -> None:
    pointers = Workspace.find(built.root).checkout.pointers
    ref = stage("plant@bloom")
    known = pointers.read(ref)
    assert known is not None
    pointers.add(Pointer(ref, Digest.of(b"other"), known.key))
    assert pointers.read(ref) == known
    pointers.path(ref).unlink()
    pointers.add(known)
    assert pointers.read(ref) == known


def test_the_list_of_attestations_is_the_stores_by_the_time_it_is_written(built: Project) -> None:
    work = Workspace.find(built.root)
    ref = stage("plant@bloom")
    pointer = work.checkout.pointers.read(ref)
    assert pointer is not None
    manifest = work.store.manifest(pointer.artifact)
    beside = Path(f"{materialize.view_path(work, manifest)}{materialize.ATTESTATIONS_SUFFIX}")
    beside.unlink()
    waiting = threading.Thread(target=materialize.materialize, args=(Workspace.find(built.root), manifest))
    with Locks(beside.parent).exclusive(materialize.LOCK):
        waiting.start()
        time.sleep(0.1)
        (first,) = work.store.attestations.of(manifest.digest)
        facts = first.facts.__class__(**{**vars(first.facts), "duration_seconds": 77.0})
        work.store.attestations.add(Statement.of(manifest, facts))
    waiting.join(10)
    assert len(beside.read_bytes().splitlines()) == 2


def test_reports_and_pointer_of_two_builds_do_not_mix(built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each build ends with its own reports and its own pointer, one build after the other."""
    busy: list[str] = []
    seen: list[tuple[str, ...]] = []

    def restore(work: Workspace, manifest: object) -> int:
        busy.append("in")
        time.sleep(0.05)
        seen.append(tuple(busy))
        busy.pop()
        return 0

    work = Workspace.find(built.root)
    pointer = work.checkout.pointers.read(stage("plant@bloom"))
    assert pointer is not None
    manifest = work.store.manifest(pointer.artifact)
    monkeypatch.setattr(building, "restore_reports", restore)
    at_once([lambda: building._point(Workspace.find(built.root), manifest) for _ in range(3)])
    assert seen == [("in",)] * 3
