"""Lays out what a recorded build needs in a scratch folder: recipe files, what carries them out, inputs, sources.

Place in the path: build record -> **here** -> the process that runs the recipe. Nothing is read from the config of the
working tree but where source files lie.
Invariants: every recipe file, input and source is held against the digest that the record has for it; what the closure
leaves out (the runner and what moves bytes) comes from the checkout; links lead to blobs, which nobody can write.

In the folder: tree/ (first on the module path), inputs/<role>/, sources/<role>, work/ (the recipe's own).

Example:
    job = lay_out(work, Task.of(manifest), scratch)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vpstore.errors import BlobMissing, DigestMismatch, RecipeRefused, VpstoreError
from vpstore.rebuilding.worker import Job
from vpstore.runner import Prepared, PreparedSource, ResolvedInput
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import (
    MANIFEST_FILE,
    PROVENANCE_FILE,
    BuildRecord,
    InputRecord,
    Manifest,
    RecipeFile,
    SourceRecord,
)
from vpstore.schema.ref import StageRef
from vpstore.storage import atomic
from vpstore.storage.outside import check_sha256
from vpstore.verbs.resolve import verified_manifest
from vpstore.workspace import Workspace

_PROGRAM = "vpstore"  # this program runs itself, never a copy out of the checkout


@dataclass(frozen=True)
class Task:
    """One build that is to be done again."""

    ref: StageRef
    record: BuildRecord
    verbatim: bool
    manifest: Manifest | None = None  # what it gave, if that is here

    @classmethod
    def of(cls, manifest: Manifest) -> Task:
        """The build that a manifest records."""
        return cls(manifest.ref, manifest.build, PROVENANCE_FILE not in manifest.by_path, manifest)


@dataclass(frozen=True)
class Origin:
    """Where one ingredient comes from, for a person."""

    what: str
    place: str


def lay_out(work: Workspace, task: Task, scratch: Path) -> Job:
    """Fill an empty scratch folder.

    Raises:  BlobMissing, DigestMismatch: a recipe file or an input is not here; RecipeRefused: a source is not.
    """
    current = _prepared_now(work, task.ref)
    tree = scratch / "tree"
    _lay_support(work, _support(work, current), tree)
    for row in task.record.recipe_files:
        _write(tree / row.path, recipe_file(work, task.ref, row))
    record = task.record
    sources = tuple(
        PreparedSource(row.role, _link(scratch / "sources" / row.role, path), row.sha256, row.size_bytes)
        for row, path in zip(record.sources, find_sources(work, task, current), strict=True)
    )
    prepared = Prepared(
        recipe_entry=record.entry,
        params=record.params,
        code_always=current.code_always,
        code_exclude=current.code_exclude,
        sources=sources,
        tokenizer=record.tokenizer,
        verbatim=task.verbatim,
    )
    return Job(
        runner=work.checkout.objects.runner,
        root=work.checkout.root,
        tree=tree,
        recipe_files=tuple(row.path for row in record.recipe_files),
        prepared=prepared,
        inputs={row.role: _lay_input(work, task.ref, row, scratch / "inputs" / row.role) for row in record.inputs},
        scratch=scratch / "work",
    )


def origins(work: Workspace, task: Task) -> Iterator[Origin]:
    """Where each ingredient would come from; nothing is laid out.

    Raises:  as `lay_out`.
    """
    current = _prepared_now(work, task.ref)
    for row in task.record.recipe_files:
        recipe_file(work, task.ref, row)
        yield Origin(f"recipe file {row.path}", "the store" if work.store.blobs.has(row.digest) else "the checkout")
    for name in _support(work, current):
        yield Origin(f"module {name}", "the checkout")
    for parent in task.record.inputs:
        manifest = input_manifest(work, task.ref, parent)
        yield Origin(f"input {parent.role}", f"{manifest.ref} {parent.artifact.short}, the store")
    for source, path in zip(task.record.sources, find_sources(work, task, current), strict=True):
        inside = path.is_relative_to(work.store.root)
        yield Origin(f"source {source.role}", "the store" if inside else work.checkout.relative(path))


def recipe_file(work: Workspace, ref: StageRef, row: RecipeFile) -> bytes:
    """The bytes of a recorded recipe file: its blob, else the checkout's file if it is still the same.

    Raises:  BlobMissing, DigestMismatch: neither.
    """
    try:
        return work.store.blobs.read(row.digest, what=f"{ref}, recipe file {row.path}")
    except (BlobMissing, DigestMismatch) as error:
        path = work.checkout.root / row.path
        data = path.read_bytes() if path.is_file() else b""
        if Digest.of(data) == row.digest:
            return data
        error.advise("git checkout the commit in which it was built, which vpstore show lists, or vpstore pull")
        raise


def input_manifest(work: Workspace, ref: StageRef, row: InputRecord) -> Manifest:
    """The manifest of a recorded parent, all its files verified.

    Raises:  BlobMissing, DigestMismatch, BadManifest: naming the role.
    """
    try:
        parent = work.store.manifest(row.artifact, what="an input")
        return verified_manifest(work, parent.ref, row.artifact, is_input=True)
    except VpstoreError as error:
        error.where = f"{ref}, input {row.role} = {row.artifact.short}: {error.where}"
        declared = work.checkout.objects.stage(ref).inputs.get(row.role) if _is_declared(work, ref) else None
        name = f"vpstore resolve {declared} --rebuild makes it again if {declared} still is that artifact, or " * bool(
            declared
        )
        error.advise(f"{name}vpstore pull brings it from a remote")
        raise


def find_sources(work: Workspace, task: Task, current: Prepared) -> list[Path]:
    """Where the recorded sources lie: outside, where the checkout's provenance says; else in the artifact itself.

    Raises:  RecipeRefused: a source is nowhere, or only with other bytes.
    """
    outside = {source.role: source.path for source in current.sources}
    return [_source(work, task, row, outside.get(row.role)) for row in task.record.sources]


def _source(work: Workspace, task: Task, row: SourceRecord, outside: Path | None) -> Path:
    files = task.manifest.by_path if task.manifest is not None else {}
    inner = row.role.partition("/")[2] or row.role
    kept = [work.store.blobs.path(files[inner].digest)] if inner in files else []
    refusal: RecipeRefused | None = None
    for path in [*([outside] if outside is not None else []), *kept]:
        try:
            check_sha256(path, row.sha256, size_bytes=row.size_bytes, stamps=work.store.blobs.stamps)
        except RecipeRefused as error:
            refusal = refusal or error
        else:
            return path
    if refusal is None:
        refusal = RecipeRefused(
            "nothing says where a source lies", expected=f"sha256 {row.sha256}", next_step="check out its provenance"
        )
    refusal.where = f"{task.ref}, source {row.role}: {refusal.where}"
    raise refusal


def _prepared_now(work: Workspace, ref: StageRef) -> Prepared:
    """What the runner says of this stage now; of any other, without sources, if the stage's config is refused."""
    refusal: VpstoreError | None = None
    for other in (ref, *work.checkout.objects.order):
        try:
            found = work.runner.prepare(work.checkout, other.object, other.stage)
        except VpstoreError as error:
            refusal = refusal or error
        else:
            kept = found.sources if other == ref else ()
            return Prepared(found.recipe_entry, {}, found.code_always, found.code_exclude, kept)
    assert refusal is not None  # there is at least the stage itself
    raise refusal


