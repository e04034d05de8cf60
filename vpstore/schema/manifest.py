"""Manifests and build records: the two documents that have the two digests.

Place in the path: publish writes one manifest an artifact; everything that reads an artifact starts from it. The build
record is the preimage of the build key and a field of the manifest, so the digest of an artifact covers what made it.
Invariants: no time, host, path of a machine, duration or package version in either; lists are sorted and without
duplicates, so one artifact has one manifest; `decode` accepts only what `encode` writes.

Example:
    manifest = Manifest.decode(data, where="manifest"); key = manifest.build.key()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeVar

from vpstore.errors import BadManifest
from vpstore.schema.canonical import canonical_bytes, parse_canonical, readable_bytes
from vpstore.schema.digest import Digest, parse_sha256
from vpstore.schema.fields import Fields
from vpstore.schema.paths import check_distinct, check_path
from vpstore.schema.ref import StageRef, check_name

FORMAT: Final = 1
MEDIA_TYPE: Final = "application/vnd.vpstore.manifest.v1+json"
PROVENANCE_FILE: Final = "provenance.json"  # in every artifact that is not a verbatim donor
MANIFEST_FILE: Final = "artifact.json"  # in every view; no artifact may have a file of this name
T = TypeVar("T")


class RecipeFile(NamedTuple):
    """One module of a recipe's closure, by its path in the repository."""

    path: str
    digest: Digest


class InputRecord(NamedTuple):
    """A parent: which part it plays and which artifact it is."""

    role: str
    artifact: Digest


class SourceRecord(NamedTuple):
    """A leaf from outside, pinned by SHA-256; size None where its provenance does not say."""

    role: str
    sha256: str
    size_bytes: int | None


class TokenizerRecord(NamedTuple):
    """The rank file that the ids of an artifact mean."""

    family: str
    digest: Digest
    padded_vocab: int


