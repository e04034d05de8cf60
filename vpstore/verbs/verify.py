"""verify: read everything again and list all that is not what it should be.

Place in the path: resolve -> materialize -> **verify**. Trusts no stamp (unless asked to be quick), no mode and no
time; reads on all cores; stops at nothing.
Invariants: reads only; faults are complete and sorted; a damaged shard's fault names the damaged tensors.

Example:
    faults = verify(work, [StageRef("vpMoE", "smoke")])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from vpstore.claims import contradictions
from vpstore.errors import BadManifest, UsageError, VpstoreError
from vpstore.evidence.verification import Verification
from vpstore.schema.digest import Digest
from vpstore.schema.fault import Fault
from vpstore.schema.manifest import PROVENANCE_FILE, FileRecord, Manifest
from vpstore.schema.ref import StageRef
from vpstore.schema.tensor_table import TensorTable
from vpstore.signatures import open_envelope
from vpstore.storage.attestations import ENVELOPE_SUFFIX
from vpstore.storage.tables import damaged_parts, read_layout
from vpstore.workspace import Workspace


def verify(
    work: Workspace, refs: Sequence[StageRef], *, everything: bool = False, quick: bool = False
) -> tuple[Fault, ...]:
    """Verify refs, and with `everything` also each blob, key and attestation of the store.

    Args:    refs: stages of this profile that have a pointer or a lock entry; quick: believe valid stat stamps where
             only a blob's digest is in question; documents, keys, attestations and links are read all the same.
    Returns: all faults, sorted; empty if all is well.
    """
    run = Verification(work, is_quick=quick)
    every = list(work.store.blobs.all(refused=lambda error: run.refused("store", error))) if everything else []
    run.read_ahead([*every, *_needed(work, refs)])
    for number, ref in enumerate(refs):
        work.narrator.progress("verify", number, len(refs))
        with run.going_on(str(ref)):
            _verify_ref(run, ref)
    if everything:
        _verify_store(run, every)
    work.narrator.progress("verify", len(refs), len(refs))
    return run.sorted()


def _needed(work: Workspace, refs: Sequence[StageRef]) -> Iterator[Digest]:
    """Every blob that will be asked for, as far as that can be told; what is missed here is read one by one later."""
    lock = None
    for ref in refs:
        with suppress(VpstoreError):
            pointer = work.checkout.pointers.read(ref)
            lock = lock or work.checkout.lock()
            entry = pointer or lock.entry(work.checkout.profile, ref)
            if entry is not None:
                yield entry.artifact
                yield from work.store.manifest(entry.artifact).blobs()


def verifiable(work: Workspace) -> tuple[StageRef, ...]:
    """Every declared stage that has a pointer or a lock entry, in the order of stages."""
    locked = work.checkout.lock().profiles.get(work.checkout.profile, {})
    order = work.checkout.objects.order
    return tuple(ref for ref in order if ref in locked or work.checkout.pointers.path(ref).exists())


def _verify_ref(run: Verification, ref: StageRef) -> None:
    work = run.work
    what = "a sound pointer"
    try:
        pointer = work.checkout.pointers.read(ref)
        what = "a sound lock"
        entry = work.checkout.lock().entry(work.checkout.profile, ref)
    except VpstoreError as error:
        run.add(f"{ref}: {error.where}", expected=error.expected or what, found=error.found or error.what)
        return
    if pointer is not None:
        artifact, claimed, content = pointer.artifact, pointer.key, pointer.content
    elif entry is not None:
        artifact, claimed, content = entry.artifact, entry.key, entry.content
    else:
        run.add(str(ref), expected="a pointer or a lock entry", found="neither")
        return
    manifest = verify_artifact(run, artifact, label=str(ref))
    if manifest is None:
        return
    if manifest.ref != ref:
        run.add(f"{ref}: manifest", expected=str(ref), found=str(manifest.ref), blob=artifact)
    if manifest.build.key() != claimed:
        run.add(f"{ref}: pointer", expected=manifest.build.key(), found=claimed)
    if content not in (None, manifest.content):
        run.add(f"{ref}: pointer, content", expected=manifest.content, found=str(content))
    run.told.add(work.store.keys.folder(manifest.build.key()) / artifact.hex)
    if manifest.digest not in work.store.keys.artifacts(manifest.build.key()):
        run.add(f"{ref}: key file", expected=f"{manifest.build.key()} -> {artifact}", found="missing or damaged")
    _verify_attestations(run, artifact, label=str(ref))


def verify_artifact(run: Verification, artifact: Digest, *, label: str) -> Manifest | None:
    """Verify one artifact: its manifest, and every blob and table that it names.

    Returns: the manifest, or None if it cannot be read.
    """
    if fault := run.blob_fault(artifact):
        run.add(f"{label}: manifest", expected=artifact, found=fault, blob=artifact)
        return None
    try:
        manifest = run.work.store.manifest(artifact, what=label)
    except VpstoreError as error:
        run.add(f"{label}: manifest", expected=error.expected, found=error.found or error.what, blob=artifact)
        return None
    for row in manifest.files:
        _verify_file(run, row, label=label)
    for part in manifest.intermediates:
        _verify_blob(run, part.digest, where=f"{label}: intermediate {part.name}")
    for source in manifest.build.recipe_files:
        _verify_blob(run, source.digest, where=f"{label}: recipe file {source.path}")
    for one in contradictions(run.work.store, manifest):
        run.add_claim(label, one)
    _verify_provenance(run, manifest, label=label)
    return manifest


def _verify_blob(run: Verification, digest: Digest, *, where: str) -> bool:
    if fault := run.blob_fault(digest):
        run.add(where, expected=digest, found=fault, blob=digest)
        return False
    return True


def _verify_file(run: Verification, row: FileRecord, *, label: str) -> None:
    where = f"{label}: {row.path}"
    table = None
    if row.tensors is not None and _verify_blob(run, row.tensors, where=f"{where}, tensor table"):
        table = _read_table(run, row.tensors, where=f"{where}, tensor table")
    fault = run.blob_fault(row.digest)
    if fault:
        for tensor in _damaged_tensors(run, row, table):
            run.add(where, expected=row.digest, found=fault, blob=row.digest, tensor=tensor)
        return
    path = run.work.store.blobs.path(row.digest)
    if (size := path.stat().st_size) != row.size_bytes:
        run.add(where, expected=f"{row.size_bytes} bytes", found=f"{size} bytes", blob=row.digest)
    if table is not None and not _describes(table, path, where=where):
        run.add(f"{where}, tensor table", expected="the table of its shard", found="another", blob=row.tensors or "")


def _read_table(run: Verification, digest: Digest, *, where: str) -> TensorTable | None:
    try:
        return TensorTable.decode(run.work.store.blobs.read(digest), where=where)
    except VpstoreError as error:
        run.add(where, expected=error.expected, found=error.found or error.what, blob=digest)
        return None


def _describes(table: TensorTable, shard: Path, *, where: str) -> bool:
    """Whether a table has the spans of a shard's header; the shard's bytes were already found whole."""
    try:
        layout = read_layout(shard, where=where)
    except BadManifest:
        return False
    return layout.header_end == table.header[0] and layout.tensors == tuple(row.span for row in table.tensors)


def _damaged_tensors(run: Verification, row: FileRecord, table: TensorTable | None) -> Iterable[str]:
    path = run.work.store.blobs.path(row.digest)
    if table is None or not path.is_file():
        return [""]
    with suppress(OSError):  # the fault says why
        return list(damaged_parts(path, table)) or [""]  # only bytes after the last tensor differ
    return [""]


def _verify_provenance(run: Verification, manifest: Manifest, *, label: str) -> None:
    row = manifest.provenance
    if row is None or run.blob_fault(row.digest):
        return
    try:
        is_derived = run.work.store.blobs.read(row.digest) == manifest.build.readable()
    except VpstoreError as error:  # its stamp was believed, or it changed a moment ago
        run.add(f"{label}: {PROVENANCE_FILE}", expected=row.digest, found=error.found or error.what, blob=row.digest)
        return
    if not is_derived:
        run.add(f"{label}: {PROVENANCE_FILE}", expected="the manifest's build record", found="another", blob=row.digest)


def _verify_attestations(run: Verification, artifact: Digest, *, label: str) -> None:
    count = 0
    run.told.add(artifact)
    for path in run.work.store.attestations.paths(artifact):
        try:
            run.work.store.attestations.read(path)
            if path.suffix == ENVELOPE_SUFFIX:
                open_envelope(path.read_bytes(), run.keys, where=path.name)
            count += 1
        except UsageError:  # of the trusted keys: no fault of the store
            raise
        except VpstoreError as error:
            run.add(f"{label}: attestation {path.name}", expected=error.expected, found=error.found or error.what)
    if count == 0:
        run.add(f"{label}: attestations", expected="at least one sound one", found="none")


def _verify_store(run: Verification, blobs: Iterable[Digest]) -> None:
    """Everything else that lies in the store; what was said of it under a ref is not said again."""
    store, told = run.work.store, {fault.blob for fault in run.faults}
    for digest in blobs:
        if digest not in told:
            _verify_blob(run, digest, where="store: blob")
    for path in store.blobs.strays():
        run.add(f"store: {path.relative_to(store.root)}", expected="a blob's name", found="a stray file")
    for path in store.keys.all():
        if path in run.told:
            continue
        try:
            store.keys.read(path)
        except VpstoreError as error:
            expected, found = error.expected or "a sound key file", error.found or error.what
            run.add(f"store: key {path.name}", expected=expected, found=found)
    with run.going_on("store"):
        for artifact in store.attestations.artifacts():
            if artifact not in run.told:
                _verify_attestations(run, artifact, label=f"store: {artifact.short}")
    for damage in store.roots.damage():
        found = damage.found or damage.what
        run.add(f"store: {damage.where}", expected=damage.expected or "a sound root file", found=found)
