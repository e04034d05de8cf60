"""Typed reading of parsed JSON and TOML: every field asked for by name and type, none left over.

Place in the path: between `canonical` and the documents. One small reader serves all documents, so that all of them
refuse missing, mistyped and unknown fields with the same words.
Invariants: booleans are not integers; `done` refuses whatever was not asked for.

Example:
    fields = Fields({"format": 1, "object": "vpMoE"}, where="pointer", error=BadManifest)
    fields.format(1); name = fields.text("object"); fields.done()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from vpstore.errors import BadManifest, VpstoreError
from vpstore.schema.digest import Digest

T = TypeVar("T")


class Fields:
    """The fields of one JSON object or TOML table, taken out one by one."""

    def __init__(self, value: Any, *, where: str, error: type[VpstoreError] = BadManifest) -> None:
        self.where, self.error = where, error
        if not isinstance(value, Mapping):
            self.refuse("not an object", expected="an object with fields", found=type(value).__name__)
        self._left: dict[str, Any] = dict(value)

    def refuse(self, what: str, *, at: str = "", expected: str = "", found: str = "") -> Any:
        """Raise this document's error about its field `at`."""
        where = f"{self.where}: {at}" if at else self.where
        raise self.error(what, where=where, expected=expected, found=found)

    def take(self, name: str, kind: type[T]) -> T:
        """A required field of exactly that type.

        Raises:  the document's error: missing or of another type.
        """
        if name not in self._left:
            self.refuse("a field is missing", at=name, expected=kind.__name__)
        value = self._left.pop(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.refuse("a field has the wrong type", at=name, expected=kind.__name__, found=type(value).__name__)
        return value  # type: ignore[no-any-return]  # narrowed by the test above, through Any

    def optional(self, name: str, kind: type[T]) -> T | None:
        """A field that may be missing or null."""
        if self._left.get(name) is None:
            self._left.pop(name, None)
            return None
        return self.take(name, kind)

    def text(self, name: str) -> str:
        """A required string that is not empty."""
        value = self.take(name, str)
        if not value:
            self.refuse("a field is empty", at=name, expected="text")
        return value

    def count(self, name: str) -> int:
        """A required integer, zero or more."""
        value = self.take(name, int)
        if value < 0:
            self.refuse("a count is negative", at=name, expected="0 or more", found=str(value))
        return value

    def digest(self, name: str) -> Digest:
        """A required digest."""
        return Digest.parse(self.take(name, str), where=f"{self.where}: {name}")

    def optional_digest(self, name: str) -> Digest | None:
        """A digest or null."""
        value = self.optional(name, str)
        return None if value is None else Digest.parse(value, where=f"{self.where}: {name}")

    def each(self, name: str, read: Callable[[Fields], T]) -> tuple[T, ...]:
        """A required list of objects, each read by `read` and held to have no unknown field."""
        rows = []
        for index, item in enumerate(self.take(name, list)):
            fields = Fields(item, where=f"{self.where}: {name}[{index}]", error=self.error)
            rows.append(read(fields))
            fields.done()
        return tuple(rows)

    def inner(self, name: str) -> Fields:
        """A required object, to be read field by field."""
        return Fields(self.take(name, dict), where=f"{self.where}: {name}", error=self.error)

    def format(self, version: int) -> None:
        """The `format` field, which must be `version`."""
        self.format_of((version,))

    def format_of(self, versions: Sequence[int]) -> int:
        """The `format` field, which must be one of `versions`."""
        found = self.take("format", int)
        if found not in versions:
            expected = " or ".join(map(str, versions))
            self.refuse("a format this version does not read", at="format", expected=expected, found=str(found))
        return found

    def done(self) -> None:
        """Refuse fields that nobody asked for.

        Raises:  the document's error, naming them.
        """
        if self._left:
            self.refuse("unknown fields", found=", ".join(sorted(map(str, self._left))))
