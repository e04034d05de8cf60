"""Which documents of the sources are used, where they stand, on which side they fall, in which order they come.

Place in the path: rows, text, synth, split -> **corpus_index** -> the data recipe. One pass reads every row and keeps
a few numbers of each; the rows themselves are read again, one at a time, when they are needed.

Invariants: side and order of a document follow from its id alone; the order is that of a keyed digest, so that a
part of a corpus that fits into a budget is a fair sample of it. Of rows with one id the first is used.

Example:
    with JsonLines(path, PROSE_COLUMNS) as rows:
        index = index_prose([rows], fraction=0.1, nul_policy="drop")
        first = index.row(index.entries["train"][0])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple

from recipes.data.rows import JsonLines
from recipes.data.split import SplitDigest, is_held_out
from recipes.data.synth import exchange_of
from recipes.data.text import NulPolicy, clean_text, surrogate_at

Split = Literal["train", "valid"]
_Accept = Callable[[Mapping[str, str], "Counter[str]", str], bool]  # row, what is dropped, where it stands


class Entry(NamedTuple):
    """One document; sorts by its place in the order."""

    place: bytes
    file: int
    offset: int


class CorpusIndex:
    """Entries of both splits, and what was dropped."""

    def __init__(self, files: Sequence[JsonLines]) -> None:
        self.files = files
        self.entries: dict[Split, list[Entry]] = {"train": [], "valid": []}
        self.drops: Counter[str] = Counter()

    def row(self, entry: Entry) -> dict[str, str]:
        """The row of an entry."""
        return self.files[entry.file].row_at(entry.offset)


def index_prose(files: Sequence[JsonLines], *, fraction: float, nul_policy: NulPolicy) -> CorpusIndex:
    """Prose, split by the SHA-256 of `doc_id`.

    Args:    files: open for as long as the index is used; rows with the columns of `PROSE_COLUMNS`.
    Raises:  RecipeRefused: a malformed file, or NUL under the policy `refuse`.
    """

    def accept(row: Mapping[str, str], drops: Counter[str], where: str) -> bool:
        if surrogate_at(row["doc_id"]) is not None:
            drops["surrogate"] += 1
            return False
        return clean_text(row["text"], nul_policy=nul_policy, drops=drops, where=where) is not None

    return _index(files, _Rule("doc_id", "sha256", fraction, accept))


def index_synth(files: Sequence[JsonLines], *, fraction: float, nul_policy: NulPolicy) -> CorpusIndex:
    """Rows in SYNTH's schema, split by the BLAKE2b of `synth_id`.

    Args:    files: open for as long as the index is used; rows with the columns of `synth.SYNTH_COLUMNS`.
    Raises:  RecipeRefused: a malformed file, or NUL under the policy `refuse`.
    """

    def accept(row: Mapping[str, str], drops: Counter[str], where: str) -> bool:
        return exchange_of(row, drops=drops, nul_policy=nul_policy, where=where) is not None

    return _index(files, _Rule("synth_id", "blake2b", fraction, accept))


class _Rule(NamedTuple):
    key: str
    digest: SplitDigest
    fraction: float
    accept: _Accept


def _index(files: Sequence[JsonLines], rule: _Rule) -> CorpusIndex:
    index = CorpusIndex(files)
    seen: set[bytes] = set()
    for number, file in enumerate(files):
        for offset, row in file.with_offsets():
            if not rule.accept(row, index.drops, f"{file.name}, byte {offset}"):
                continue
            identity: str = row[rule.key]
            place = blake2b(identity.encode(), digest_size=16, person=b"document order").digest()
            if place in seen:
                index.drops["repeated_id"] += 1
                continue
            seen.add(place)
            held_out = is_held_out(identity, fraction=rule.fraction, digest=rule.digest)
            index.entries["valid" if held_out else "train"].append(Entry(place, number, offset))
    for entries in index.entries.values():
        entries.sort()
    return index
