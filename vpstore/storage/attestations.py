"""Attestations on disk: `attestations/<artifact>/<digest of the file>.json`, and `.dsse` for signed ones.

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
from vpstore.schema.canonical import parse_canonical
from vpstore.schema.digest import Digest, is_hex
from vpstore.schema.dsse import Envelope
from vpstore.schema.reproduction import PREDICATE_TYPE, Reproduction
from vpstore.storage import atomic, beneath
from vpstore.storage.refusals import read_plain

SUFFIX = ".json"
ENVELOPE_SUFFIX = ".dsse"


@dataclass(frozen=True)
class Attestations:
    """The attestations under one root."""

    root: Path
    tmp: Path

    def folder(self, artifact: Digest) -> Path:
        """Where the statements about one artifact lie."""
        return self.root / artifact.hex

    def add(self, statement: Statement | Reproduction) -> Digest:
        """Store one statement, of a build or of a reproduction."""
        data = statement.encode()
        digest = Digest.of(data)
        target = self.folder(statement.artifact) / (digest.hex + SUFFIX)
        if target.is_symlink() or not target.is_file() or target.read_bytes() != data:
            beneath.make_plain_directory(target.parent, self.root)
            atomic.write_file(target, data, folder=self.tmp)
        atomic.fsync_up(target.parent, self.root)
        return digest

    def envelope_path(self, artifact: Digest, envelope: Envelope) -> Path:
        """Where an envelope about an artifact lies, whether or not it is there."""
        return self.folder(artifact) / (Digest.of(envelope.encode()).hex + ENVELOPE_SUFFIX)

    def add_envelope(self, artifact: Digest, envelope: Envelope) -> Path:
        """Store one signed statement about an artifact.

        Returns: its path.
        """
        target, data = self.envelope_path(artifact, envelope), envelope.encode()
        if target.is_symlink() or not target.is_file() or target.read_bytes() != data:
            beneath.make_plain_directory(target.parent, self.root)
            atomic.write_file(target, data, folder=self.tmp)
        atomic.fsync_up(target.parent, self.root)
        return target

    def artifacts(self, prefix: str = "") -> Iterator[Digest]:
        """Every attested artifact whose hex digits begin with `prefix`, in the order of digests.

        An empty folder is what a publish leaves that was killed before the statement: nothing was attested.
        """
        for folder in atomic.entries(self.root):
            is_own = folder.name.startswith(prefix) and is_hex(folder.name, 64) and not folder.is_symlink()
            if is_own and folder.is_dir() and any(folder.iterdir()):
                yield Digest.from_hex(folder.name)

    def paths(self, artifact: Digest) -> Iterator[Path]:
        """The files about one artifact, bare and signed, in the order of names."""
        folder = self.folder(artifact)
        if folder.is_dir() and not folder.is_symlink():
            yield from sorted(path for path in folder.iterdir() if path.suffix in (SUFFIX, ENVELOPE_SUFFIX))

    def files(self, artifact: Digest) -> Iterator[Path]:
        """All that lies in the folder of one artifact, whatever it is called."""
        folder = self.folder(artifact)
        yield from atomic.entries(folder) if not folder.is_symlink() else ()  # behind a link is another store's

    def envelopes(self, artifact: Digest) -> Iterator[Path]:
        """The signed ones alone; `vpstore.signatures` says by whom."""
        return (path for path in self.paths(artifact) if path.suffix == ENVELOPE_SUFFIX)

    def read(self, path: Path) -> Statement | Reproduction:
        """One statement, held against its name and its subject; which of the two, its predicate type says.

        Raises:  DigestMismatch, BadManifest.
        """
        data = read_plain(path, "reading an attestation")
        if Digest.of(data).hex != path.stem:
            raise DigestMismatch(
                "an attestation does not match its name", where=str(path), expected=path.stem, found=Digest.of(data).hex
            )
        if path.suffix == ENVELOPE_SUFFIX:
            data = Envelope.decode(data, where=str(path)).payload
        statement = _decode(data, where=str(path))
        if statement.artifact.hex != path.parent.name:
            raise DigestMismatch(
                "an attestation is about another artifact",
                where=str(path),
                expected=path.parent.name,
                found=statement.artifact.hex,
            )
        return statement

    def of(self, artifact: Digest) -> tuple[Statement, ...]:
        """The sound bare statements that a build gave an artifact, oldest first; damaged ones are left to `verify`."""
        return tuple(statement for statement in self._sound(artifact) if isinstance(statement, Statement))

    def reproductions(self, artifact: Digest) -> tuple[Reproduction, ...]:
        """The sound bare statements about building an artifact again, oldest first."""
        return tuple(statement for statement in self._sound(artifact) if isinstance(statement, Reproduction))

    def _sound(self, artifact: Digest) -> list[Statement | Reproduction]:
        found = []
        for path in self.paths(artifact):
            if path.suffix != SUFFIX:
                continue
            try:
                found.append(self.read(path))
            except VpstoreError:
                continue
        return sorted(found, key=lambda statement: (statement.facts.finished_unix, statement.encode()))


def _decode(data: bytes, *, where: str) -> Statement | Reproduction:
    document = parse_canonical(data, where=where)
    is_reproduction = isinstance(document, dict) and document.get("predicateType") == PREDICATE_TYPE
    return (Reproduction if is_reproduction else Statement).decode(data, where=where)
