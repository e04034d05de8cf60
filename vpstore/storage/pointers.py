"""Pointers: which artifact each object@stage of a checkout is now.

Place in the path: build writes one last of all, resolve starts from it, DVC has it as the stage's out. A pointer holds
key and content, so that its bytes stay when a parent is another artifact of equal content, and DVC stops there. Which
artifact that is, a second file beside it says, which DVC does not know.
Invariants: a pointer is whole or absent; its file name, object and stage agree; the second file has the artifact of the
pointer at every moment, as it keeps the ones before, too; rewriting an equal pointer does not touch the file, so that
nothing downstream looks changed.

Example:
    checkout.pointers.read(StageRef("vpMoE", "smoke")).artifact
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from vpstore.errors import BadManifest, VpstoreError
from vpstore.schema.canonical import parse_strict, readable_bytes
from vpstore.schema.digest import Digest
from vpstore.schema.fields import Fields
from vpstore.schema.ref import StageRef, check_name
from vpstore.storage import atomic, beneath

FORMAT: Final = 2
ARTIFACT_SUFFIX: Final = ".artifact"
_REMEMBERED: Final = 8  # pointers before the last one, for who brings an old one back
LOCK: Final = ".refs"  # held by the one who writes reports and the pointer of a stage of this profile


@dataclass(frozen=True)
class Pointer:
    """One pointer: what a checkout has."""

    ref: StageRef
    artifact: Digest
    key: Digest
    content: Digest | None = None  # None: a pointer of format 1, which has the artifact itself

    def encode(self) -> bytes:
        """The bytes of the file that DVC sees."""
        seen = {"artifact": self.artifact} if self.content is None else {"content": self.content}
        version = 1 if self.content is None else FORMAT
        named = {"format": version, "object": self.ref.object, "stage": self.ref.stage}
        return readable_bytes({**named, "key": self.key, **seen})

    @classmethod
    def decode(cls, data: bytes, *, where: str, artifacts: Iterable[Known] = ()) -> Pointer:
        """Read a pointer.

        Args:    artifacts: the rows of the file beside it.
        Raises:  BadManifest: not JSON, a missing or unknown field, a digest or name of the wrong form; nothing says
                 which artifact it is.
        """
        fields = Fields(parse_strict(data, where=where), where=where)
        version = fields.format_of((1, FORMAT))
        name = check_name(fields.text("object"), where=where, error=BadManifest)
        ref = StageRef(name, check_name(fields.text("stage"), where=where, error=BadManifest))
        content = None if version == 1 else fields.digest("content")
        artifact = fields.digest("artifact") if version == 1 else None
        key = fields.digest("key")
        fields.done()
        for row in artifacts:
            if (row.key, row.content) == (key, content):
                artifact = row.artifact
        if artifact is None:
            expected = f"a row with its key and content in the file {ARTIFACT_SUFFIX} beside it"
            raise BadManifest("nothing says which artifact a pointer is", where=where, expected=expected)
        return cls(ref, artifact, key, content)


class Known(NamedTuple):
    """One row of the second file: an artifact by what a pointer says of it."""

    artifact: Digest
    content: Digest
    key: Digest

    @classmethod
    def of(cls, pointer: Pointer) -> Known | None:
        """The row of a pointer; None for one that has the artifact itself."""
        return None if pointer.content is None else cls(pointer.artifact, pointer.content, pointer.key)


def encode_known(rows: Iterable[Known]) -> bytes:
    """The bytes of the second file."""
    return readable_bytes({"format": FORMAT, "artifacts": [row._asdict() for row in rows]})


def decode_known(data: bytes, *, where: str) -> tuple[Known, ...]:
    """The rows of the second file, the newest last.

    Raises:  BadManifest: not of its form.
    """
    fields = Fields(parse_strict(data, where=where), where=where)
    fields.format(FORMAT)
    rows = fields.each("artifacts", lambda row: Known(*(row.digest(name) for name in Known._fields)))
    fields.done()
    return rows


def read_pointer(path: Path) -> Pointer:
    """The pointer in a file, with what the file beside it says.

    Raises:  FileNotFoundError: there is none; OSError; BadManifest.
    """
    data = path.read_bytes()
    beside = path.with_suffix(ARTIFACT_SUFFIX)
    try:
        known = decode_known(beside.read_bytes(), where=str(beside))
    except FileNotFoundError:
        known = ()
    return Pointer.decode(data, where=str(path), artifacts=known)


@dataclass(frozen=True)
class Pointers:
    """The pointers of one profile of one checkout."""

    root: Path  # weights/<profile>/refs
    top: Path  # the folder that no way to a pointer leaves

    def path(self, ref: StageRef) -> Path:
        """Where the pointer of `ref` lies."""
        return self.root / f"{ref.slug}.json"

    def read(self, ref: StageRef) -> Pointer | None:
        """The pointer of `ref`, or None if there is none.

        Raises:  BadManifest: damaged, or about another object or stage; VpstoreError: not readable.
        """
        path = self.path(ref)
        with atomic.disk_errors(path, "reading a pointer"):
            try:
                return self._checked(path, ref)
            except FileNotFoundError:
                return None

    def _checked(self, path: Path, ref: StageRef) -> Pointer:
        try:
            pointer = read_pointer(path)
            if pointer.ref != ref:
                raise BadManifest(
                    "a pointer is about another stage", where=str(path), expected=str(ref), found=str(pointer.ref)
                )
        except BadManifest as error:
            error.next_step = f"vpstore build {ref}"
            raise
        return pointer

    def write(self, pointer: Pointer) -> bool:
        """Write a pointer unless it already says so.

        Returns: whether the file changed.
        Raises:  VpstoreError: the folder is not the checkout's own, see `beneath`.
        """
        path = self.path(pointer.ref)
        with beneath.opened(self.top, self.root) as place:
            self._write_known(place, pointer)
            changed = atomic.write_if_different(place / path.name, pointer.encode())
        self.settle()
        return changed

    def _write_known(self, place: Path, pointer: Pointer) -> None:
        """Let the second file have the artifact of this pointer, that of the one that is there, and older ones."""
        new = Known.of(pointer)
        if new is None:
            return
        beside = place / self.path(pointer.ref).with_suffix(ARTIFACT_SUFFIX).name
        rows: tuple[Known, ...] = ()
        with suppress(FileNotFoundError, BadManifest):
            rows = decode_known(beside.read_bytes(), where=str(beside))
        if new not in rows:
            others = [row for row in rows if (row.key, row.content) != (new.key, new.content)]
            rows = (*others[-_REMEMBERED:], new)
        atomic.write_if_different(beside, encode_known(rows))

    def add(self, pointer: Pointer) -> None:
        """Write a pointer where there is none; one that is there stays. Called under `LOCK`.

        Raises:  VpstoreError: as `write`; or a link that leads nowhere lies in its place.
        """
        path = self.path(pointer.ref)
        with beneath.opened(self.top, self.root) as place:
            if not (place / path.name).exists():
                self._write_known(place, pointer)
            atomic.write_once(place / path.name, pointer.encode())
        if not path.exists():
            next_step = "remove it, or bring back what it leads to; then run the command again"
            raise VpstoreError("a link lies in the place of a pointer", where=str(path), next_step=next_step)
        self.settle()

    def settle(self) -> None:
        """Make durable every pointer that is there: who wrote it may have died before that."""
        beneath.settle(self.top, self.root)
