"""Text that is one thing over and over: it takes time and memory in proportion, and gives the right ids."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.data.harmony import LONG_RUN, HarmonyTokenizer, has_long_blanks
from recipes.data.vocabulary import encode_with

ROOT = Path(__file__).resolve().parents[2]
BLANKS = {
    "blanks": ("", " ", ""),
    "blanks before a word": ("", " ", "a"),
    "blanks in a sentence": ("a", " ", "!"),
    "blanks behind a line break": ("a\n", " ", "a"),
    "tabs": ("", "\t", "1"),
    "blanks of many kinds": ("x", " \t\u00a0\u3000\u2028\x0b\x85", "x"),
}
OTHERS = {
    "letters": ("", "a", ""),
    "capitals": ("", "A", "1"),
    "capitals, then a small letter": ("", "A", "a"),
    "humps": ("", "aA", ""),
    "digits": ("", "0", ""),
    "marks": ("e", "\u0301", ""),
    "modifiers": ("", "\u02b0", "'s"),
    "ideographs": ("", "中", "AV"),
    "contractions": ("I", "'s", ""),
    "punctuation": (" ", "!", "\n"),
    "slashes": ("!", "/", ""),
    "line breaks": ("", "\n", "a"),
    "line breaks behind punctuation": ("!", "\r\n", " a"),
    "blanks before a line break": ("a", " ", "\na"),
    "lines of blanks": ("", " " * 99 + "\n", " a"),
    "emoji": ("", "👩\u200d", ""),
    "the last code point": ("", "\U0010ffff", ""),
    "control characters": ("", "\x1c", ""),
    "NUL": ("", "\0", ""),
    "names of special tokens": ("", "<|end|>", ""),
}
WHITE = {"line breaks", "line breaks behind punctuation", "blanks before a line break", "lines of blanks"}
LENGTH, LONG = 150_000, 1_000_000  # characters
BYTES_A_CHARACTER = 800  # of memory at the most, counted over all kinds; measured: 430


def repeated(kind: tuple[str, str, str], length: int) -> str:
    before, piece, after = kind
    return before + (piece * length)[:length] + after


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", BLANKS)
def test_long_blanks_give_the_ids_that_the_encoder_gives_uncut(harmony: HarmonyTokenizer, name: str) -> None:
    text = repeated(BLANKS[name], LENGTH)
    assert LENGTH > LONG_RUN
    assert has_long_blanks(text)
    ids = harmony.encode(text)
    assert ids == harmony._encoding.encode_ordinary(text)  # the engine can still do this length
    assert harmony.decode(ids) == text


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", OTHERS)
def test_repetitions_come_back(harmony: HarmonyTokenizer, name: str) -> None:
    text = repeated(OTHERS[name], LENGTH)
    assert has_long_blanks(text) == (name in WHITE)  # not cut, since ours can do them; openai-harmony cannot
    assert harmony.decode(harmony.encode(text)) == text


@pytest.mark.slow
@pytest.mark.parametrize("name", BLANKS)
def test_a_million_blanks_give_the_ids_of_an_engine_without_a_limit(
    harmony: HarmonyTokenizer, o200k_file: Path, name: str
) -> None:
    text = repeated(BLANKS[name], LONG)
    with pytest.raises(BaseException, match="StackOverflow"):
        harmony._encoding.encode_ordinary(text)
    assert harmony.encode(text) == encode_with(o200k_file)(text)


@pytest.mark.slow
def test_a_million_of_anything_takes_memory_in_proportion(assets: Path) -> None:
    """In a process of its own, whose high-water mark nothing else has raised."""
    kinds = [*BLANKS.values(), *OTHERS.values()]
    code = (
        "import json, resource, sys; from pathlib import Path; from recipes.data.harmony import HarmonyTokenizer\n"
        "harmony = HarmonyTokenizer.from_directory(Path(sys.argv[1]))\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for before_, piece, after in json.loads(sys.stdin.read()):\n"
        f"    text = before_ + (piece * {LONG})[:{LONG}] + after\n"
        "    assert harmony.decode(harmony.encode(text)) == text\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(assets)],
        input=json.dumps(kinds),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
        check=True,
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < BYTES_A_CHARACTER * LONG
