"""Manifests: the document of one artifact, whose digest is the artifact's.

Place in the path: publish writes one manifest an artifact; everything that reads an artifact starts from it. It holds
the build record, so the digest of an artifact covers what made it, down to the bytes of the recipe and the history.
Invariants: no time, host, path of a machine, duration or package version; lists are sorted and without duplicates, so
one artifact has one manifest; `decode` accepts only what `encode` writes, in this format and in the first.

Example:
    manifest = Manifest.decode(data, where="manifest"); key = manifest.build.key(); seen = manifest.content
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

from vpstore.errors import BadManifest
from vpstore.schema.canonical import canonical_bytes, parse_canonical
from vpstore.schema.digest import Digest
from vpstore.schema.fields import Fields
from vpstore.schema.paths import check_distinct, check_path
from vpstore.schema.record import (
    FORMAT,
    FORMATS,
    BuildRecord,
    InputRecord,
    Pin,
    RecipeFile,
    SourceRecord,
    Variable,
    path_of,
    sorted_unique,
)
from vpstore.schema.ref import StageRef, check_name

__all__ = [
    "FORMAT",
    "MANIFEST_FILE",
    "MEDIA_TYPE",
    "PROVENANCE_FILE",
    "BuildRecord",
    "FileRecord",
    "InputRecord",
    "IntermediateRecord",
    "Manifest",
    "Pin",
    "RecipeFile",
    "SourceRecord",
    "Variable",
    "content_of",
]

MEDIA_TYPE: Final = "application/vnd.vpstore.manifest.v2+json"
PROVENANCE_FILE: Final = "provenance.json"  # in every artifact that is not a verbatim donor
MANIFEST_FILE: Final = "artifact.json"  # in every view; no artifact may have a file of this name


@dataclass(frozen=True)
class FileRecord:
    """A descriptor with a path: one file of an artifact."""

    path: str
    media_type: str
    digest: Digest
    size_bytes: int
    tensors: Digest | None = None  # of the tensor table, for safetensors shards

    def to_json(self) -> dict[str, Any]:
        """The descriptor as the manifest writes it."""
        return {
            "path": self.path, "media_type": self.media_type, "digest": self.digest,
            "size_bytes": self.size_bytes, "tensors": self.tensors,
        }  # fmt: skip


class IntermediateRecord(NamedTuple):
    """A shared result that many tensors needed, kept outside the view."""

    name: str
    digest: Digest
    size_bytes: int


def content_of(files: tuple[FileRecord, ...]) -> Digest:
    """One digest over what files are and what they are called: all that a child can see of a parent."""
    rows = [{"path": row.path, "digest": row.digest, "size_bytes": row.size_bytes} for row in files]
    return Digest.of(canonical_bytes({"files": rows}, where="content"))


@dataclass(frozen=True)
class Manifest:
    """The document of one artifact; its digest is the artifact's."""

    object: str
    stage: str
    build: BuildRecord
    files: tuple[FileRecord, ...]
    intermediates: tuple[IntermediateRecord, ...] = ()
    verbatim: bool = False  # its files are a donor's, a provenance.json among them, too

    def __post_init__(self) -> None:
        """Sort by path and name; hold the paths against the rules."""
        where = f"manifest of {self.object}@{self.stage}"
        object.__setattr__(self, "files", sorted_unique(self.files, lambda row: row.path, "path"))
        object.__setattr__(self, "intermediates", sorted_unique(self.intermediates, lambda row: row.name, "name"))
        for path in [row.path for row in self.files] + [row.name for row in self.intermediates]:
            check_path(path, where=where)
        check_distinct([MANIFEST_FILE, *(row.path for row in self.files)], where=where)

    @property
    def provenance(self) -> FileRecord | None:
        """The file that publish wrote; of a donor there is none, whatever its own files are called."""
        return None if self.verbatim else self.by_path.get(PROVENANCE_FILE)

    @cached_property
    def seen(self) -> tuple[FileRecord, ...]:
        """The files that a child can see: all but the provenance that publish wrote, which names the history."""
        return tuple(row for row in self.files if row is not self.provenance)

    @cached_property
    def content(self) -> Digest:
        """The digest of what a child can see; two artifacts of equal content are one parent to it."""
        return content_of(self.seen)

    @property
    def ref(self) -> StageRef:
        """The object and stage this artifact was built as."""
        return StageRef(self.object, self.stage)

    @property
    def size_bytes(self) -> int:
        """Bytes of the artifact's files, without intermediates."""
        return sum(row.size_bytes for row in self.files)

    @cached_property
    def by_path(self) -> dict[str, FileRecord]:
        """Files by path."""
        return {row.path: row for row in self.files}

    def blobs(self) -> dict[Digest, str]:
        """Every blob this artifact needs besides its manifest, and what each is, in a fixed order."""
        needed: dict[Digest, str] = {}
        for row in self.files:
            needed.setdefault(row.digest, row.path)
            if row.tensors is not None:
                needed.setdefault(row.tensors, f"tensor table of {row.path}")
        for part in self.intermediates:
            needed.setdefault(part.digest, f"intermediate {part.name}")
        for source in self.build.recipe_files:
            needed.setdefault(source.digest, f"recipe file {source.path}")
        return needed

    @cached_property
    def encoded(self) -> bytes:
        """The canonical bytes."""
        version = self.build.format
        second = {} if version == 1 else {"verbatim": self.verbatim, "content": self.content}
        return canonical_bytes(
            {
                "format": version,
                "object": self.object,
                "stage": self.stage,
                "build": self.build.to_json(),
                "files": [row.to_json() for row in self.files],
                "intermediates": [row._asdict() for row in self.intermediates],
                **second,
            },
            where=f"manifest of {self.object}@{self.stage}",
        )

    @cached_property
    def digest(self) -> Digest:
        """The artifact's digest."""
        return Digest.of(self.encoded)

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> Manifest:
        """Read a manifest, accepting only what `encoded` writes.

        Raises:  BadManifest: not canonical, a missing or unknown field, an unacceptable path, lists not in order, a
                 content that is not that of the files.
        """
        fields = Fields(parse_canonical(data, where=where), where=where)
        version = fields.format_of(FORMATS)
        name = check_name(fields.text("object"), where=where, error=BadManifest)
        stage = check_name(fields.text("stage"), where=where, error=BadManifest)
        build = BuildRecord.from_fields(fields.inner("build"))
        files = fields.each("files", _file)
        parts = fields.each(
            "intermediates",
            lambda row: IntermediateRecord(row.text("name"), row.digest("digest"), row.count("size_bytes")),
        )
        verbatim = _is_verbatim(files, build) if version == 1 else fields.take("verbatim", bool)
        content = None if version == 1 else fields.digest("content")
        fields.done()
        if build.format != version:
            raise BadManifest("a manifest and its build record differ in format", where=where)
        manifest = cls(name, stage, build, files, parts, verbatim)
        if content is not None and content != manifest.content:
            found = f"{content}, where its files give {manifest.content}"
            raise BadManifest("a manifest contradicts its own files", where=f"{where}: content", found=found)
        if manifest.encoded != data:
            raise BadManifest(
                "the lists of a manifest are not in order", where=where, expected="sorted by path or role"
            )
        return manifest


def _is_verbatim(files: tuple[FileRecord, ...], build: BuildRecord) -> bool:
    """The first format does not say it; what publish wrote is known by its bytes."""
    derived = Digest.of(build.readable())
    return all(row.path != PROVENANCE_FILE or row.digest != derived for row in files)


def _file(row: Fields) -> FileRecord:
    return FileRecord(
        path_of(row),
        row.text("media_type"),
        row.digest("digest"),
        row.count("size_bytes"),
        row.optional_digest("tensors"),
    )
