"""Pointers: which artifact each object@stage of a checkout is now.

Place in the path: build writes one last of all, resolve starts from it, DVC has it as the stage's out.
Invariants: a pointer is whole or absent; its file name, object and stage agree; rewriting an equal pointer does not
touch the file, so that nothing downstream looks changed.

Example:
    checkout.pointers.read(StageRef("vpMoE", "smoke")).artifact
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpstore.errors import BadManifest, VpstoreError
from vpstore.schema.canonical import parse_strict, readable_bytes
from vpstore.schema.digest import Digest
from vpstore.schema.fields import Fields
from vpstore.schema.ref import StageRef, check_name
from vpstore.storage import atomic, beneath

FORMAT: Final = 1


@dataclass(frozen=True)
class Pointer:
    """One pointer: what a checkout has."""

    ref: StageRef
    artifact: Digest
    key: Digest

    def encode(self) -> bytes:
        """The bytes of the file."""
        return readable_bytes(
            {
                "format": FORMAT,
                "object": self.ref.object,
                "stage": self.ref.stage,
                "artifact": self.artifact,
                "key": self.key,
            }
        )

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> Pointer:
        """Read a pointer.

        Raises:  BadManifest: not JSON, a missing or unknown field, a digest or name of the wrong form.
        """
        fields = Fields(parse_strict(data, where=where), where=where)
        fields.format(FORMAT)
        name = check_name(fields.text("object"), where=where, error=BadManifest)
        stage = check_name(fields.text("stage"), where=where, error=BadManifest)
        pointer = cls(StageRef(name, stage), fields.digest("artifact"), fields.digest("key"))
        fields.done()
        return pointer


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
                data = path.read_bytes()
            except FileNotFoundError:
                return None
        try:
            pointer = Pointer.decode(data, where=str(path))
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
        with beneath.opened(self.top, self.root) as place:
            changed = atomic.write_if_different(place / self.path(pointer.ref).name, pointer.encode())
        self.settle()
        return changed

    def add(self, pointer: Pointer) -> None:
        """Write a pointer where there is none; one that another process writes at the same moment stays.

        Raises:  VpstoreError: as `write`; or a link that leads nowhere lies in its place.
        """
        path = self.path(pointer.ref)
        with beneath.opened(self.top, self.root) as place:
            atomic.write_once(place / path.name, pointer.encode())
        if not path.exists():
            next_step = "remove it, or bring back what it leads to; then run the command again"
            raise VpstoreError("a link lies in the place of a pointer", where=str(path), next_step=next_step)
        self.settle()

    def settle(self) -> None:
        """Make durable every pointer that is there: who wrote it may have died before that."""
        beneath.settle(self.top, self.root)