def _is_declared(work: Workspace, ref: StageRef) -> bool:
    return ref in work.checkout.objects.order


def _support(work: Workspace, current: Prepared) -> list[str]:
    names = dict.fromkeys([work.checkout.objects.runner, *current.code_exclude])
    return [name for name in names if name.partition(".")[0] != _PROGRAM]


def _lay_support(work: Workspace, names: list[str], tree: Path) -> None:
    """Copy the modules that closures leave out, each with all below it and the packages it lies in."""
    for name in names:
        base = work.checkout.root.joinpath(*name.split("."))
        found = [path for path in base.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        found += [path for path in (base.with_name(base.name + ".py"),) if path.is_file()]
        packages = [folder for folder in base.parents if work.checkout.root in folder.parents]
        above = [folder / "__init__.py" for folder in packages]
        for path in [*found, *(path for path in above if path.is_file())]:
            target = tree / path.relative_to(work.checkout.root)
            if not target.exists():
                _write(target, path.read_bytes())


def _lay_input(work: Workspace, ref: StageRef, row: InputRecord, folder: Path) -> ResolvedInput:
    manifest = input_manifest(work, ref, row)
    files = {MANIFEST_FILE: manifest.digest, **{file.path: file.digest for file in manifest.files}}
    for path, digest in files.items():
        _link(folder / path, work.store.blobs.path(digest))
    return ResolvedInput(row.role, str(manifest.ref), row.artifact, folder)


def _link(target: Path, place: Path) -> Path:
    atomic.make_directory(target.parent)
    atomic.link(target, str(place))
    return target


def _write(target: Path, data: bytes) -> None:
    atomic.make_directory(target.parent)
    atomic.write_file(target, data, folder=target.parent, mode=0o644)
