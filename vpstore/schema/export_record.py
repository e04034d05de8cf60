"""The record in an exported folder of another format: every file of it, and the artifact that it was made from.

Place in the path: export writes it last, `export --check` reads it. A folder of plain files needs none: there the
manifest says the same.
Invariants: sorted by path, no time and no place of a machine: two equal exports have equal records; it does not list
itself.

Example:
    record = ExportRecord.decode(data, where="vpstore-export.json"); record.files
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from vpstore.errors import BadManifest
from vpstore.schema.canonical import parse_strict, readable_bytes
from vpstore.schema.digest import Digest
from vpstore.schema.fields import Fields
from vpstore.schema.paths import check_distinct, check_path
from vpstore.schema.ref import StageRef, parse_ref

FORMAT: Final = 1
RECORD_FILE: Final = "vpstore-export.json"


class ExportedFile(NamedTuple):
    """One file of the folder."""

    digest: Digest
    size_bytes: int


@dataclass(frozen=True)
class ExportRecord:
    """What a folder should hold."""

    to: str  # the format
    ref: StageRef
    artifact: Digest
    files: Mapping[str, ExportedFile]  # by path

    def encode(self) -> bytes:
        """The bytes of the file."""
        files = [{"path": path, **row._asdict()} for path, row in sorted(self.files.items())]
        head = {"format": FORMAT, "to": self.to, "ref": str(self.ref), "artifact": self.artifact}
        return readable_bytes({**head, "files": files})

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> ExportRecord:
        """Read the file.

        Raises:  BadManifest: not strict JSON, an unknown field, a path that is not acceptable, no object@stage.
        """
        fields = Fields(parse_strict(data, where=where), where=where)
        fields.format(FORMAT)
        to, ref, artifact = fields.text("to"), fields.text("ref"), fields.digest("artifact")
        rows = fields.each("files", _row)
        fields.done()
        check_distinct((path for path, _ in rows), where=where)
        name = parse_ref(ref, where=where, error=BadManifest)
        if name.stage is None or name.mode is not None:
            raise BadManifest("a record names object@stage only", where=where, found=ref[:120])
        return cls(to, StageRef(name.object, name.stage), artifact, dict(rows))


def _row(fields: Fields) -> tuple[str, ExportedFile]:
    path = check_path(fields.text("path"), where=fields.where)
    return path, ExportedFile(fields.digest("digest"), fields.count("size_bytes"))
