"""Everything that artifacts need, down to the donors.

Place in the path: first step of push, pull, repair and `verify --remote`. Manifests are small and are read into memory
before a byte of a blob moves, so that the whole need is known, shown by a dry run and registered as a root.
Invariants: parents come before children; a manifest is believed only as far as its digest reaches; the number of
artifacts, the depth of the graph and the bytes of manifests are bounded, whatever a remote sends.

Example:
    found = gather({artifact: "vpMoE@smoke"}, local_reader(store)); found.manifests
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Final

from vpstore.errors import BadManifest, BlobMissing, DigestMismatch, VpstoreError
from vpstore.schema.canonical import MAX_BYTES
from vpstore.schema.digest import Digest
from vpstore.schema.lockfile import LockEntry
from vpstore.schema.manifest import Manifest
from vpstore.schema.ref import StageRef
from vpstore.storage import atomic
from vpstore.storage.remotes.base import Remote, blob_name
from vpstore.storage.store import Store

MAX_ARTIFACTS: Final = 4096
MAX_DEPTH: Final = 512
MAX_MANIFEST_BYTES: Final = 512 << 20  # of all manifests that one command reads from a remote

ReadManifest = Callable[[Digest, str], Manifest]  # the artifact, and what to call it in an error


@dataclass(frozen=True)
class Wanted:
    """One artifact that a command is about, and who names it."""

    artifact: Digest
    label: str  # for messages
    ref: StageRef | None = None  # None: named by its digest
    entry: LockEntry | None = None  # the lock's, if that is what names it
    object: str | None = None  # what it must be of, if a digest names it
    is_exact: bool = False  # a person typed all its digits


@dataclass
class Lineage:
    """What a walk found."""

    manifests: dict[Digest, Manifest] = field(default_factory=dict)  # parents first
    labels: dict[Digest, str] = field(default_factory=dict)
    unread: dict[Digest, VpstoreError] = field(default_factory=dict)  # why a manifest cannot be had

    def blobs(self) -> dict[Digest, str]:
        """Every blob besides the manifests, and what it is, in the order of artifacts."""
        found: dict[Digest, str] = {}
        for artifact, manifest in self.manifests.items():
            for digest, what in manifest.blobs().items():
                found.setdefault(digest, f"{self.labels[artifact]}, {what}")
        return found

    def owner(self, digest: Digest) -> Manifest:
        """The artifact by which `blobs` calls a blob: the first that has it."""
        return next(manifest for manifest in self.manifests.values() if digest in manifest.blobs())

    def lacking(self, complete: Collection[Digest]) -> dict[Digest, tuple[str, ...]]:
        """For every artifact, the labels of its ancestors that are not among the complete ones, parents first."""
        missing: dict[Digest, dict[Digest, None]] = {}
        for artifact, manifest in self.manifests.items():
            above: dict[Digest, None] = {}
            for row in manifest.build.inputs:
                above |= missing.get(row.artifact, {})
                above |= {} if row.artifact in complete else {row.artifact: None}
            missing[artifact] = above
        return {artifact: tuple(self.labels[row] for row in above) for artifact, above in missing.items()}

    def sizes(self) -> dict[Digest, int]:
        """The sizes that the manifests state: of files and intermediates; tables and recipe files have none."""
        found: dict[Digest, int] = {}
        for manifest in self.manifests.values():
            found |= {row.digest: row.size_bytes for row in manifest.files}
            found |= {part.digest: part.size_bytes for part in manifest.intermediates}
        return found


def gather(wanted: Mapping[Digest, str], read: ReadManifest, *, ancestors: bool = True) -> Lineage:
    """Read the manifests of artifacts and, with `ancestors`, of all that they were built from.

    Args:    wanted: artifacts and what to call them.
    Returns: what could be read, and why the rest could not.
    Raises:  BadManifest: more artifacts or a deeper graph than is sane; RemoteFailure: of the reader.
    """
    found = Lineage()
    # An artifact is met twice: on the way to its parents, and when they are all in.
    todo: list[tuple[Digest, str, int, Manifest | None]] = []
    todo += [(artifact, name, 0, None) for artifact, name in reversed(list(wanted.items()))]
    while todo:
        artifact, label, depth, manifest = todo.pop()
        if manifest is not None:
            found.manifests[artifact] = manifest
            continue
        if artifact in found.labels:
            continue
        found.labels[artifact] = label
        _mind_bounds(len(found.labels), depth, label)
        try:
            manifest = read(artifact, label)
        except (BlobMissing, DigestMismatch, BadManifest) as error:
            if not error.where.startswith(label):
                error.where = f"{label}: {error.where}"
            found.unread[artifact] = error
            continue
        found.labels[artifact] = _name(label, manifest)
        todo.append((artifact, label, depth, manifest))
        if ancestors:
            parents = [(row.artifact, f"{manifest.ref}, input {row.role}") for row in manifest.build.inputs]
            todo += [(parent, name, depth + 1, None) for parent, name in reversed(parents)]
    return found


def _name(label: str, manifest: Manifest) -> str:
    return label if label.startswith(str(manifest.ref)) else str(manifest.ref)


def _mind_bounds(count: int, depth: int, label: str) -> None:
    if count > MAX_ARTIFACTS or depth > MAX_DEPTH:
        raise BadManifest(
            "a lineage is larger than any that is built here",
            where=label,
            expected=f"at most {MAX_ARTIFACTS} artifacts, {MAX_DEPTH} generations",
        )


@contextmanager
def registered(
    store: Store, artifacts: Collection[Digest], blobs: Collection[Digest] = (), *, is_dry_run: bool
) -> Iterator[None]:
    """Name what is at work on as a root, for as long as the context lasts; a dry run writes nothing."""
    keeping = nullcontext() if is_dry_run else store.roots.running(artifacts=artifacts, blobs=blobs)
    with atomic.disk_errors(store.root, "working on the store"), keeping:
        yield


def local_reader(store: Store) -> ReadManifest:
    """Read manifests of this store."""
    return lambda artifact, label: store.manifest(artifact, what=label)


def fetch_manifest(remote: Remote, artifact: Digest, label: str, *, limit: int = MAX_BYTES) -> Manifest:
    """Read one manifest from a remote into memory.

    Raises:  BlobMissing, DigestMismatch, BadManifest; RemoteFailure: also if it is larger than `limit` bytes.
    """
    where = f"manifest of {label}, {remote.label}"
    try:
        data = remote.read(blob_name(artifact), limit=limit)
    except BlobMissing as error:
        error.where, error.expected = where, artifact
        error.next_step = "`vpstore push` where it was built, or `vpstore verify --remote`"
        raise
    if (found := Digest.of(data)) != artifact:
        raise DigestMismatch(
            "a manifest on the remote does not match its digest",
            where=where,
            expected=artifact,
            found=f"{found}, {len(data)} bytes",
            next_step="`vpstore repair --to-remote REMOTE` where the artifact is whole",
        )
    return Manifest.decode(data, where=where)


class RemoteReader:
    """Reads manifests from the store where they are whole, else from a remote into memory; nothing is written."""

    def __init__(self, store: Store, remote: Remote) -> None:
        self._store, self._remote = store, remote
        self._left = MAX_MANIFEST_BYTES
        self._fetched: dict[Digest, Manifest] = {}

    def __call__(self, artifact: Digest, label: str) -> Manifest:
        """The manifest of one artifact.

        Raises:  BlobMissing, DigestMismatch, BadManifest; RemoteFailure.
        """
        if artifact not in self._fetched:
            if self._store.blobs.is_whole(artifact):
                return self._store.manifest(artifact, what=label)
            manifest = fetch_manifest(self._remote, artifact, label, limit=min(MAX_BYTES, self._left))
            self._left -= len(manifest.encoded)
            self._fetched[artifact] = manifest
        return self._fetched[artifact]
