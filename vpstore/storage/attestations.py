"""Attestations on disk: `attestations/<artifact>/<digest of the statement>.json`.

Place in the path: written by publish between the manifest and the key; read by the build cache, `show` and `audit`.
Invariants: a bare statement's file is named by the digest of its bytes, so that a damaged one shows; adding the same
statement twice adds nothing.

Example:
    store.attestations.add(statement); store.attestations.of(artifact)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vpstore.errors import DigestMismatch, VpstoreError
from vpstore.schema.attestation import Statement
from vpstore.schema.digest import Digest
from vpstore.storage import atomic

SUFFIX = ".json"


@dataclass(frozen=True)
class Attestations:
    """The attestations under one root."""

    root: Path
    tmp: Path

    def folder(self, artifact: Digest) -> Path:
        """Where the statements about one artifact lie."""
        return self.root / artifact.hex

    def add(self, statement: Statement) -> Digest:
        """Store one statement."""
        data = statement.encode()
        digest = Digest.of(data)
        target = self.folder(statement.artifact) / (digest.hex + SUFFIX)
        if not target.is_file() or target.read_bytes() != data:
            atomic.make_directory(target.parent)
            atomic.write_file(target, data, folder=self.tmp)
        return digest

    def artifacts(self, prefix: str = "") -> Iterator[Digest]:
        """Every attested artifact whose hex digits begin with `prefix`, in the order of digests."""
        for folder in sorted(self.root.glob(f"{prefix}*")):
            if len(folder.name) == 64:
                yield Digest.from_hex(folder.name)

    def paths(self, artifact: Digest) -> Iterator[Path]:
        """The files about one artifact, in the order of names."""
        folder = self.folder(artifact)
        if folder.is_dir():
            yield from sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)

    def read(self, path: Path) -> Statement:
        """One statement, held against its name and its subject.

        Raises:  DigestMismatch, BadManifest.
        """
        data = path.read_bytes()
        if Digest.of(data).hex != path.stem:
            raise DigestMismatch(
                "an attestation does not match its name", where=str(path), expected=path.stem, found=Digest.of(data).hex
            )
        statement = Statement.decode(data, where=str(path))
        if statement.artifact.hex != path.parent.name:
            raise DigestMismatch(
                "an attestation is about another artifact",
                where=str(path),
                expected=path.parent.name,
                found=statement.artifact.hex,
            )
        return statement

    def of(self, artifact: Digest) -> tuple[Statement, ...]:
        """The sound statements about one artifact, oldest first; damaged ones are left to `verify`."""
        found = []
        for path in self.paths(artifact):
            try:
                found.append(self.read(path))
            except VpstoreError:
                continue
        return tuple(sorted(found, key=lambda statement: (statement.facts.finished_unix, statement.encode())))
