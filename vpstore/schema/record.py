"""Build records: all that goes into a build, and of it the part that its key covers.

Place in the path: config, recipe, inputs -> **record** -> build key; a field of the manifest, so that the digest of an
artifact covers what made it. The key covers what decides bytes: of a recipe file its normal form, of a parent its
content. The record also says which bytes and which artifacts those were.
Invariants: equal builds have equal keys, and what decides other bytes has another key; lists are sorted and without
duplicates; a record of format 1, whose key covered both, is written as it was read.

Example:
    record = BuildRecord("recipes.heal", files, {"steps": 100}, inputs); record.key()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, TypeVar

from vpstore.errors import BadManifest
from vpstore.schema.canonical import canonical_bytes, parse_canonical, readable_bytes
from vpstore.schema.digest import Digest, parse_sha256
from vpstore.schema.fields import Fields
from vpstore.schema.paths import check_distinct, check_path
from vpstore.schema.typed import plain, typed, untyped

FORMAT: Final = 2
FORMATS: Final = (1, 2)  # that are read
TOKENIZER: Final = "tokenizer"  # the role of the pin that format 1 has a field for
By = Literal["content", "artifact"]
T = TypeVar("T")


class RecipeFile(NamedTuple):
    """One module of a recipe's closure: its path in the repository, its bytes, and its normal form."""

    path: str
    digest: Digest
    code: Digest | None = None  # None: a record of format 1


class InputRecord(NamedTuple):
    """A parent: which part it plays, which artifact it is, and what a recipe can see of it."""

    role: str
    artifact: Digest
    content: Digest | None = None  # None: a record of format 1
    by: By = "content"  # which of the two decides bytes; an artifact's digest covers its content


class SourceRecord(NamedTuple):
    """A leaf from outside, pinned by SHA-256; size None where its provenance does not say."""

    role: str
    sha256: str
    size_bytes: int | None


class Pin(NamedTuple):
    """A file that decides what bytes mean, by its digest, with what else is agreed about it: a tokenizer's ranks."""

    role: str
    digest: Digest
    attributes: Mapping[str, Any]


class Variable(NamedTuple):
    """An environment variable that decides bytes."""

    name: str
    value: str


