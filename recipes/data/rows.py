"""Rows of text from files: JSON lines, plain or compressed, and Parquet, behind one small interface.

Place in the path: a pinned source file -> **rows** -> synth, corpus_index. Only the named columns are read; a file is
read as a stream, and never held in memory as a whole.

Invariants: the rows keep the file's order, and a row is named by file and number, the first being row 1 in a message;
empty lines are no rows, and a byte order mark is no text; a value that is null counts as empty text; a file that is not
what it claims to be is refused as a whole, with the row. What a row says is judged elsewhere.

Example:
    with open_rows(Path("synth_001.parquet"), SYNTH_COLUMNS) as reader:
        for number, row in reader.rows(): ...
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from recipes.data.compressed import gzip_chunks, lines_of, zstd_chunks
from recipes.data.row_reader import BOM, START, Columns, Mark, RowReader, bad_row, opened
from vpstore.errors import RecipeRefused

PROSE_COLUMNS: Columns = (("doc_id", "id"), ("text",))  # FineWeb-Edu says id
MAX_ROW_BYTES = 1 << 26  # of one line: what is longer is no row of text


class JsonLines(RowReader):
    """One JSON object a line; a row can be read again from its offset."""

    def __init__(self, path: Path, columns: Columns, *, name: str = "") -> None:
        super().__init__(path, columns, name=name)
        self._handle = opened(path, self.name)

    def close(self) -> None:
        """Let go of the file."""
        self._handle.close()

    def rows(self, start: Mark = START, limit: int | None = None) -> Iterator[tuple[int, dict[str, str]]]:
        """See `RowReader`."""
        lines = islice(self._lines(start.place), limit)
        for number, (_, line) in enumerate(lines, start=start.row):
            yield number, parse_row(line, self.columns, where=f"{self.name}, row {number + 1}")

    def with_offsets(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Offset and columns of every row."""
        for number, (offset, line) in enumerate(self._lines(0), start=1):
            yield offset, parse_row(line, self.columns, where=f"{self.name}, row {number}")

    def row_at(self, offset: int) -> dict[str, str]:
        """The row that starts at an offset of `with_offsets`."""
        self._handle.seek(offset)
        return parse_row(self._handle.readline(MAX_ROW_BYTES), self.columns, where=f"{self.name}, byte {offset}")

    def marks(self, every: int) -> list[Mark]:
        """See `RowReader`; reads the file once, without parsing it."""
        return [Mark(row, offset) for row, (offset, _) in enumerate(self._lines(0)) if row % every == 0]

    def _lines(self, offset: int) -> Iterator[tuple[int, bytes]]:
        with opened(self.path, self.name) as handle:  # its own place in the file: row_at may be called meanwhile
            handle.seek(offset)
            while line := handle.readline(MAX_ROW_BYTES + 1):
                if len(line) > MAX_ROW_BYTES:
                    raise bad_row(f"{self.name}, byte {offset}", f"at most {MAX_ROW_BYTES} bytes", "a longer line")
                if not is_empty(line):
                    yield offset, line
                offset += len(line)


class CompressedJsonLines(RowReader):
    """JSON lines in one gzip or Zstandard stream, or in several one after the other."""

    is_seekable = False

    def __init__(self, path: Path, columns: Columns, *, name: str = "") -> None:
        super().__init__(path, columns, name=name)
        opened(path, self.name).close()
        self._chunks = zstd_chunks if path.name.endswith(".zst") else gzip_chunks

    def rows(self, start: Mark = START, limit: int | None = None) -> Iterator[tuple[int, dict[str, str]]]:
        """See `RowReader`; what comes before `start` is unpacked and thrown away."""
        stop = None if limit is None else start.row + limit
        with opened(self.path, self.name) as handle:
            lines = lines_of(self._chunks(handle, self.name), name=self.name, limit=MAX_ROW_BYTES)
            lines = (line for line in lines if not is_empty(line))
            for number, line in enumerate(islice(lines, start.row, stop), start=start.row):
                yield number, parse_row(line, self.columns, where=f"{self.name}, row {number + 1}")

    def marks(self, every: int) -> list[Mark]:
        """See `RowReader`: there is no way into the middle."""
        return [START]


def open_rows(path: Path, columns: Columns, *, name: str = "") -> RowReader:
    """The reader that a file's ending asks for.

    Raises:  RecipeRefused: an ending that none reads, or a file that is not of its format.
    """
    ending = row_format(path.name)
    if ending == ".parquet":
        from recipes.data.parquet_rows import ParquetRows

        return ParquetRows(path, columns, name=name)
    if ending == ".jsonl":
        return JsonLines(path, columns, name=name)
    if ending:
        return CompressedJsonLines(path, columns, name=name)
    raise RecipeRefused(
        "no reader for this kind of file",
        where=name or path.name,
        expected=f"a name that ends with one of {', '.join(ENDINGS)}",
        found=path.name,
        next_step="convert the file, or leave it out of the provenance",
    )


ENDINGS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")


def row_format(name: str) -> str:
    """The ending by which a file is read; empty if it holds no rows that can be read."""
    return next((ending for ending in ENDINGS if name.endswith(ending)), "")


def seekable(reader: RowReader, unpacked: Path) -> JsonLines:
    """The rows as plain JSON lines: the file itself, or else written anew, the named columns alone.

    Args:    unpacked: where the new file goes; one that is there is written over.
    """
    if isinstance(reader, JsonLines):
        return reader
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    with reader, unpacked.open("wb") as out:
        for _, row in reader.rows():
            out.write(json.dumps(row).encode() + b"\n")  # in ASCII, so that even a lone surrogate comes back
    return JsonLines(unpacked, [(names[0],) for names in reader.columns], name=reader.name)


def is_empty(line: bytes) -> bool:
    """Whether a line holds nothing but blanks, or a byte order mark."""
    return not line.removeprefix(BOM).strip()


def parse_row(line: bytes, columns: Columns, *, where: str) -> dict[str, str]:
    """The named columns of one JSON object.

    Raises:  RecipeRefused: invalid UTF-8 or JSON, no object, a column that is missing or no text.
    """
    try:
        row = json.loads(line.removeprefix(BOM).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise bad_row(where, "one JSON object in UTF-8", str(error)) from error
    if not isinstance(row, dict):
        raise bad_row(where, "one JSON object", type(row).__name__)
    return {names[0]: _text(row, names, where) for names in columns}


def _text(row: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in row:
            value = row[name]
            if value is None:
                return ""
            if isinstance(value, str):
                return value
            raise bad_row(where, f"a string under {name!r}", type(value).__name__)
    raise bad_row(where, f"a string under {' or '.join(map(repr, names))}", "no such key")
