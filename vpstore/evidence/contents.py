"""Contents: whether an artifact's bytes, tensor tables and embedded provenance are what its manifest says.

Place in the path: evidence that needs the store alone.
Invariants: tables are made anew from the shards and compared whole, so every tensor's digest is; of a damaged shard the
damaged tensors are named.

Example:
    check_contents(dossier, manifest, readings)
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final, NamedTuple

from vpstore.claims import contradictions
from vpstore.errors import BlobMissing, VpstoreError
from vpstore.evidence.dossier import CLAIM, Dossier
from vpstore.evidence.readings import MISSING, Readings
from vpstore.schema.canonical import parse_canonical
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import PROVENANCE_FILE, FileRecord, Manifest
from vpstore.schema.record import key_of
from vpstore.schema.tensor_table import TensorTable
from vpstore.storage.tables import damaged_parts

SHARD_SUFFIX: Final = ".safetensors"
REPORTS: Final = "reports/"  # files that a build adds about itself


def blobs_of(manifest: Manifest) -> set[Digest]:
    """Every blob of an artifact, its manifest included."""
    return {manifest.digest, *manifest.blobs()}


def shards_of(manifest: Manifest) -> set[Digest]:
    """The blobs of an artifact that have a tensor table."""
    return {row.digest for row in manifest.files if row.tensors is not None}


def check_contents(dossier: Dossier, manifest: Manifest, readings: Readings) -> None:
    """Hold bytes, tables, names and provenance against the manifest."""
    _check_names(dossier, manifest, readings)
    for row in manifest.files:
        _check_file(dossier, row, readings)
    for part in manifest.intermediates:
        if _check_blob(dossier, part.digest, f"intermediate {part.name}", readings):
            _check_size(dossier, part.digest, part.size_bytes, f"intermediate {part.name}", readings)
    for source in manifest.build.recipe_files:
        _check_blob(dossier, source.digest, f"recipe file {source.path}", readings)
    _check_entry(dossier, manifest)
    _check_claims(dossier, manifest, readings)
    _check_provenance(dossier, manifest, readings)


class _Sound(NamedTuple):
    """What was read and found whole."""

    readings: Readings

    def read(self, digest: Digest) -> bytes:
        if self.readings.fault(digest):  # a fault of its own
            raise BlobMissing("not whole here", where=digest)
        return self.readings.path(digest).read_bytes()

    def manifest(self, artifact: Digest) -> Manifest:
        return Manifest.decode(self.read(artifact), where=artifact)


def _check_claims(dossier: Dossier, manifest: Manifest, readings: Readings) -> None:
    """Recompute the code from the recipe's blobs, and the content of parents from their manifests."""
    for one in contradictions(_Sound(readings), manifest):
        dossier.fault(CLAIM, one.what, expected=one.expected, found=one.found, blob=one.blob)


def _check_names(dossier: Dossier, manifest: Manifest, readings: Readings) -> None:
    """Derive the artifact's digest and the key from the stored bytes alone, not from what was parsed of them."""
    try:
        data = readings.path(dossier.artifact).read_bytes()
        document = parse_canonical(data, where="manifest")
        artifact, key = Digest.of(data), key_of(document["build"])
    except (OSError, VpstoreError) as error:
        dossier.fault("manifest", "manifest", expected=dossier.artifact, found=str(error), blob=dossier.artifact)
        return
    if artifact != dossier.artifact:
        dossier.fault("manifest", "manifest", expected=dossier.artifact, found=artifact, blob=dossier.artifact)
    if key != manifest.build.key():
        dossier.fault("key", "build key", expected=key, found=manifest.build.key())


def _check_blob(dossier: Dossier, digest: Digest, what: str, readings: Readings) -> bool:
    if found := readings.fault(digest):
        dossier.fault(MISSING if found == MISSING else "blob", what, expected=digest, found=found, blob=digest)
        return False
    return True


def _check_size(dossier: Dossier, digest: Digest, expected: int, what: str, readings: Readings) -> None:
    if (size := readings.size_bytes(digest)) != expected:
        dossier.fault("manifest", what, expected=f"{expected} bytes", found=f"{size} bytes", blob=digest)


