"""Rows out of a Parquet file: row group by row group, only the columns that are needed.

Place in the path: a Parquet source -> **parquet_rows** -> rows. pyarrow is imported when a file is opened, so that a
checkout without Parquet sources does not need it.

Invariants: memory is that of some pages of each column, whatever the size of the file or of its row groups; a null is
empty text; text that is no UTF-8 is refused, except that an encoded lone surrogate is handed on as such, so that it is
counted where those of JSON are.

Example:
    with ParquetRows(Path("shard.parquet"), (("doc_id", "id"), ("text",))) as reader:
        number, row = next(reader.rows())
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from recipes.data.row_reader import MEND, START, Columns, Mark, RowReader, bad_row, opened
from vpstore.errors import RecipeRefused

_BATCH = 512  # rows that are Python objects at one time
_BUFFER = 1 << 20  # bytes read ahead in each column


class ParquetRows(RowReader):
    """One Parquet file."""

    def __init__(self, path: Path, columns: Columns, *, name: str = "") -> None:
        super().__init__(path, columns, name=name)
        opened(path, self.name).close()
        parquet = _parquet(self.name)
        with self._refusing():
            # Without pre-buffering: that would hold whole row groups.
            self._file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
            groups = [self._file.metadata.row_group(n).num_rows for n in range(self._file.num_row_groups)]
        self._starts = [0, *accumulate(groups)]
        self._names = [self._column(names) for names in columns]

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def rows(self, start: Mark = START, limit: int | None = None) -> Iterator[tuple[int, dict[str, str]]]:
        """See `RowReader`."""
        stop = self._starts[-1] if limit is None else min(start.row + limit, self._starts[-1])
        first = self._starts[start.place]
        groups = list(range(start.place, bisect_right(self._starts, stop - 1))) if stop > start.row else []
        names = [own for own, *_ in self.columns]
        for batch in self._batches(groups):
            columns = [self._texts(batch.column(name), first, name) for name in self._names]
            for number, values in enumerate(zip(*columns, strict=True), start=first):
                if start.row <= number < stop:
                    yield number, dict(zip(names, values, strict=True))
            first += batch.num_rows

    def marks(self, every: int) -> list[Mark]:
        """See `RowReader`; from the footer alone."""
        return [Mark(row, bisect_right(self._starts, row) - 1) for row in range(0, self._starts[-1], every)]

    def _batches(self, groups: list[int]) -> Iterator[Any]:
        if not groups:
            return
        with self._refusing():
            yield from self._file.iter_batches(_BATCH, groups, columns=self._names, use_threads=False)

    def _column(self, names: tuple[str, ...]) -> str:
        """The name under which a column stands here, once its type is seen to be text."""
        import pyarrow

        schema = self._file.schema_arrow
        found = next((name for name in names if name in schema.names), None)
        if found is None:
            raise self._wrong_schema(f"a column {' or '.join(names)}", ", ".join(schema.names))
        if schema.names.count(found) > 1:
            raise self._wrong_schema(f"one column {found}", f"{schema.names.count(found)} of them")
        kind, types = schema.field(found).type, pyarrow.types
        plain = kind.value_type if types.is_dictionary(kind) else kind
        is_text = types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)
        if not is_text and not types.is_null(plain):
            raise self._wrong_schema(f"text in column {found}", str(kind))
        return found

    def _texts(self, column: Any, first: int, name: str) -> list[str]:
        try:
            values = column.to_pylist()
        except UnicodeDecodeError:
            values = [self._decoded(value, first + n, name) for n, value in enumerate(_as_bytes(column))]
        return [value or "" for value in values]

    def _decoded(self, value: bytes | None, number: int, name: str) -> str:
        try:
            return (value or b"").decode("utf-8", errors="surrogatepass")
        except UnicodeDecodeError as error:
            raise bad_row(f"{self.name}, row {number + 1}", f"UTF-8 in column {name}", str(error)) from error

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Say what a damaged file means instead of what the library says."""
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError) as error:
            raise RecipeRefused(
                "a Parquet file is damaged or cut short",
                where=self.name,
                expected="a whole Parquet file",
                found=str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
                next_step=MEND,
            ) from error

    def _wrong_schema(self, expected: str, found: str) -> RecipeRefused:
        return RecipeRefused(
            "a Parquet file has another schema",
            where=self.name,
            expected=expected,
            found=found[:200],
            next_step="name a file with this column in the provenance, or rename the column",
        )


def _parquet(name: str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise RecipeRefused(
            "Parquet cannot be read without pyarrow",
            where=name,
            expected="the package pyarrow",
            found="not installed",
            next_step="pip install 'vpstore[recipes]'",
        ) from error
    return parquet


def _as_bytes(column: Any) -> list[bytes | None]:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return values
