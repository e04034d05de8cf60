"""What every reader of rows of text is: one file, named columns, places to begin at, and how it refuses.

Place in the path: below **rows** and parquet_rows, which read the formats.

Invariants: a row is named by file and number, the first being row 1 in a message; a mark that a reader gave is one that
it can begin at.

Example:
    class Lines(RowReader): ...
    with Lines(path, PROSE_COLUMNS) as reader:
        for number, row in reader.rows(reader.marks(1000)[2], 1000): ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from vpstore.errors import RecipeRefused

# What a source holds was pinned, and held against its pin before it is read: to fetch it again brings the same bytes.
MEND = "the file is what its provenance pins: put a sound one in its place and pin that (tools.pin_sources)"
BOM = b"\xef\xbb\xbf"
_LFS = b"version https://git-lfs.github.com/spec/"

# A column by the names under which it may stand, the one that a row has afterwards first.
Columns = Sequence[tuple[str, ...]]


class Mark(NamedTuple):
    """A row, and where to begin reading for it: a byte for plain JSON lines, a row group for Parquet."""

    row: int  # from 0
    place: int


START = Mark(0, 0)


class RowReader(ABC):
    """One file; use it in a with block."""

    is_seekable = True  # whether reading can begin at every mark, so that several processes can share the file

    def __init__(self, path: Path, columns: Columns, *, name: str = "") -> None:
        """Open the file.

        Args:    name: what messages call it.
        Raises:  RecipeRefused: unreadable, or not of its format.
        """
        self.path, self.columns, self.name = path, columns, name or path.name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027 - a reader that opens the file anew each time has nothing to close
        """Let go of the file."""

    @abstractmethod
    def rows(self, start: Mark = START, limit: int | None = None) -> Iterator[tuple[int, dict[str, str]]]:
        """Number (from 0) and columns of each row, from `start` on, `limit` rows at most.

        Raises:  RecipeRefused: a malformed row or a damaged file, with its place.
        """

    @abstractmethod
    def marks(self, every: int) -> list[Mark]:
        """Where rows 0, every, 2 every, … begin; only the first if the file can be read from its beginning alone.

        Returns: nothing for a file that is known to have no rows.
        """


def opened(path: Path, name: str) -> BinaryIO:
    """The file, open for reading.

    Raises:  RecipeRefused: it cannot be read, or Git LFS has left a pointer in its place.
    """
    try:
        handle = path.open("rb")
        head = handle.read(len(_LFS))
        handle.seek(0)
    except OSError as error:
        raise RecipeRefused(
            "a text source cannot be read",
            where=name,
            expected="a readable file",
            found=error.strerror or type(error).__name__,
            next_step="put the file where its provenance says",
        ) from error
    if head == _LFS:
        handle.close()
        raise RecipeRefused(
            "a Git LFS pointer lies in the place of a text source",
            where=name,
            expected="the file itself",
            found="the pointer that Git LFS keeps of it",
            next_step="git lfs pull, then pin the file (tools.pin_sources)",
        )
    return handle


def bad_row(where: str, expected: str, found: str) -> RecipeRefused:
    """The refusal of a malformed row."""
    return RecipeRefused(
        "a row of a text source is malformed",
        where=where,
        expected=expected,
        found=found[:200],
        next_step=MEND,
    )