def _check_file(dossier: Dossier, row: FileRecord, readings: Readings) -> None:
    if row.path.endswith(SHARD_SUFFIX) != (row.tensors is not None):
        found = "a tensor table" if row.tensors else "no tensor table"
        dossier.fault("table", row.path, expected="a tensor table for each shard and no other file", found=found)
    recorded = _recorded_table(dossier, row, readings)
    if fault := readings.fault(row.digest):
        _name_damage(dossier, row, recorded, fault, readings)
        return
    _check_size(dossier, row.digest, row.size_bytes, row.path, readings)
    if row.tensors is None:
        return
    derived = readings.table(row.digest)
    if isinstance(derived, str):
        dossier.fault("table", row.path, expected="a safetensors shard", found=derived, blob=row.digest)
    elif Digest.of(derived.encode()) != row.tensors:
        _compare_tables(dossier, row, recorded, derived)


def _recorded_table(dossier: Dossier, row: FileRecord, readings: Readings) -> TensorTable | None:
    what = f"{row.path}, tensor table"
    if row.tensors is None or not _check_blob(dossier, row.tensors, what, readings):
        return None
    try:
        return TensorTable.decode(readings.path(row.tensors).read_bytes(), where=what)
    except (VpstoreError, OSError) as error:
        found = error.what if isinstance(error, VpstoreError) else str(error.strerror)
        dossier.fault("table", what, expected="a tensor table", found=found, blob=row.tensors)
        return None


def _name_damage(dossier: Dossier, row: FileRecord, table: TensorTable | None, fault: str, readings: Readings) -> None:
    tensors: list[str] = []
    if table is not None and fault != MISSING:
        with suppress(OSError):  # then the blob's own fault says so
            tensors = list(damaged_parts(readings.path(row.digest), table)) or [""]  # only bytes after the last tensor
    for tensor in tensors:
        dossier.damaged_tensor(row.path, tensor, blob=row.digest, found=fault)
    if not tensors:
        _check_blob(dossier, row.digest, row.path, readings)


def _compare_tables(dossier: Dossier, row: FileRecord, recorded: TensorTable | None, derived: TensorTable) -> None:
    what = f"{row.path}, tensor table"
    names = []
    if recorded is not None:
        every = sorted(recorded.by_name.keys() | derived.by_name.keys())
        names = [name for name in every if recorded.by_name.get(name) != derived.by_name.get(name)]
    told = f"; {len(names)} tensors differ, the first is {names[0]}" if names else ""
    dossier.fault(
        "table",
        what,
        expected=f"{Digest.of(derived.encode())}, the table of its shard",
        found=f"{row.tensors}{told}",
        blob=row.tensors or "",
    )


def _check_entry(dossier: Dossier, manifest: Manifest) -> None:
    """The recipe's own module must be among the files that the key covers."""
    module = manifest.build.entry.replace(".", "/")
    expected = (f"{module}.py", f"{module}/__init__.py")
    if not any(row.path in expected for row in manifest.build.recipe_files):
        paths = ", ".join(row.path for row in manifest.build.recipe_files[:5])
        dossier.fault("recipe", f"recipe {manifest.build.entry}", expected=expected[0], found=paths or "no files")


def _check_provenance(dossier: Dossier, manifest: Manifest, readings: Readings) -> None:
    row = manifest.provenance
    if row is None:
        _check_verbatim(dossier, manifest, readings)
        return
    expected = manifest.build.readable()
    if not readings.fault(row.digest) and row.digest != Digest.of(expected):
        dossier.fault(
            "provenance",
            PROVENANCE_FILE,
            expected=f"{Digest.of(expected)}, the manifest's build record in readable form",
            found=row.digest,
            blob=row.digest,
        )


def _check_verbatim(dossier: Dossier, manifest: Manifest, readings: Readings) -> None:
    """Without a provenance.json an artifact is a donor as it came: its files are the sources that the record pins."""
    pinned = {source.role.partition("/")[2]: source for source in manifest.build.sources}
    for row in manifest.files:
        source = pinned.get(row.path)
        if source is None and not row.path.startswith(REPORTS):
            dossier.fault(
                "source",
                row.path,
                expected=f"a file of the donor, or a {PROVENANCE_FILE} beside it",
                found="a file that no source of the build record is",
                blob=row.digest,
            )
        elif source is not None and not readings.fault(row.digest):
            found, size = readings.sha256(row.digest), readings.size_bytes(row.digest)
            if found != source.sha256:
                dossier.fault(
                    "source", row.path, expected=f"sha256 {source.sha256}", found=f"sha256 {found}", blob=row.digest
                )
            if source.size_bytes not in (None, size):
                dossier.fault("source", row.path, expected=f"{source.size_bytes} bytes", found=f"{size} bytes")
    if not any(row.path in pinned for row in manifest.files):
        dossier.fault("source", "files", expected=f"a donor's files, or {PROVENANCE_FILE}", found="neither")