@dataclass(frozen=True)
class BuildRecord:
    """Everything that goes into a build; `key` is the digest of what of it decides bytes."""

    entry: str
    recipe_files: tuple[RecipeFile, ...]
    params: dict[str, Any]
    inputs: tuple[InputRecord, ...] = ()
    sources: tuple[SourceRecord, ...] = ()
    pins: tuple[Pin, ...] = ()
    variables: tuple[Variable, ...] = ()
    format: int = field(default=FORMAT, kw_only=True)

    def __post_init__(self) -> None:
        """Sort what has no order of its own, refuse duplicates, and take params as a recipe gets them."""
        if self.format == 1:  # canonical JSON knows one kind of number: 1.0 comes back as 1
            params = parse_canonical(canonical_bytes(self.params, where="params"), where="params")
        else:
            params = plain(self.params, where="params")
        object.__setattr__(self, "params", params)
        for name, label in _UNIQUE:
            object.__setattr__(self, name, sorted_unique(getattr(self, name), lambda row: row[0], label))
        lacking = [row.path for row in self.recipe_files if row.code is None]
        lacking += [row.role for row in self.inputs if row.content is None]
        if self.format > 1 and lacking:
            raise BadManifest("a build record lacks what its key covers", where=lacking[0], expected="code and content")

    def to_json(self) -> dict[str, Any]:
        """The record, as the manifest and `provenance.json` show it."""
        if self.format == 1:
            return self._first_format()
        document = self._preimage()
        document["recipe"]["files"] = [row._asdict() for row in self.recipe_files]
        document["inputs"] = [row._asdict() for row in self.inputs]
        return document

    def _preimage(self) -> dict[str, Any]:
        """What decides bytes."""
        inputs = []
        for row in self.inputs:
            named = {"artifact": row.artifact} if row.by == "artifact" else {}
            inputs.append({"role": row.role, "content": row.content, **named})
        return {
            "format": self.format,
            "recipe": {
                "entry": self.entry,
                "files": [{"path": row.path, "code": row.code} for row in self.recipe_files],
            },
            "params": typed(self.params),
            "inputs": inputs,
            "sources": [row._asdict() for row in self.sources],
            "pins": [{**row._asdict(), "attributes": typed(dict(row.attributes))} for row in self.pins],
            "environment": [row._asdict() for row in self.variables],
        }

    def _first_format(self) -> dict[str, Any]:
        pin = self.pin(TOKENIZER)
        return {
            "format": 1,
            "recipe": {
                "entry": self.entry,
                "files": [{"path": row.path, "digest": row.digest} for row in self.recipe_files],
            },
            "params": self.params,
            "inputs": [{"role": row.role, "artifact": row.artifact} for row in self.inputs],
            "sources": [row._asdict() for row in self.sources],
            "tokenizer": None if pin is None else {**pin.attributes, "digest": pin.digest},
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> BuildRecord:
        """Read a record.

        Raises:  BadManifest: a missing, mistyped or unknown field.
        """
        version = fields.format_of(FORMATS)
        recipe = fields.inner("recipe")
        entry = recipe.text("entry")
        files = recipe.each("files", _first_file if version == 1 else _file)
        recipe.done()
        check_distinct((row.path for row in files), where=recipe.where)
        params = fields.take("params", dict)
        inputs = fields.each("inputs", _first_input if version == 1 else _input)
        sources = fields.each("sources", _source)
        variables: tuple[Variable, ...] = ()
        if version == 1:
            pins = _first_pins(fields)
        else:
            params = untyped(params, where=f"{fields.where}: params")
            pins = fields.each("pins", _pin)
            variables = fields.each("environment", lambda row: Variable(row.text("name"), row.take("value", str)))
        fields.done()
        return cls(entry, files, params, inputs, sources, pins, variables, format=version)

    def pin(self, role: str) -> Pin | None:
        """The pin of a role."""
        return next((row for row in self.pins if row.role == role), None)

    def key(self) -> Digest:
        """The build key, known before the build."""
        return Digest.of(canonical_bytes(self._covered(), where="build record"))

    def code_digest(self) -> Digest:
        """One digest over the recipe's entry and its closure: what the lock calls `code`."""
        return Digest.of(canonical_bytes(self._covered()["recipe"], where="recipe"))

    def params_digest(self) -> Digest:
        """One digest over the typed params."""
        return Digest.of(canonical_bytes(self._covered()["params"], where="params"))

    def _covered(self) -> dict[str, Any]:
        return self._first_format() if self.format == 1 else self._preimage()

    def readable(self) -> bytes:
        """The bytes of the artifact's `provenance.json`."""
        return readable_bytes(self.to_json())


_UNIQUE: Final = (
    ("recipe_files", "recipe file"), ("inputs", "input role"), ("sources", "source role"), ("pins", "pin"),
    ("variables", "environment variable"),
)  # fmt: skip


def key_of(document: Any) -> Digest:
    """The key of a record from the stored document alone, without the parser: what a reviewer can do by hand."""
    if document["format"] == 1:
        return Digest.of(canonical_bytes(document))
    files = [{"path": row["path"], "code": row["code"]} for row in document["recipe"]["files"]]
    inputs = [
        {name: row[name] for name in ("role", "content", *(("artifact",) if row["by"] == "artifact" else ()))}
        for row in document["inputs"]
    ]
    covered = {**document, "recipe": {"entry": document["recipe"]["entry"], "files": files}, "inputs": inputs}
    return Digest.of(canonical_bytes(covered))


def sorted_unique(rows: Iterable[T], name: Callable[[T], str], label: str) -> tuple[T, ...]:
    """Rows by name.

    Raises:  BadManifest: a name appears twice.
    """
    ordered: Sequence[T] = sorted(rows, key=name)
    for before, after in zip(ordered, ordered[1:], strict=False):
        if name(before) == name(after):
            raise BadManifest(f"a {label} appears twice", where=name(after), found=name(after))
    return tuple(ordered)


def _file(row: Fields) -> RecipeFile:
    return RecipeFile(path_of(row), row.digest("digest"), row.digest("code"))


def _first_file(row: Fields) -> RecipeFile:
    return RecipeFile(path_of(row), row.digest("digest"))


def _input(row: Fields) -> InputRecord:
    by = row.text("by")
    if by not in ("content", "artifact"):
        row.refuse("an unknown word", at="by", expected="content or artifact", found=by[:40])
    return InputRecord(_role(row), row.digest("artifact"), row.digest("content"), by)  # type: ignore[arg-type]


def _first_input(row: Fields) -> InputRecord:
    return InputRecord(_role(row), row.digest("artifact"))


def path_of(row: Fields) -> str:
    """A row's path, held against the rules for paths."""
    return check_path(row.text("path"), where=row.where)


def _role(row: Fields) -> str:
    return check_path(row.text("role"), where=row.where)


def _source(row: Fields) -> SourceRecord:
    size = row.optional("size_bytes", int)
    return SourceRecord(_role(row), parse_sha256(row.text("sha256"), where=row.where), size)


def _pin(row: Fields) -> Pin:
    attributes = untyped(row.take("attributes", dict), where=f"{row.where}: attributes")
    return Pin(_role(row), row.digest("digest"), attributes)


def _first_pins(fields: Fields) -> tuple[Pin, ...]:
    value = fields.optional(TOKENIZER, dict)
    if value is None:
        return ()
    row = Fields(value, where=f"{fields.where}: {TOKENIZER}")
    pin = Pin(TOKENIZER, row.digest("digest"), tokenizer_attributes(row.text("family"), row.count("padded_vocab")))
    row.done()
    return (pin,)


def tokenizer_attributes(family: str, padded_vocab: int) -> dict[str, Any]:
    """What a pin of a tokenizer says besides the digest of its rank file."""
    return {"family": family, "padded_vocab": padded_vocab}
