"""Holds what was built again against the artifact, down to the tensor.

Place in the path: result of the recipe -> **here** -> verdict. Equal digests settle most of it; where they differ, the
bytes of both sides are read.
Invariants: the recorded side is the bytes that the store holds, not what their tensor table says of them; a table that
does not describe its shard is a finding; memory stays bounded, as tensors are compared in place.

Example:
    findings = Comparer(work, manifest, epsilon=None).whole(rebuilt(task, staged))
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vpstore.errors import BadManifest
from vpstore.numbers import compare_tensors
from vpstore.rebuilding.findings import INTERMEDIATE, FileFinding, Findings, TensorFinding, Verdict
from vpstore.rebuilding.ingredients import Task
from vpstore.runner import Staged
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import MANIFEST_FILE, PROVENANCE_FILE, FileRecord, IntermediateRecord, Manifest
from vpstore.schema.tensor_table import TensorSpan, TensorTable
from vpstore.storage import atomic
from vpstore.storage.tables import read_layout, read_shard
from vpstore.workspace import Workspace

_SHARD = ".safetensors"


@dataclass(frozen=True)
class Rebuilt:
    """What came out of a whole build: its manifest, and where its bytes lie."""

    manifest: Manifest
    places: Mapping[str, Path]
    tables: Mapping[str, TensorTable]
    intermediates: Mapping[str, Path]


@dataclass(frozen=True)
class _Side:
    """One of two files that are compared."""

    path: Path = Path()
    tensors: Mapping[str, TensorSpan] = field(default_factory=dict)


def rebuilt(task: Task, staged: Staged) -> Rebuilt:
    """The manifest that publishing would give, without publishing.

    Raises:  BadManifest: a staged shard is no safetensors file, or a path is not acceptable.
    """
    files, tables = [], {}
    for row in staged.files:
        if row.path.endswith(_SHARD):
            table, digest = read_shard(row.source, where=f"{task.ref}, rebuilt {row.path}")
            tables[row.path], size, named = table, table.size_bytes, Digest.of(table.encode())
        else:
            (digest, size), named = atomic.digest_file(row.source), None
        files.append(FileRecord(row.path, row.media_type, digest, size, named))
    if not task.verbatim:
        data = task.record.readable()
        files.append(FileRecord(PROVENANCE_FILE, "application/json", Digest.of(data), len(data)))
    intermediates = tuple(IntermediateRecord(row.path, *atomic.digest_file(row.source)) for row in staged.intermediates)
    manifest = Manifest(
        task.ref.object, task.ref.stage, task.record, tuple(files), intermediates, verbatim=task.verbatim
    )
    places, parts = ({row.path: row.source for row in rows} for rows in (staged.files, staged.intermediates))
    return Rebuilt(manifest, places, tables, parts)


@dataclass(frozen=True)
class Comparer:
    """One artifact against what came out; epsilon is what may differ, None for nothing."""

    work: Workspace
    recorded: Manifest
    epsilon: float | None

    @cached_property
    def tables(self) -> dict[str, TensorTable]:
        """The artifact's tensor tables by shard.

        Raises:  BlobMissing, DigestMismatch, BadManifest.
        """
        tables = {}
        for row in self.recorded.files:
            if row.tensors is not None:
                label = f"{self.recorded.ref}, tensor table of {row.path}"
                tables[row.path] = TensorTable.decode(self.work.store.blobs.read(row.tensors, what=label), where=label)
        return tables

    def whole(self, made: Rebuilt) -> Findings:
        """Hold a whole build against the artifact."""
        tensors: list[TensorFinding] = []
        files: list[FileFinding] = []
        after = made.manifest.by_path
        for path in sorted(self.recorded.by_path.keys() | after.keys()):
            if self.recorded.by_path.get(path) == after.get(path):
                same = [self._same(path, row) for row in self.tables[path].tensors] if path in self.tables else []
                tensors += same
                files += [] if path in self.tables else [FileFinding(path, "identical")]
            elif path.endswith(_SHARD):
                found = self._shard(made, path)
                tensors += found
                if all(row.verdict == "identical" for row in found):
                    files.append(FileFinding(path, "different", "its header, or the table that describes it"))
            else:
                files.append(self._file(made.places.get(path), path))
        files += self._intermediates({row.name: row.digest for row in made.manifest.intermediates}, made.intermediates)
        is_same = all(row.verdict == "identical" for row in tensors) and all(f.verdict == "identical" for f in files)
        if made.manifest.digest != self.recorded.digest and is_same:
            files.append(FileFinding(MANIFEST_FILE, "different", "media types or tensor tables"))
        return Findings(tuple(tensors), tuple(files), *self._totals, made.manifest.digest)

    def by_tables(self, made: Rebuilt) -> Findings:
        """As `whole`, from digests alone: for an artifact whose manifest and tables are here, but not its bytes."""
        tensors: list[TensorFinding] = []
        for path in sorted(self.tables.keys() | made.tables.keys()):
            before, after = (side[path].by_name if path in side else {} for side in (self.tables, made.tables))
            for name in sorted(before.keys() | after.keys()):
                old, new = before.get(name), after.get(name)
                is_same = old is not None and new is not None and _is_alike(old, new) and old.digest == new.digest
                size = 0 if old is None else old.end - old.begin
                verdict: Verdict = "identical" if is_same else "different"
                tensors.append(TensorFinding(name, path, size, verdict, is_recorded=old is not None))
        before_files, after_files = self.recorded.by_path, made.manifest.by_path
        paths = sorted((before_files.keys() | after_files.keys()) - self.tables.keys() - made.tables.keys())
        unlike = [path for path in paths if before_files.get(path) != after_files.get(path)]
        files = tuple(FileFinding(path, "different") for path in unlike)
        return Findings(tuple(tensors), files, *self._totals, made.manifest.digest)

    def part(self, staged: Staged, names: Collection[str]) -> Findings:
        """Hold some tensors, all shard headers and the files beside them against the artifact.

        Args:    staged: shards that hold nothing but the tensors `names`.
        """
        tensors: list[TensorFinding] = []
        files: list[FileFinding] = []
        made = {row.path: row.source for row in staged.files}
        for path in sorted(self.tables.keys() | {path for path in made if path.endswith(_SHARD)}):
            found, notes = self._sparse(path, made.get(path), set(names))
            tensors += found
            files += notes
        files += [self._file(made[path], path) for path in sorted(made) if not path.endswith(_SHARD)]
        provenance = self.recorded.by_path.get(PROVENANCE_FILE)
        if provenance is not None:
            is_same = provenance.digest == Digest.of(self.recorded.build.readable())
            files.append(FileFinding(PROVENANCE_FILE, "identical") if is_same else self._file(None, PROVENANCE_FILE))
        if staged.intermediates:
            places = {row.path: row.source for row in staged.intermediates}
            digests = {name: atomic.digest_file(place)[0] for name, place in places.items()}
            files += self._intermediates(digests, places)
        held = {*made, *self.tables, PROVENANCE_FILE}
        left = tuple(path for path in self.recorded.by_path if path not in held)
        return Findings(tuple(tensors), tuple(files), *self._totals, not_compared=left)

    @cached_property
    def _totals(self) -> tuple[int, int]:
        sizes = [row.end - row.begin for table in self.tables.values() for row in table.tensors]
        return len(sizes), sum(sizes)

    def _same(self, path: str, row: TensorSpan) -> TensorFinding:
        return TensorFinding(row.name, path, row.end - row.begin, "identical")

    def _shard(self, made: Rebuilt, path: str) -> list[TensorFinding]:
        before = self._stored(path)
        after = _Side(made.places[path], made.tables[path].by_name) if path in made.tables else _Side()
        names = sorted(before.tensors.keys() | after.tensors.keys())
        return [self._tensor(before, after, name, path) for name in names]

    def _sparse(self, path: str, made: Path | None, names: set[str]) -> tuple[list[TensorFinding], list[FileFinding]]:
        """One shard of which only some tensors were computed; the header speaks for all of them."""
        before, after = self._stored(path), _Side() if made is None else _side(made)
        found = [self._tensor(before, after, name, path) for name in before.tensors if name in names]
        rest = sorted((before.tensors.keys() | after.tensors.keys()) - names)
        unlike = [name for name in rest if not _is_alike(before.tensors.get(name), after.tensors.get(name))]
        found += [self._tensor(before, after, name, path) for name in unlike]
        notes = list(self._table_faults(path, before))
        if not unlike and before.tensors and after.tensors and _head(before) != _head(after):
            notes.append(FileFinding(path, "different", "its header"))
        return found, notes

    def _stored(self, path: str) -> _Side:
        """What the artifact really has under a path, from the shard's own header; nothing if it is no shard."""
        row = self.recorded.by_path.get(path)
        if row is None:
            return _Side()
        blob = self.work.store.blobs.path(row.digest)
        try:
            return _side(blob)
        except BadManifest:
            return _Side(blob)

    def _table_faults(self, path: str, stored: _Side) -> Iterator[FileFinding]:
        """A table whose spans are not its shard's: what is said by name would be about other bytes."""
        rows = self.tables[path].tensors if path in self.tables else ()
        if {row.name: row.span for row in rows} != stored.tensors:
            yield FileFinding(path, "different", "its tensor table describes another shard")

    def _tensor(self, before: _Side, after: _Side, name: str, path: str) -> TensorFinding:
        old, new = before.tensors.get(name), after.tensors.get(name)
        size = old.end - old.begin if old is not None else 0
        if old is None or new is None:
            note = "the rebuilt artifact lacks it" if new is None else "only the rebuilt artifact has it"
            return TensorFinding(name, path, size, "different", note, is_recorded=old is not None)
        if not _is_alike(old, new):
            kinds = [f"{span.dtype} {list(span.shape)}" for span in (old, new)]
            return TensorFinding(name, path, size, "different", f"recorded as {kinds[0]}, rebuilt as {kinds[1]}")
        found = compare_tensors(old.dtype, _bytes(before.path, old), _bytes(after.path, new))
        if found.is_identical:
            return TensorFinding(name, path, size, "identical")
        is_within = self.epsilon is not None and found.max_abs is not None and found.max_abs <= self.epsilon
        verdict: Verdict = "within" if is_within else "different"
        return TensorFinding(name, path, size, verdict, max_abs=found.max_abs, max_rel=found.max_rel)

    def _file(self, after: Path | None, path: str) -> FileFinding:
        before = self.recorded.by_path.get(path)
        if path == PROVENANCE_FILE:  # it has no place, being derived from the record; it differs only if it was edited
            return FileFinding(path, "different", "not the build record")
        if before is None or after is None:
            note = "only the rebuilt artifact has it" if before is None else "the rebuilt artifact lacks it"
            return FileFinding(path, "different", note)
        if atomic.digest_file(after)[0] == before.digest:
            return FileFinding(path, "identical")
        stored = self.work.store.blobs.path(before.digest)
        if self.epsilon is not None and _is_json_within(stored, after, self.epsilon):
            return FileFinding(path, "within", "figures differ within epsilon")
        return FileFinding(path, "different")

    def _intermediates(self, digests: Mapping[str, Digest], places: Mapping[str, Path]) -> Iterator[FileFinding]:
        recorded = {part.name: part.digest for part in self.recorded.intermediates}
        for name in sorted(recorded.keys() | digests.keys()):
            verdict: Verdict = "identical" if recorded.get(name) == digests.get(name) else "different"
            if verdict == "different" and self.epsilon is not None and name in recorded and name in digests:
                before, after = _side(self.work.store.blobs.path(recorded[name])), _side(places[name])
                names = before.tensors.keys() | after.tensors.keys()
                if all(self._tensor(before, after, part, name).verdict != "different" for part in names):
                    verdict = "within"
            yield FileFinding(INTERMEDIATE + name, verdict)


