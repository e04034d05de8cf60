"""build: one stage from its config to its pointer.

Place in the path: composes the verbs; api and the command line call it. The order is the design's: prepare, inputs,
key, cache, recipe, publish, view, reports, pointer.
Invariants: the pointer is written last; a failure leaves store and pointer as they were and keeps the scratch folder,
for a person to look at and for a runner that resumes; any other begins in an empty one;
one process builds a key, others wait and find its result.

Example:
    built = build(work, StageRef("vpDense", "expand")); built.manifest.digest
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpstore.errors import Interrupted, NoSuchRef, VpstoreError
from vpstore.holdings import pointer_name, view_name
from vpstore.needs import say
from vpstore.preparation import Preparation, prepare
from vpstore.rebuilding.ingredients import Task, lay_out_build
from vpstore.rebuilding.running import run
from vpstore.rebuilding.scratch import scratch_folder
from vpstore.runner import Prepared
from vpstore.schema.attestation import BuildFacts
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import BuildRecord, InputRecord, Manifest
from vpstore.schema.ref import StageRef
from vpstore.storage import atomic, modes
from vpstore.storage.locks import Locks
from vpstore.storage.outside import check_sha256
from vpstore.storage.pointers import LOCK, Pointer
from vpstore.surroundings import UNKNOWN, Stopwatch
from vpstore.verbs.cache import build_statement, find_build
from vpstore.verbs.compare import Comparison, compare_with_lock
from vpstore.verbs.materialize import materialize, view_path
from vpstore.verbs.publish import Publication, publish
from vpstore.verbs.reports import restore_reports
from vpstore.workspace import Workspace

Relocation = Callable[[Prepared], Prepared]  # says where the sources lie instead


@dataclass(frozen=True)
class Built:
    """What `build` did and what the stage is now."""

    ref: StageRef
    manifest: Manifest
    path: Path  # the view
    is_cached: bool
    seconds: float | None  # how long the recipe took when it last ran; None if no attestation says
    finished_unix: int  # when; 0 if no attestation says
    comparison: Comparison

    def to_json(self) -> dict[str, Any]:
        """The row as `build --json` prints it."""
        return {
            "ref": str(self.ref),
            "artifact": self.manifest.digest,
            "key": self.manifest.build.key(),
            "path": str(self.path),
            "size_bytes": self.manifest.size_bytes,
            "cached": self.is_cached,
            "seconds": self.seconds,
            "lock": {
                "status": self.comparison.status,
                "reasons": list(self.comparison.reasons),
                "files": list(self.comparison.files),
                "tensors": list(self.comparison.tensors),
            },
        }


@dataclass(frozen=True)
class Planned:
    """What `build` would do with one stage."""

    ref: StageRef
    key: Digest | None  # None: it covers the content of inputs that are not built yet
    is_cached: bool
    waits_for: tuple[StageRef, ...] = ()  # inputs that are not built

    def to_json(self) -> dict[str, Any]:
        """The row as `build --dry-run --json` prints it."""
        waits_for = [str(ref) for ref in self.waits_for]
        return {"ref": str(self.ref), "key": self.key, "cached": self.is_cached, "waits_for": waits_for}


@dataclass(frozen=True)
class _Job:
    """One build, once its key is known."""

    preparation: Preparation
    record: BuildRecord
    environment: Mapping[str, str]

    @property
    def ref(self) -> StageRef:
        return self.preparation.ref

    @property
    def task(self) -> Task:
        return Task(self.ref, self.record, self.preparation.prepared.verbatim)


def build(work: Workspace, ref: StageRef, *, force: bool = False, relocate: Relocation | None = None) -> Built:
    """Make `ref` what the working tree says, from the build cache if it can be had there.

    Args:    force: run the recipe even if the cache has its result; relocate: for `import`.
    Raises:  NoSuchRef: an input is not built; RecipeRefused, GateMissed: nothing is published; Interrupted: Ctrl-C.
    """
    job = _job(work, ref, relocate)
    key = job.record.key()
    with atomic.disk_errors(work.store.root, f"building {ref}"):
        if not force and (found := _from_cache(work, job)) is not None:
            return found
        waiting = f"{ref}: another process builds it; waiting"
        with work.store.lock(key, waiting=lambda: work.narrator.warn(waiting)):
            if not force and (found := _from_cache(work, job)) is not None:
                return found
            built = _make(work, job)
            work.store.drop_scratch(key)
    return built


def _from_cache(work: Workspace, job: _Job) -> Built | None:
    """The result of an earlier build; found and shown while nothing can be collected."""
    with work.changing():
        manifest = find_build(work, job.ref, job.record, environment=job.environment)
        if manifest is None:
            return None
        work.store.keys.add(job.record.key(), manifest.digest)  # durable now, even if its writer died before that
        return _finish(work, manifest, is_cached=True)


def planned(work: Workspace, ref: StageRef, *, relocate: Relocation | None = None) -> Planned:
    """What `build` would do with one stage; nothing is built or written."""
    waits_for = tuple(
        dict.fromkeys(parent for parent in _declared(work, ref).values() if work.checkout.pointers.read(parent) is None)
    )
    if waits_for:
        _preparation(work, ref, relocate)  # what would be refused then is refused now
        return Planned(ref, None, False, waits_for)
    job = _job(work, ref, relocate)
    if relocate is not None:
        _check_sources(work, job)
    hit = find_build(work, ref, job.record, environment=job.environment)
    return Planned(ref, job.record.key(), hit is not None)


def _job(work: Workspace, ref: StageRef, relocate: Relocation | None) -> _Job:
    preparation = _preparation(work, ref, relocate)
    inputs = [_parent(work, preparation, role, parent) for role, parent in _declared(work, ref).items()]
    return _Job(preparation, preparation.record(inputs), work.runner.environment(preparation.prepared))


def _preparation(work: Workspace, ref: StageRef, relocate: Relocation | None) -> Preparation:
    preparation = prepare(work, ref)
    return preparation if relocate is None else preparation.with_prepared(relocate(preparation.prepared))


def _declared(work: Workspace, ref: StageRef) -> Mapping[str, StageRef]:
    return work.checkout.objects.stage(ref).inputs


def _parent(work: Workspace, preparation: Preparation, role: str, parent: StageRef) -> InputRecord:
    """What an input is now. Pointers only: they are what DVC sees as the dependency."""
    ref = preparation.ref
    pointer = work.checkout.pointers.read(parent)
    if pointer is None:
        raise NoSuchRef(
            "an input is not built",
            where=f"{ref} needs {parent}, profile {work.checkout.profile}",
            expected=f"a pointer {work.checkout.relative(work.checkout.pointers.path(parent))}",
            next_step=f"vpstore build {parent}, or dvc repro, which builds what is missing in order",
        )
    content = pointer.content
    if content is None:  # a pointer of format 1
        content = work.store.manifest(pointer.artifact, what=f"{ref}, input {role}").content
    return preparation.input(role, pointer.artifact, content)


def _make(work: Workspace, job: _Job) -> Built:
    """Run the recipe, publish its result, and show it."""
    prepared = job.preparation.prepared
    scratch = _scratch(work, job)
    watch = Stopwatch()
    work.narrator.note(f"{job.ref}: {prepared.recipe_entry}, key {job.record.key().short}")
    try:
        with scratch_folder(work, "build", job.task) as place:
            _check_sources(work, job)
            recipe = lay_out_build(work, job.task, job.preparation, place, scratch=scratch)
            result = run(recipe, work.narrator, needs=lambda needs: say(work, job.ref, needs, scratch))
            publication = Publication(
                job.ref, job.record, result.staged, scratch, prepared.verbatim, job.preparation.recipe
            )
            with work.changing():
                manifest = publish(work, publication, facts=lambda: _facts(work, job, watch))
                return _finish(work, manifest, is_cached=False)
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted; nothing was published",
            where=str(job.ref),
            next_step=f"vpstore build {job.ref} {_outlook(work)} {scratch}",
        ) from None


def _facts(work: Workspace, job: _Job, watch: Stopwatch) -> BuildFacts:
    facts = watch.facts(work.checkout.root, job.environment)
    if facts.git["commit"] == UNKNOWN:
        work.narrator.warn(
            f"{job.ref}: git does not tell the commit, so it is attested as unknown; vpstore doctor says why"
        )
    return facts


def _scratch(work: Workspace, job: _Job) -> Path:
    """The folder to build in: empty, unless the runner takes up what an earlier run left, and this user can read it.

    Most runners know nothing of what a killed run left, and would fail on it or, worse, publish it with the rest.
    """
    key = job.record.key()
    folder = work.store.scratch(key)
    if not modes.can_use(folder) or (any(folder.iterdir()) and not work.checkout.config.resume):
        work.store.drop_scratch(key)
        folder = work.store.scratch(key)
    return folder


def _outlook(work: Workspace) -> str:
    return "takes up what lies in" if work.checkout.config.resume else "begins anew, and empties"


def _check_sources(work: Workspace, job: _Job) -> None:
    for source in job.preparation.prepared.sources:
        check_sha256(source.path, source.sha256, size_bytes=source.size_bytes, stamps=work.store.blobs.stamps)


def _point(work: Workspace, manifest: Manifest) -> None:
    """Reports, then the pointer: the two of one artifact, also while another build of the stage ends."""
    views = work.checkout.views
    with (
        atomic.disk_errors(views, "writing the pointer"),
        work.checkout.opened(views) as place,
        Locks(place).exclusive(LOCK),
    ):
        restore_reports(work, manifest)
        work.checkout.pointers.write(Pointer(manifest.ref, manifest.digest, manifest.build.key(), manifest.content))


def _mind_reproduction(work: Workspace, manifest: Manifest) -> None:
    """One key, two contents: another history of equal content is none of that."""
    key = manifest.build.key()
    others = []
    for artifact in work.store.keys.artifacts(key):
        with suppress(VpstoreError):
            if work.store.manifest(artifact).content != manifest.content:
                others.append(artifact.short)
    if others:
        work.narrator.warn(
            f"{manifest.ref}: build key {key.short} has also given {', '.join(others)}: "
            "the build depends on something that its key does not cover"
        )


def _finish(work: Workspace, manifest: Manifest, *, is_cached: bool) -> Built:
    """Root, view, reports, and last of all the pointer; called while nothing can be collected."""
    _mind_reproduction(work, manifest)
    profile, view = work.checkout.profile, view_path(work, manifest).name
    with atomic.disk_errors(work.store.root, "registering the pointer"):
        work.hold(dict.fromkeys((pointer_name(profile, manifest.ref), view_name(profile, view)), manifest.digest))
    path = materialize(work, manifest)
    _point(work, manifest)
    statement = build_statement(work, manifest)
    return Built(
        ref=manifest.ref,
        manifest=manifest,
        path=path,
        is_cached=is_cached,
        seconds=statement.facts.duration_seconds if statement else None,
        finished_unix=statement.facts.finished_unix if statement else 0,
        comparison=compare_with_lock(work, manifest),
    )
