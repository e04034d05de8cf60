"""What the ids of a Hugging Face `tokenizers` file stand for, and how that file encodes text.

Place in the path: tokenizer.json -> **vocabulary** -> the vocabulary transplant, evaluation. Serves the donor's
file and the o200k one alike: both are byte-level.

Invariants: special tokens are never read out of text; token bytes are exact, also where they are no valid UTF-8.

Example:
    vocabulary = read_vocabulary(Path("tokenizer.json"))
    shared = set(vocabulary.tokens) & set(other.tokens) - {None}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from recipes.data.bpe import from_byte_level
from recipes.data.text import require_scalar_text
from vpstore.errors import RecipeRefused


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id."""

    tokens: list[bytes | None]  # None: a special token, or an id without a token
    special: dict[str, int]  # every added token, in the order of the ids


def read_vocabulary(tokenizer_json: Path) -> Vocabulary:
    """Read the tokens of a byte-level `tokenizer.json`.

    Returns: tokens[id] = the bytes that the id stands for; as long as the largest id + 1.
    Raises:  RecipeRefused: no such file, or not a byte-level BPE file.
    """
    document = _document(tokenizer_json)
    try:
        special = {str(added["content"]): int(added["id"]) for added in document["added_tokens"]}
        ordinary = {int(number): from_byte_level(text) for text, number in document["model"]["vocab"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a Unigram's vocabulary is a list
        raise _not_byte_level(tokenizer_json, repr(error)) from error
    tokens: list[bytes | None] = [None] * (max([*ordinary, *special.values()], default=-1) + 1)
    for number, token in ordinary.items():
        tokens[number] = token
    for number in special.values():
        tokens[number] = None
    return Vocabulary(tokens, dict(sorted(special.items(), key=lambda pair: pair[1])))


def encode_with(tokenizer_json: Path) -> Callable[[str], list[int]]:
    """The encoder of a `tokenizer.json`, for plain text: special-looking text stays text.

    Returns: a function from text to ids; it refuses lone surrogates and takes text of any length.
    Raises:  RecipeRefused: no such file, or not a byte-level BPE file.
    """
    document = _document(tokenizer_json)
    document["added_tokens"] = []
    try:
        tokenizer = Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # the library raises bare Exception
        raise _not_byte_level(tokenizer_json, str(error)) from error

    def encode(text: str) -> list[int]:
        require_scalar_text(text, where=tokenizer_json.name)
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return encode


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise RecipeRefused(
            "a tokenizer file cannot be read",
            where=path.name,
            expected="a Hugging Face tokenizers file",
            found=error.strerror or type(error).__name__,
        ) from error
    except ValueError as error:
        raise _not_byte_level(path, str(error)) from error
    if not isinstance(document, dict):
        raise _not_byte_level(path, type(document).__name__)
    return document


def _not_byte_level(path: Path, found: str) -> RecipeRefused:
    return RecipeRefused(
        "a tokenizer file is not what it should be",
        where=path.name,
        expected="a byte-level BPE file of the tokenizers library",
        found=found[:200],
        next_step="name a tokenizer whose model is byte-level BPE; Unigram, WordPiece and byte fallback are not read",
    )