@dataclass(frozen=True)
class BuildRecord:
    """Everything that goes into a build; the digest of its canonical bytes is the build key."""

    entry: str
    recipe_files: tuple[RecipeFile, ...]
    params: dict[str, Any]
    inputs: tuple[InputRecord, ...] = ()
    sources: tuple[SourceRecord, ...] = ()
    tokenizer: TokenizerRecord | None = None

    def __post_init__(self) -> None:
        """Sort what has no order of its own, refuse duplicates, and take params as they come back from a manifest."""
        # Canonical JSON knows one kind of number: 1.0 comes back as 1, and readable() must give the same bytes then.
        params = parse_canonical(canonical_bytes(self.params, where="params"), where="params")
        object.__setattr__(self, "params", params)
        for name, label in (("recipe_files", "recipe file"), ("inputs", "input role"), ("sources", "source role")):
            object.__setattr__(self, name, _sorted_unique(getattr(self, name), lambda row: row[0], label))

    def to_json(self) -> dict[str, Any]:
        """The preimage, as the manifest and `provenance.json` show it."""
        return {
            "format": FORMAT,
            "recipe": {"entry": self.entry, "files": [row._asdict() for row in self.recipe_files]},
            "params": self.params,
            "inputs": [row._asdict() for row in self.inputs],
            "sources": [row._asdict() for row in self.sources],
            "tokenizer": None if self.tokenizer is None else self.tokenizer._asdict(),
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> BuildRecord:
        """Read a preimage.

        Raises:  BadManifest: a missing, mistyped or unknown field.
        """
        fields.format(FORMAT)
        recipe = fields.inner("recipe")
        entry = recipe.text("entry")
        files = recipe.each("files", lambda row: RecipeFile(_path(row), row.digest("digest")))
        recipe.done()
        check_distinct((row.path for row in files), where=recipe.where)
        params = fields.take("params", dict)
        inputs = fields.each("inputs", lambda row: InputRecord(_role(row), row.digest("artifact")))
        sources = fields.each("sources", _source)
        tokenizer = fields.optional("tokenizer", dict)
        fields.done()
        return cls(
            entry, files, params, inputs, sources, None if tokenizer is None else _tokenizer(tokenizer, fields.where)
        )

    def key(self) -> Digest:
        """The build key, known before the build."""
        return Digest.of(canonical_bytes(self.to_json(), where="build record"))

    def code_digest(self) -> Digest:
        """One digest over the recipe's entry and its closure: what the lock calls `code`."""
        return Digest.of(canonical_bytes(self.to_json()["recipe"], where="recipe"))

    def params_digest(self) -> Digest:
        """One digest over the typed params."""
        return Digest.of(canonical_bytes(self.params, where="params"))

    def readable(self) -> bytes:
        """The bytes of the artifact's `provenance.json`."""
        return readable_bytes(self.to_json())


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


@dataclass(frozen=True)
class Manifest:
    """The document of one artifact; its digest is the artifact's."""

    object: str
    stage: str
    build: BuildRecord
    files: tuple[FileRecord, ...]
    intermediates: tuple[IntermediateRecord, ...] = ()

    def __post_init__(self) -> None:
        """Sort by path and name; hold the paths against the rules."""
        where = f"manifest of {self.object}@{self.stage}"
        object.__setattr__(self, "files", _sorted_unique(self.files, lambda row: row.path, "path"))
        object.__setattr__(self, "intermediates", _sorted_unique(self.intermediates, lambda row: row.name, "name"))
        for path in [row.path for row in self.files] + [row.name for row in self.intermediates]:
            check_path(path, where=where)
        check_distinct([MANIFEST_FILE, *(row.path for row in self.files)], where=where)

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
        return canonical_bytes(
            {
                "format": FORMAT,
                "object": self.object,
                "stage": self.stage,
                "build": self.build.to_json(),
                "files": [row.to_json() for row in self.files],
                "intermediates": [row._asdict() for row in self.intermediates],
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

        Raises:  BadManifest: not canonical, a missing or unknown field, an unacceptable path, lists not in order.
        """
        fields = Fields(parse_canonical(data, where=where), where=where)
        fields.format(FORMAT)
        name = check_name(fields.text("object"), where=where, error=BadManifest)
        stage = check_name(fields.text("stage"), where=where, error=BadManifest)
        build = BuildRecord.from_fields(fields.inner("build"))
        files = fields.each("files", _file)
        parts = fields.each(
            "intermediates",
            lambda row: IntermediateRecord(row.text("name"), row.digest("digest"), row.count("size_bytes")),
        )
        fields.done()
        manifest = cls(name, stage, build, files, parts)
        if manifest.encoded != data:
            raise BadManifest(
                "the lists of a manifest are not in order", where=where, expected="sorted by path or role"
            )
        return manifest


def _file(row: Fields) -> FileRecord:
    return FileRecord(
        _path(row),
        row.text("media_type"),
        row.digest("digest"),
        row.count("size_bytes"),
        row.optional_digest("tensors"),
    )


def _path(row: Fields) -> str:
    return check_path(row.text("path"), where=row.where)


def _role(row: Fields) -> str:
    return check_path(row.text("role"), where=row.where)


def _source(row: Fields) -> SourceRecord:
    size = row.optional("size_bytes", int)
    return SourceRecord(_role(row), parse_sha256(row.text("sha256"), where=row.where), size)


def _tokenizer(value: dict[str, Any], where: str) -> TokenizerRecord:
    row = Fields(value, where=f"{where}: tokenizer")
    record = TokenizerRecord(row.text("family"), row.digest("digest"), row.count("padded_vocab"))
    row.done()
    return record


def _sorted_unique(rows: Iterable[T], name: Callable[[T], str], label: str) -> tuple[T, ...]:
    ordered: Sequence[T] = sorted(rows, key=name)
    for before, after in zip(ordered, ordered[1:], strict=False):
        if name(before) == name(after):
            raise BadManifest(f"a {label} appears twice", where=name(after), found=name(after))
    return tuple(ordered)
