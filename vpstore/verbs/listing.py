"""ls and show: what is built, and one artifact in full.

Place in the path: reading verbs over the registry. Nothing is verified beyond the manifest.

Example:
    for row in list_built(work): print(row.ref, row.artifact.short)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vpstore.errors import VpstoreError
from vpstore.lineage import tensor_rows
from vpstore.schema.attestation import Statement
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import FileRecord, Manifest
from vpstore.schema.ref import StageRef
from vpstore.schema.reproduction import Reproduction
from vpstore.schema.tensor_table import TensorRow
from vpstore.signatures import Signed, examine, load_usable_keys
from vpstore.workspace import LockStatus, Workspace


@dataclass(frozen=True)
class Listed:
    """One built stage."""

    ref: StageRef
    artifact: Digest
    key: Digest
    size_bytes: int | None  # None: the manifest cannot be read, and verify says why
    locked: LockStatus

    def to_json(self) -> dict[str, Any]:
        """The row as `ls --json` prints it."""
        return {
            "object": self.ref.object,
            "stage": self.ref.stage,
            "artifact": self.artifact,
            "key": self.key,
            "size_bytes": self.size_bytes,
            "locked": self.locked,
        }


@dataclass(frozen=True)
class Shown:
    """One artifact with its parents and who attested it."""

    manifest: Manifest
    inputs: tuple[dict[str, Any], ...]
    attestations: tuple[Statement, ...]
    signatures: tuple[Signed, ...] = ()
    reproductions: tuple[Reproduction, ...] = ()
    tensors: tuple[tuple[FileRecord, TensorRow], ...] | None = None  # by name; None if nobody asked for them

    def to_json(self) -> dict[str, Any]:
        """The document as `show --json` prints it."""
        manifest = self.manifest
        tensors = None if self.tensors is None else [_tensor(file, row) for file, row in self.tensors]
        return {
            **({} if tensors is None else {"tensors": tensors}),
            "artifact": manifest.digest,
            "key": manifest.build.key(),
            "size_bytes": manifest.size_bytes,
            "manifest": {
                "object": manifest.object,
                "stage": manifest.stage,
                "build": manifest.build.to_json(),
                "files": [row.to_json() for row in manifest.files],
                "intermediates": [row._asdict() for row in manifest.intermediates],
            },
            "inputs": list(self.inputs),
            "attestations": [statement.document for statement in self.attestations],
            "reproductions": [statement.document for statement in self.reproductions],
            "signatures": [
                {
                    "envelope": f"blake3:{row.path.stem}",
                    "signers": list(row.signers),
                    "keyids": list(row.keyids),
                    "fault": None if row.fault is None else row.fault.what,
                }
                for row in self.signatures
            ],
        }


def _tensor(file: FileRecord, row: TensorRow) -> dict[str, Any]:
    return {"name": row.name, "dtype": row.dtype, "shape": list(row.shape), "digest": row.digest, "file": file.path}


def list_built(work: Workspace) -> tuple[Listed, ...]:
    """Every declared stage with a sound pointer, in the order of stages; damaged pointers are said aloud."""
    rows = []
    for ref in work.checkout.objects.order:
        try:
            pointer = work.checkout.pointers.read(ref)
        except VpstoreError as error:
            work.narrator.warn(f"{ref}: {error.what} ({error.where})")
            continue
        if pointer is not None:
            status = work.lock_status(ref, pointer.artifact)
            rows.append(Listed(ref, pointer.artifact, pointer.key, _size(work, pointer.artifact), status))
    return tuple(rows)


def show(work: Workspace, manifest: Manifest, *, tensors: bool = False) -> Shown:
    """Gather what is known about one artifact; its tensors only if they are asked for."""
    inputs = tuple(
        {"role": row.role, "artifact": row.artifact, "ref": _name(work, row.artifact)} for row in manifest.build.inputs
    )
    store = work.store.attestations
    is_signed = any(store.envelopes(manifest.digest))
    keys = load_usable_keys(work.checkout, work.narrator) if is_signed else ()
    signed = tuple(examine(store, manifest.digest, keys))
    rows = tensor_rows(work.store, manifest) if tensors else {}
    return Shown(
        manifest,
        inputs,
        store.of(manifest.digest),
        signed,
        store.reproductions(manifest.digest),
        tuple(rows[name] for name in sorted(rows)) if tensors else None,
    )


def _size(work: Workspace, artifact: Digest) -> int | None:
    try:
        return work.store.manifest(artifact).size_bytes
    except VpstoreError:
        return None


def _name(work: Workspace, artifact: Digest) -> str | None:
    """What a parent was built as, if its manifest is here."""
    try:
        return str(work.store.manifest(artifact).ref)
    except VpstoreError:
        return None