def _side(path: Path) -> _Side:
    return _Side(path, {span.name: span for span in read_layout(path, where=str(path)).tensors})


def _is_alike(before: TensorSpan | None, after: TensorSpan | None) -> bool:
    return before is not None and after is not None and (before.dtype, before.shape) == (after.dtype, after.shape)


def _bytes(path: Path, span: TensorSpan) -> memoryview:
    if span.begin == span.end:
        return memoryview(b"")
    with path.open("rb") as shard:
        return memoryview(mmap.mmap(shard.fileno(), 0, access=mmap.ACCESS_READ))[span.begin : span.end]


def _head(side: _Side) -> bytes:
    """The bytes before the first tensor."""
    with side.path.open("rb") as shard:
        return shard.read(min(span.begin for span in side.tensors.values()))


def _is_json_within(before: Path, after: Path, epsilon: float) -> bool:
    """Whether two JSON files differ in figures only, none by more than epsilon."""
    try:
        old, new = (json.loads(path.read_bytes()) for path in (before, after))
    except (OSError, ValueError):
        return False
    return _is_near(old, new, epsilon)


def _is_near(old: Any, new: Any, epsilon: float) -> bool:
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_is_near(old[name], new[name], epsilon) for name in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(_is_near(a, b, epsilon) for a, b in zip(old, new, strict=True))
    is_figure = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (old, new))
    return abs(old - new) <= epsilon if is_figure else bool(type(old) is type(new) and old == new)
