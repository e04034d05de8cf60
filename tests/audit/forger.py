"""A forger: somebody who may write the store and the checkout, knows the formats, and leaves nothing that contradicts.

Works with the program's own classes, so that whatever a forgery lacks was left out on purpose.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from small_project import Project

from vpstore.schema.attestation import BuildFacts, Statement
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import PROVENANCE_FILE, BuildRecord, FileRecord, InputRecord, Manifest
from vpstore.storage.pointers import Pointer, Pointers
from vpstore.storage.stamps import Stamps
from vpstore.storage.store import Store
from vpstore.storage.tables import read_table

FACTS = BuildFacts("2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z", 1767225601, 1.0, {"device": "cpu"},
                   {"commit": None, "dirty": None}, {"vpstore": "0", "python": "3"})  # fmt: skip


class Forger:
    """Forges in one project."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.store = Store.open(project.store, stamps=Stamps(project.cache / "forger"))
        self.pointers = Pointers(project.root / "weights" / "tiny" / "refs", project.root)

    def artifact(self, slug: str) -> Digest:
        return Digest(self.project.pointed(slug)["artifact"])

    def manifest(self, slug: str) -> Manifest:
        return self.store.manifest(self.artifact(slug))

    def with_file(self, manifest: Manifest, path: str, data: bytes) -> Manifest:
        """The manifest with other bytes of one file, its table too, stored and described truly."""
        digest = self.store.blobs.put_bytes(data)
        old = manifest.by_path[path]
        table = old.tensors
        if table is not None:
            table = self.store.blobs.put_bytes(read_table(self.store.blobs.path(digest), where=path).encode())
        row = FileRecord(path, old.media_type, digest, len(data), table)
        return replace(manifest, files=tuple(row if file.path == path else file for file in manifest.files))

    def with_tensor(self, manifest: Manifest, path: str = "model.safetensors") -> Manifest:
        """The manifest with one bit of one tensor changed, and everything about it right."""
        data = bytearray(self.store.blobs.path(manifest.by_path[path].digest).read_bytes())
        header_end = 8 + struct.unpack("<Q", data[:8])[0]
        data[header_end + 3] ^= 1
        return self.with_file(manifest, path, bytes(data))

    def with_build(self, manifest: Manifest, build: BuildRecord) -> Manifest:
        """The manifest with another build record, its provenance.json written anew."""
        manifest = replace(manifest, build=build)
        if PROVENANCE_FILE in manifest.by_path:
            manifest = self.with_file(manifest, PROVENANCE_FILE, build.readable())
        return manifest

    def parent(self, role: str, artifact: Digest) -> InputRecord:
        """An artifact as a parent, described truly."""
        return InputRecord(role, artifact, self.store.manifest(artifact).content)

    def publish(self, manifest: Manifest) -> Digest:
        """Store manifest, attestation and key file as a build would."""
        self.store.blobs.put_bytes(manifest.encoded)
        self.store.attestations.add(Statement.of(manifest, FACTS))
        self.store.keys.add(manifest.build.key(), manifest.digest)
        return manifest.digest

    def point(self, manifest: Manifest) -> None:
        """Rewrite the pointer."""
        self.pointers.write(Pointer(manifest.ref, manifest.digest, manifest.build.key(), manifest.content))

    def forget(self, manifest: Manifest) -> None:
        """Remove every trace of the true artifact from the store."""
        self.store.blobs.path(manifest.digest).unlink()
        shutil.rmtree(self.store.attestations.folder(manifest.digest))
        (self.store.keys.folder(manifest.build.key()) / manifest.digest.hex).unlink()

    def replace_artifact(self, slug: str, change: Callable[[Manifest], Manifest]) -> Manifest:
        """Put a changed artifact in the place of the true one, which is forgotten."""
        old = self.manifest(slug)
        new = change(old)
        self.publish(new)
        self.point(new)
        self.forget(old)
        return new

    def relink(self, slug: str, before: Digest, after: Digest) -> Manifest:
        """Make a child name another parent, re-hashed and re-registered."""

        def change(manifest: Manifest) -> Manifest:
            inputs = tuple(
                self.parent(row.role, after if row.artifact == before else row.artifact)
                for row in manifest.build.inputs
            )
            return self.with_build(manifest, replace(manifest.build, inputs=inputs))

        return self.replace_artifact(slug, change)

    def edit_lock(self, ref: str, **parts: str) -> None:
        """Change parts of one entry of vpstore.lock."""
        path = self.project.root / "vpstore.lock"
        document = json.loads(path.read_text())
        document["profiles"]["tiny"][ref].update(parts)
        path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")

    def accept(self, manifest: Manifest) -> None:
        """Make the lock say that the artifact is the agreed one."""
        build = manifest.build
        self.edit_lock(
            str(manifest.ref), artifact=manifest.digest, key=build.key(), code=build.code_digest(),
            params=build.params_digest(), content=manifest.content,
        )  # fmt: skip


def overwrite(path: Path, data: bytes) -> None:
    """Other bytes under the same name, with the old mode and the old mtime."""
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(before.st_mode & 0o777)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
