"""lineage: the ancestors of an artifact, from manifest to manifest, back to the donors.

Place in the path: under audit, graph, why, push, pull and reproduce. Reads manifests only, each once and held against
its digest; no other blob is looked at.
Invariants: parents come before their children; a manifest that is missing or damaged is a node with a reason, and its
ancestors are unknown; at most `limit` artifacts are read, and a circle, which digests make infeasible, ends the walk
like any artifact that was already met.

Example:
    for node in walk(store, artifact): print(node.artifact.short, node.reason or node.manifest.ref)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple, Protocol

from vpstore.errors import NoSuchRef, VpstoreError
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import FileRecord, InputRecord, Manifest
from vpstore.schema.ref import Ref
from vpstore.schema.shard_index import Places, is_index, locate, parse_index
from vpstore.schema.tensor_table import TensorRow, TensorTable
from vpstore.storage.prefixes import by_prefix
from vpstore.storage.store import Store
from vpstore.workspace import Workspace

MAX_ARTIFACTS: Final = 4_000  # of one lineage; a chain has dozens, a forged one could go on


class Manifests(Protocol):
    """Where manifests come from: a Store."""

    def manifest(self, artifact: Digest, *, what: str = "") -> Manifest:
        """The manifest of an artifact, verified.

        Raises:  VpstoreError: missing, damaged or not acceptable.
        """


@dataclass(frozen=True)
class Node:
    """One artifact of a lineage."""

    artifact: Digest
    manifest: Manifest | None
    reason: str = ""  # why there is no manifest

    @property
    def inputs(self) -> tuple[InputRecord, ...]:
        """The parents as recorded, by role; none if the manifest is not known."""
        return () if self.manifest is None else self.manifest.build.inputs

    @property
    def name(self) -> str:
        """object@stage, or the digest's beginning where the manifest is not known."""
        return str(self.manifest.ref) if self.manifest is not None else self.artifact.short


class TreeLine(NamedTuple):
    """One line of a lineage as a tree: what stands before it, and which node it shows in which role."""

    indent: str  # box-drawing characters and spaces
    role: str  # of the node for the one it stands under; "" for the top
    node: Node
    above: tuple[str, ...]  # roles of parents that have a line further up and none below this one


@dataclass(frozen=True)
class Lineage:
    """An artifact and all its ancestors."""

    top: Digest
    nodes: Mapping[Digest, Node]  # parents first; the last one is the top

    def __iter__(self) -> Iterator[Node]:
        """Every node, parents first."""
        return iter(self.nodes.values())

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """The manifests that are known, parents first."""
        return tuple(node.manifest for node in self if node.manifest is not None)

    @cached_property
    def generations(self) -> Mapping[Digest, int]:
        """For each artifact, how many stand one behind the other in its longest line of ancestors."""
        found: dict[Digest, int] = {}
        for node in self:
            found[node.artifact] = max((found.get(row.artifact, 0) + 1 for row in node.inputs), default=0)
        return found

    def tree(self) -> list[TreeLine]:
        """The top, below it its parents, below each of them theirs; every artifact once.

        Parents with short lines of ancestors come first, so that the long line of a chain runs at the end.
        """
        lines: list[TreeLine] = []
        seen = {self.top}
        waiting = [("", "", "", self.nodes[self.top])]
        while waiting:
            indent, rest, role, node = waiting.pop()
            below: list[InputRecord] = []
            above: list[InputRecord] = []
            for row in sorted(node.inputs, key=lambda row: (self.generations[row.artifact], row.role)):
                (above if row.artifact in seen else below).append(row)
                seen.add(row.artifact)
            lines.append(TreeLine(indent, role, node, tuple(sorted(row.role for row in above))))
            for row in reversed(below):
                is_last = row is below[-1]
                branch, going_on = ("└─ ", "   ") if is_last else ("├─ ", "│  ")
                waiting.append((rest + branch, rest + going_on, row.role, self.nodes[row.artifact]))
        return lines


