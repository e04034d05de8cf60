r"""The o200k Harmony tokenizer: ids, text and bytes, offline.

Place in the path: rank file -> **harmony** -> every data set, every evaluation. It is tiktoken's own encoder, built
from a local rank file whose digest is held against the published one.

Invariants: `encode` never returns a special token, whatever the text looks like; it takes text of any length, and
refuses text that has no UTF-8 form instead of replacing characters. White space without a line break that runs for
very long overflows the encoder's regular expression engine. Such a run is cut where the expression itself cuts:
after the last line break before it (there `\s*[\r\n]+` ends) or at its first character (no piece goes from other
text into white space that is no line break), and before its last character if text follows (there `\s+(?!\S)`
ends). What lies between is one piece and is merged as one piece, so the ids are those that an unlimited engine
would give.

Example:
    tokenizer = HarmonyTokenizer.from_directory(Path("assets"))
    tokenizer.decode(tokenizer.encode("1 + 1 = 2"))
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

import tiktoken

from recipes.data.bpe import load_ranks
from recipes.data.encodings import O200K_HARMONY
from recipes.data.text import require_scalar_text
from vpstore.errors import RecipeRefused

RANKS_FILE = "o200k_base.tiktoken"
EOD = O200K_HARMONY.special["<|endoftext|>"]

# Prompts of the runbook with their exact ids; a tokenizer that differs here is another tokenizer.
NUMERIC_GOLDENS: dict[str, tuple[int, ...]] = {
    "1 2 3 4 5": (16, 220, 17, 220, 18, 220, 19, 220, 20),
    "1234567890": (7633, 19354, 29338, 15),
    "1.2345e-10": (16, 13, 20771, 20, 68, 12, 702),
    "2025-08-05": (1323, 20, 12, 3062, 12, 2922),
    "1/3 = 0.333...": (16, 14, 18, 314, 220, 15, 13, 15517, 1008),
}

# White space of the expression's \s but for the two line breaks that its pieces end with.
_BLANKS = r"\t\x0b\x0c \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_RUN = re.compile(f"[{_BLANKS}]{{2,}}+")
_WHITE_RUN = re.compile(f"[{_BLANKS}\r\n]{{2,}}+")
LONG_RUN = 100_000  # characters; the engine gives up somewhere between 400,000 and 1,000,000


class HarmonyTokenizer:
    """Text <-> ids of o200k_harmony."""

    n_vocab = O200K_HARMONY.n_vocab

    def __init__(self, ranks: dict[bytes, int], *, long_run: int = LONG_RUN) -> None:
        """Build from parsed ranks.

        Args:    long_run: length from which a run of blanks is cut; at least 2. The ids do not depend on it.
        """
        self.special: dict[str, int] = dict(O200K_HARMONY.special)
        self._names = {number: name.encode() for name, number in self.special.items()}
        self._encoding = tiktoken.Encoding(
            O200K_HARMONY.name,
            explicit_n_vocab=self.n_vocab,
            pat_str=O200K_HARMONY.pattern,
            mergeable_ranks=ranks,
            special_tokens=self.special,
        )
        self._long_run = long_run

    @classmethod
    def from_directory(cls, path: Path) -> HarmonyTokenizer:
        """The tokenizer of a folder that holds the rank file.

        Raises:  RecipeRefused: no rank file, or not the published one.
        """
        return cls(verified_ranks(path / RANKS_FILE))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text.

        Raises:  RecipeRefused: a lone surrogate.
        """
        require_scalar_text(text, where="text to encode")
        ids: list[int] = []
        done = 0
        for start, stop in _long_blanks(text, self._long_run):
            end = stop if stop == len(text) else stop - 1
            ids += self._encoding.encode_ordinary(text[done:start])
            ids += self._encoding._encode_single_piece(text[start:end])  # merges only, no expression
            done = end
        return ids + self._encoding.encode_ordinary(text[done:])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens by name; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids, exact for every sequence of ids."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, number: int) -> bytes:
        """What one id stands for; a special token stands for its name.

        Raises:  RecipeRefused: an id outside the vocabulary.
        """
        if number in self._names:
            return self._names[number]
        if not 0 <= number < O200K_HARMONY.n_ranks:
            raise RecipeRefused(
                "an id lies outside the vocabulary",
                where=O200K_HARMONY.name,
                expected=f"0 to {self.n_vocab - 1}",
                found=str(number),
                next_step="look for another tokenizer's ids, or for 201088, which openai-harmony alone knows",
            )
        return self._encoding.decode_single_token_bytes(number)


def has_long_blanks(text: str) -> bool:
    """Whether text has a run of white space at which openai-harmony overflows; in time linear in the text.

    Its older engine overflows also where ours does not: in a run that holds line breaks, or that one follows.
    """
    if len(text) < LONG_RUN:
        return False
    return any(run.end() - run.start() >= LONG_RUN for run in _WHITE_RUN.finditer(text))


def _long_blanks(text: str, length: int) -> Iterator[tuple[int, int]]:
    """Start and end of each run of at least `length` blanks that no line break follows; in time linear in the text."""
    if len(text) < length:
        return
    for run in _RUN.finditer(text):
        start, end = run.span()
        if end - start >= length and text[end : end + 1] not in ("\r", "\n"):
            yield start, end


def verified_ranks(path: Path) -> dict[bytes, int]:
    """The ranks of the published o200k file.

    Raises:  RecipeRefused: no such file, or a file with another digest.
    """
    if path.is_file():
        found = sha256(path.read_bytes()).hexdigest()
        if found == O200K_HARMONY.ranks_sha256:
            return load_ranks(path)
    else:
        found = "no such file"
    raise RecipeRefused(
        "the rank file is not the published one",
        where=path.name,
        expected=f"sha256 {O200K_HARMONY.ranks_sha256}",
        found=found,
        next_step=f"put the published {RANKS_FILE} there (a copy lies in assets/); ids of another file mean other text",
    )
