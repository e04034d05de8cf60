"""Lays out what a build needs in a scratch folder: recipe files, what carries them out, inputs, sources.

Place in the path: build record -> **here** -> the process that runs the recipe. For a recorded build nothing is read
from the config of the working tree but where source files lie.
Invariants: every recipe file, input and source is held against the digest that the record has for it; what the closure
leaves out (the runner and what moves bytes) comes from the checkout; of a parent there is what the key covers, and no
more; links lead to blobs, which nobody can write.

In the folder: tree/ (first on the module path), inputs/<role>/, sources/<role>, work/ (the recipe's own).

Example:
    job = lay_out(work, Task.of(manifest), scratch)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vpstore.errors import BadManifest, BlobMissing, DigestMismatch, RecipeRefused, VpstoreError
from vpstore.preparation import Preparation
from vpstore.rebuilding.tree import lay_tree, support
from vpstore.rebuilding.worker import Job
from vpstore.runner import Prepared, PreparedSource, ResolvedInput, TokenizerRecord
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import (
    MANIFEST_FILE,
    BuildRecord,
    InputRecord,
    Manifest,
    RecipeFile,
    SourceRecord,
)
from vpstore.schema.record import TOKENIZER, tokenizer_attributes
from vpstore.schema.ref import StageRef
from vpstore.storage import passing
from vpstore.storage.outside import check_sha256
from vpstore.verbs.resolve import verified_manifest
from vpstore.workspace import Workspace


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
        return cls(manifest.ref, manifest.build, manifest.verbatim, manifest)


@dataclass(frozen=True)
class Origin:
    """Where one ingredient comes from, for a person."""

    what: str
    place: str


def lay_out(work: Workspace, task: Task, scratch: Path) -> Job:
    """Fill an empty scratch folder with what a recorded build needs.

    Raises:  BlobMissing, DigestMismatch: a recipe file or an input is not here; BadManifest: a recipe file has another
             normal form than the record says; RecipeRefused: a source is not here.
    """
    current = _prepared_now(work, task.ref)
    recipe = {row: recipe_file(work, task.ref, row) for row in task.record.recipe_files}
    sources = list(zip(task.record.sources, find_sources(work, task, current), strict=True))
    return replace(_laid_out(work, task, recipe, current, scratch), prepared=_prepared(task, current, sources, scratch))


def lay_out_build(work: Workspace, task: Task, preparation: Preparation, place: Path, *, scratch: Path) -> Job:
    """Fill an empty folder with what a build from the working tree needs.

    Args:    scratch: the runner's own folder.
    Raises:  BlobMissing, DigestMismatch, BadManifest: an input is not whole here.
    """
    current = preparation.prepared
    paths = {source.role: source.path for source in current.sources}
    sources = [(row, paths[row.role]) for row in task.record.sources]
    job = _laid_out(work, task, preparation.recipe, current, place)
    return replace(job, purpose="build", prepared=_prepared(task, current, sources, place), scratch=scratch)


def _laid_out(work: Workspace, task: Task, recipe: Mapping[RecipeFile, bytes], current: Prepared, scratch: Path) -> Job:
    """The tree with the code, and the inputs; a tree holds what the key covers of each recipe file."""
    tree = scratch / "tree"
    return Job(
        runner=work.checkout.objects.runner,
        root=work.checkout.root,
        tree=tree,
        recipe_files=tuple(row.path for row in recipe),
        prepared=current,
        inputs={row.role: _lay_input(work, task, row, scratch / "inputs" / row.role) for row in task.record.inputs},
        scratch=scratch / "work",
        lines=lay_tree(work, task.ref, recipe, current, tree),
    )


def _prepared(task: Task, current: Prepared, sources: Iterable[tuple[SourceRecord, Path]], scratch: Path) -> Prepared:
    """What the runner is given: all values as the record has them, the sources behind links."""
    record = task.record
    pin = record.pin(TOKENIZER)
    is_tokenizer = pin is not None and pin.attributes.keys() == tokenizer_attributes("", 0).keys()
    linked = tuple(
        PreparedSource(row.role, passing.link(scratch / "sources" / row.role, path), row.sha256, row.size_bytes)
        for row, path in sources
    )
    return Prepared(
        recipe_entry=record.entry,
        params=record.params,
        code_always=current.code_always,
        code_exclude=current.code_exclude,
        sources=linked,
        tokenizer=TokenizerRecord(digest=pin.digest, **pin.attributes) if pin is not None and is_tokenizer else None,
        verbatim=task.verbatim,
        settings=current.settings,
        pins=record.pins,
        variables=dict(record.variables),
    )


def origins(work: Workspace, task: Task) -> Iterator[Origin]:
    """Where each ingredient would come from; nothing is laid out.

    Raises:  as `lay_out`.
    """
    current = _prepared_now(work, task.ref)
    for row in task.record.recipe_files:
        recipe_file(work, task.ref, row)
        yield Origin(f"recipe file {row.path}", "the store" if work.store.blobs.has(row.digest) else "the checkout")
    for name in support(work, current):
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
            return replace(found, params={}, sources=kept, settings={})
    assert refusal is not None  # there is at least the stage itself
    raise refusal


def _is_declared(work: Workspace, ref: StageRef) -> bool:
    return ref in work.checkout.objects.order


def _lay_input(work: Workspace, task: Task, row: InputRecord, folder: Path) -> ResolvedInput:
    """One parent as a recipe sees it: what the key covers of it."""
    manifest = input_manifest(work, task.ref, row)
    has_history = task.record.format == 1 or row.by == "artifact"
    files = {file.path: file.digest for file in (manifest.files if task.record.format == 1 else manifest.seen)}
    if task.record.format == 1:
        files[MANIFEST_FILE] = manifest.digest
    elif manifest.content != row.content:
        raise BadManifest(
            "a manifest contradicts what it names",
            where=f"{task.ref}: content of input {row.role}",
            expected=manifest.content,
            found=str(row.content),
            next_step=f"vpstore build {manifest.ref} writes its pointer anew",
        )
    passing.folders(folder)
    for path, digest in files.items():
        passing.link(folder / path, work.store.blobs.path(digest))
    if has_history:
        return ResolvedInput(row.role, str(manifest.ref), row.artifact, folder)
    return ResolvedInput(row.role, row.role, manifest.content, folder)