def walk(store: Manifests, artifact: Digest, *, limit: int = MAX_ARTIFACTS) -> Lineage:
    """The lineage of one artifact.

    Args:    limit: how many artifacts are read at most; those beyond it are nodes that say so.
    """
    return walk_all(store, [artifact], limit=limit)[0]


def walk_all(store: Manifests, artifacts: Sequence[Digest], *, limit: int = MAX_ARTIFACTS) -> tuple[Lineage, ...]:
    """The lineage of each of several artifacts; a manifest that they share is read once."""
    known: dict[Digest, Node] = {}
    return tuple(Lineage(artifact, _ordered(store, artifact, known, limit)) for artifact in artifacts)


def _ordered(store: Manifests, top: Digest, known: dict[Digest, Node], limit: int) -> dict[Digest, Node]:
    """Depth first with a stack of its own: a chain may be longer than Python's."""
    nodes: dict[Digest, Node] = {}  # every artifact that was met
    done: dict[Digest, Node] = {}
    waiting = [top]
    while waiting:
        artifact = waiting[-1]
        if artifact in nodes:
            waiting.pop()
            done.setdefault(artifact, nodes[artifact])
            continue
        if len(nodes) >= limit:
            nodes[artifact] = Node(artifact, None, f"not looked at: more than {limit} ancestors")
            continue
        node = nodes[artifact] = known[artifact] if artifact in known else _read(store, artifact)
        known[artifact] = node
        waiting.extend(row.artifact for row in reversed(node.inputs) if row.artifact not in nodes)
    return done


def _read(store: Manifests, artifact: Digest) -> Node:
    try:
        return Node(artifact, store.manifest(artifact))
    except VpstoreError as error:
        return Node(artifact, None, f"{error.what}: {error.found}" if error.found else error.what)


def tensor_rows(store: Store, manifest: Manifest) -> dict[str, tuple[FileRecord, TensorRow]]:
    """Every tensor of an artifact by name, with the shard that has it.

    Raises:  as `tensor_places`.
    """
    rows = tensor_places(store, manifest).rows
    return {name: (manifest.by_path[path], row) for name, (path, row) in rows.items()}


def tensor_places(store: Store, manifest: Manifest) -> Places:
    """The shard of every tensor of an artifact, by its tensor tables and the indexes among its files.

    Raises:  BlobMissing, DigestMismatch, BadManifest: of a table or an index; BadManifest: they contradict each other.
    """
    tables, indexes = {}, {}
    for file in manifest.files:
        if file.tensors is not None:
            label = f"{manifest.ref}, tensor table of {file.path}"
            tables[file.path] = TensorTable.decode(store.blobs.read(file.tensors, what=label), where=label)
        elif is_index(file.path):
            label = f"{manifest.ref}, {file.path}"
            indexes[file.path] = parse_index(store.blobs.read(file.digest, what=label), where=label)
    return locate(tables, indexes, where=str(manifest.ref))


def find_artifact(work: Workspace, ref: Ref) -> Digest:
    """Which artifact a ref means here, by the pointer, else by the lock, or by its digest; nothing of it is verified.

    Raises:  NoSuchRef: nothing is built or locked, or a prefix means none or several; BadManifest: a damaged pointer.
    """
    if ref.prefix is not None:
        return by_prefix(work.store, ref)
    stage = work.checkout.objects.find(ref)
    pointer = work.checkout.pointers.read(stage)
    if pointer is not None:
        return pointer.artifact
    entry = work.checkout.lock().entry(work.checkout.profile, stage)
    if entry is not None:
        return entry.artifact
    raise NoSuchRef(
        "nothing is built or locked under this name",
        where=f"{stage}, profile {work.checkout.profile}",
        expected=f"a pointer {work.checkout.relative(work.checkout.pointers.path(stage))} or an entry in the lock",
        next_step=work.how_to_have(stage),
    )
