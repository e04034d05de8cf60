"""Byte-pair ranks of a `.tiktoken` file, and the exact Hugging Face `tokenizers` file that follows from them.

Place in the path: rank file -> **bpe** -> tokenizer.json -> vocabulary. A rank file lists tokens by rank only; the
pairs that make them are recovered by running byte-pair encoding on each token with the lower-ranked merges alone,
which leaves exactly the two parts whose union it is.

Invariants: pure functions of their arguments; the order of the merges is the order of the ranks. Where rank-based
encoding meets two neighbours whose union is a token, those neighbours are the recovered pair (nothing crosses the
token's edges, and inside them the merges ran in the same order), so that pair-based and rank-based encoding agree
on every input.

Example:
    ranks = load_ranks(Path("o200k_base.tiktoken"))
    document = tokenizer_json(ranks, pattern=O200K_HARMONY.pattern, special=O200K_HARMONY.special)
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vpstore.errors import RecipeRefused


def _byte_characters() -> tuple[str, ...]:
    """A printable character for each byte: itself if it is printable Latin-1, else the next free one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(free)) for byte in range(256))


BYTE_CHARACTERS = _byte_characters()
CHARACTER_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
_FROM_LATIN1 = dict(enumerate(BYTE_CHARACTERS))
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def to_byte_level(token: bytes) -> str:
    """The printable spelling of a token's bytes, as byte-level vocabularies write it."""
    return token.decode("latin-1").translate(_FROM_LATIN1)


def from_byte_level(text: str) -> bytes:
    """The bytes of a byte-level spelling.

    Raises:  KeyError: a character that stands for no byte.
    """
    return bytes(CHARACTER_BYTES[character] for character in text)


def load_ranks(path: Path) -> dict[bytes, int]:
    """Parse a rank file: one `base64 rank` a line, ranks 0, 1, 2, … in order.

    Returns: token bytes -> rank, in the order of the ranks.
    Raises:  RecipeRefused: an unreadable file, a malformed line, a rank out of order, a repeated token, a byte
             without a token.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RecipeRefused(
            "the rank file cannot be read",
            where=str(path.name),
            expected="a .tiktoken file",
            found=error.strerror or type(error).__name__,
        ) from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines):
        token = _parse_line(line, number, path.name)
        if token in ranks:
            raise _bad_line(path.name, number, "a token that no earlier line has", repr(token))
        ranks[token] = number
    absent = [byte for byte in range(256) if bytes((byte,)) not in ranks]
    if absent:
        raise RecipeRefused(
            "a rank file leaves some bytes without a token",
            where=path.name,
            expected="all 256 single bytes",
            found=f"{256 - len(absent)}; the first absent one is 0x{absent[0]:02x}",
        )
    return ranks


def _parse_line(line: bytes, number: int, name: str) -> bytes:
    encoded, _, rank = line.partition(b" ")
    if rank != str(number).encode():
        raise _bad_line(name, number, f"base64, one space, rank {number}", repr(line[:60]))
    try:
        token = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise _bad_line(name, number, "base64", repr(line[:60])) from error
    if not token or base64.b64encode(token) != encoded:
        raise _bad_line(name, number, "canonical base64 of at least one byte", repr(line[:60]))
    return token


def _bad_line(name: str, number: int, expected: str, found: str) -> RecipeRefused:
    return RecipeRefused(
        "a line of the rank file is malformed", where=f"{name}, line {number + 1}", expected=expected, found=found
    )


def merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair behind each token of two or more bytes, in the order of the ranks.

    Raises:  RecipeRefused: a token that no pair of lower-ranked tokens makes.
    """
    for token, rank in ranks.items():
        if len(token) > 1:
            yield _pair(token, rank, ranks)


def _pair(token: bytes, limit: int, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Encode `token` with ranks below `limit`; the lowest rank first, the leftmost on a tie."""
    parts = [token[i : i + 1] for i in range(len(token))]
    scores = [ranks.get(token[i : i + 2], limit) for i in range(len(token) - 1)]
    while len(parts) > 2:
        best = min(scores)
        if best >= limit:
            raise RecipeRefused(
                "a token of the rank file cannot be reached by merges",
                where=f"rank {limit}, {token!r}",
                expected="two parts of lower rank",
                found=f"{len(parts)} parts",
            )
        at = scores.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del scores[at]
        if at > 0:
            scores[at - 1] = ranks.get(parts[at - 1] + parts[at], limit)
        if at < len(scores):
            scores[at] = ranks.get(parts[at] + parts[at + 1], limit)
    return parts[0], parts[1]


def tokenizer_json(
    ranks: Mapping[bytes, int],
    *,
    pattern: str,
    special: Mapping[str, int],
    normalizer: str | None = None,
    plain: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The document of a Hugging Face `tokenizers` file that encodes exactly as the ranks do.

    Args:    ranks: token -> rank, gapless from 0. pattern: the regular expression that cuts text into pieces.
             special: added tokens -> id, gapless after the last rank in this order (the library numbers them by
             position).
             normalizer: `NFC` or None. plain: added tokens that a decoder shows like text.
    Returns: a JSON value.
    Raises:  RecipeRefused: ids with a gap, or a token that merges cannot reach.
    """
    expected = list(range(len(ranks), len(ranks) + len(special)))
    if list(special.values()) != expected or list(ranks.values()) != list(range(len(ranks))):
        raise RecipeRefused(
            "the ids of a vocabulary are not contiguous",
            where="ranks and special tokens",
            expected=f"ranks from 0, then {len(special)} special tokens from {len(ranks)} on, in order",
            found=f"special ids {list(special.values())[:3]}…",
        )
    spelling = {token: to_byte_level(token) for token in ranks}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(name, number, plain) for name, number in special.items()],
        "normalizer": None if normalizer is None else {"type": normalizer},
        "pre_tokenizer": _pre_tokenizer(pattern),
        "post_processor": dict(_BYTE_LEVEL),
        "decoder": dict(_BYTE_LEVEL),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelling[token]: rank for token, rank in ranks.items()},
            "merges": [[spelling[left], spelling[right]] for left, right in merges(ranks)],
        },
    }


def json_bytes(document: Mapping[str, Any], *, pretty: bool = False) -> bytes:
    """The bytes of a document: on one line, or as the library itself saves it.

    Args:    pretty: two spaces of indent, no newline at the end; twice as long, and slow to write.
    """
    layout: dict[str, Any] = {"indent": 2} if pretty else {"separators": (",", ":")}
    return json.dumps(document, ensure_ascii=False, **layout).encode()


def _added(name: str, number: int, plain: frozenset[str]) -> dict[str, Any]:
    return {
        "id": number,
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": name not in plain,
    }


def _pre_tokenizer(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, dict(_BYTE_LEVEL)]}
