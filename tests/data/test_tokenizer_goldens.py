"""Ids that are stated: white space, Unicode, look-alikes of special tokens, halves of characters, strange ids."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.harmony import NUMERIC_GOLDENS, HarmonyTokenizer
from recipes.data.vocabulary import encode_with

TOKENIZER_MD = Path(__file__).parents[2] / "docs/TOKENIZER.md"
O200K_COUNTS, QWEN_COUNTS = (9, 4, 7, 6, 9), (9, 10, 10, 10, 11)

WHITE_SPACE: dict[str, tuple[int, ...]] = {
    "": (),
    " ": (220,),
    "  ": (256,),
    "   ": (271,),
    "\t": (197,),
    "\t\t": (335,),
    "\n": (198,),
    "\n\n": (279,),
    "\r\n": (370,),
    " \n": (793,),
    "\n ": (198, 220),
    " \n \n": (56319,),
    "\x0b\x0c": (199, 200),
    "\x1c": (216,),  # white space for Python, not for the expression
    "\x85": (126, 227),
    "\u00a0": (5310,),
    "\u2028": (51008,),
    "\u3000": (1397,),
    "a b": (64, 287),
    "a  b": (64, 220, 287),  # the last blank goes with the word
    "a   b": (64, 256, 287),
    "a\u00a0b": (64, 5310, 65),
    "   x": (256, 1215),
    "x   ": (87, 271),
}

UNICODE: dict[str, tuple[int, ...]] = {
    "\u00e9": (377,),
    "e\u0301": (68, 13430),  # not normalized: another spelling, other ids
    "\ufb01": (79332,),
    "Ångström": (13631, 892, 162823),
    "straße": (70882,),
    "İstanbul": (4599, 42754),
    "ǅ": (131, 227),
    "русский": (89837, 18837),
    "עברית": (184388, 6277),
    "हिन्दी": (1554, 71602, 840),
    "中文": (10667,),
    "日本語": (9048, 40909),
    "한국어": (114854, 5959),
    "I'll": (67504,),
    "I'LL": (40, 6, 7454),
    "I\u2019ll": (40, 4720),
    "I'\u017f": (40, 6, 70067),  # a long s is an s to a contraction that ignores case
    "½": (27124,),
    "١٢٣": (46600, 53184, 81473),
    "👍": (82514,),
    "👩‍👩‍👧‍👦": (28823, 102, 2524, 28823, 102, 2524, 28823, 100, 2524, 28823, 99),
    "🏳️‍🌈": (52622, 111, 15148, 2524, 64364, 230),
    "𝔘": (43120, 242, 246),
    "𒀀": (172, 240, 222, 222),
    "\U0010ffff": (176, 237, 123, 123),
    "\ufeff": (5574,),
    "\x00": (188,),
}

LOOK_ALIKES: dict[str, tuple[int, ...]] = {
    "<|startoftext|>": (27, 91, 5236, 1440, 919, 91, 29),
    "<|endoftext|>": (27, 91, 419, 1440, 919, 91, 29),
    "<|return|>": (27, 91, 1034, 91, 29),
    "<|constrain|>": (27, 91, 542, 141043, 91, 29),
    "<|channel|>": (27, 91, 21453, 91, 29),
    "<|start|>": (27, 91, 5236, 91, 29),
    "<|end|>": (27, 91, 419, 91, 29),
    "<|message|>": (27, 91, 3938, 91, 29),
    "<|call|>": (27, 91, 9925, 91, 29),
    "<|endofprompt|>": (27, 91, 419, 1440, 82467, 91, 29),
    "<|reserved_200018|>": (27, 91, 116758, 62, 1179, 25749, 91, 29),
    "<|reserved_201087|>": (27, 91, 116758, 62, 667, 47425, 91, 29),
}

# Ids whose bytes are text that encodes to other ids: the expression cuts that text in two. Each with its two ids, and
# with a longer text that does bring the id out.
CUT: dict[int, tuple[bytes, tuple[int, int], str]] = {
    3413: (b" I'", (357, 6), " I'LL"),
    3914: (b"\n//", (198, 393), " !\n//"),
    24091: (b"\r\n//", (370, 393), "!\r\n//"),
    48235: (b"\n///", (198, 5991), "!\n///"),
    63100: (b"\n\n//", (279, 393), "$\n\n//"),
    65447: (b"\n//\n//", (198, 5754), "!\n//\n//"),
    99494: (" 亚洲AV".encode(), (12555, 5345), " 亚洲AVs"),
    125141: (b"\r\n\r\n//", (1414, 393), "!\r\n\r\n//"),
    147008: ("无码AV".encode(), (9070, 5345), "无码AVs"),
    175653: (b"\n\n\n//", (2499, 393), " !\n\n\n//"),
    182292: (" 天天中彩票APP".encode(), (2783, 13444), " 天天中彩票APPs"),
    193819: ("亚洲AV".encode(), (6199, 5345), "亚洲AVs"),
}
NO_TEXT = 1562  # ids whose bytes alone are no UTF-8
NO_TEXT_DIGEST = "fc9f276b96b51fc977fa80824d84dd3c7176dce87ef4ec6afa6f2ae51103f8f9"
CUT_DIGEST = "abe1aedaea64458ad8ddfe5220d68887d82f99c1bbea72a8d9e41381a890b0bc"
NEVER = tuple(bytes((byte,)) for byte in (0xC0, 0xC1, *range(0xF5, 0x100)))  # bytes that no UTF-8 holds


@pytest.mark.parametrize(
    ("text", "ids"), [*WHITE_SPACE.items(), *UNICODE.items(), *LOOK_ALIKES.items(), *NUMERIC_GOLDENS.items()], ids=ascii
)
def test_stated_ids(harmony: HarmonyTokenizer, text: str, ids: tuple[int, ...]) -> None:
    assert tuple(harmony.encode(text)) == ids
    assert harmony.decode(ids) == text


def test_numeric_prompts_have_the_stated_numbers_of_tokens(harmony: HarmonyTokenizer, qwen_file: Path) -> None:
    donor = encode_with(qwen_file)
    assert tuple(len(harmony.encode(text)) for text in NUMERIC_GOLDENS) == O200K_COUNTS
    assert tuple(len(donor(text)) for text in NUMERIC_GOLDENS) == QWEN_COUNTS


def test_every_special_name_stays_text(harmony: HarmonyTokenizer) -> None:
    for name in (*harmony.special, "<|reserved_200018|>", "<|reserved_201088|>"):
        ids = harmony.encode(name)
        assert max(ids) < 199998
        assert harmony.decode(ids) == name


@given(st.lists(st.one_of(st.sampled_from(sorted(LOOK_ALIKES)), st.text(max_size=5)), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_no_text_makes_a_special_id(harmony: HarmonyTokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    assert max(harmony.encode(text), default=0) < 199998
    assert harmony.decode(harmony.encode(text)) == text


# Halves of characters: ids and the text that they decode to, a replacement for each broken part.
@pytest.mark.parametrize(
    ("text", "ids", "decoded"),
    [
        ("👩", (28823,), "\ufffd"),  # three of its four bytes
        ("👩", (28823, 102), "👩"),
        ("🏳", (52622,), "\ufffd"),
        ("𒀀", (172,), "\ufffd"),
        ("𒀀", (172, 240), "\ufffd"),
        ("𒀀", (172, 240, 222), "\ufffd"),
        ("𒀀", (240, 222, 222), "\ufffd\ufffd\ufffd"),  # what continues without a beginning
        ("a", (172, 64), "\ufffda"),
        ("ǅ", (227, 131), "\ufffd\ufffd"),  # the two halves in the wrong order
    ],
)
def test_halves_of_characters(harmony: HarmonyTokenizer, text: str, ids: tuple[int, ...], decoded: str) -> None:
    assert harmony.decode(ids) == decoded
    assert set(ids) <= set(harmony.encode(text)) | {172}


def test_bytes_that_no_utf8_holds_decode_to_replacements(harmony: HarmonyTokenizer) -> None:
    numbers = [next(n for n in range(256) if harmony.token_bytes(n) == byte) for byte in NEVER]
    assert harmony.decode_bytes(numbers) == b"".join(NEVER)
    assert harmony.decode(numbers) == "\ufffd" * 13


@given(st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_stream_of_ids_decodes_piece_by_piece(harmony: HarmonyTokenizer, text: str) -> None:
    ids = harmony.encode(text)
    for stop in range(len(ids) + 1):
        part = harmony.decode_bytes(ids[:stop])
        assert text.encode().startswith(part)
        assert text.startswith(part.decode(errors="ignore"))  # all but an unfinished last character


def test_all_ids_that_never_come_out_of_their_own_text(harmony: HarmonyTokenizer) -> None:
    no_text, cut = [], []
    for number in range(199998):
        data = harmony.token_bytes(number)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            no_text.append(number)
            continue
        if harmony.encode(text) != [number]:
            cut.append(number)
    assert len(no_text) == NO_TEXT
    assert cut == list(CUT)
    assert digest(no_text) == NO_TEXT_DIGEST
    assert digest(cut) == CUT_DIGEST
    merged = harmony._encoding._encode_single_piece  # the expression alone is at fault: merges lead back to every id
    assert all(merged(harmony.token_bytes(number)) == [number] for number in range(199998))


def digest(numbers: list[int]) -> str:
    return sha256(" ".join(map(str, numbers)).encode()).hexdigest()


@pytest.mark.parametrize("number", CUT)
def test_an_id_that_is_cut_in_its_own_text(harmony: HarmonyTokenizer, number: int) -> None:
    data, halves, longer = CUT[number]
    assert harmony.token_bytes(number) == data
    assert tuple(harmony.encode(data.decode())) == halves
    assert number in harmony.encode(longer)


def test_the_page_states_what_is_tested_here(harmony: HarmonyTokenizer) -> None:
    page = TOKENIZER_MD.read_text(encoding="utf-8")
    for figure in (f"{NO_TEXT:,}", str(len(CUT)), f"{NO_TEXT + len(CUT) + len(harmony.special):,}", NO_TEXT_DIGEST):
        assert figure in page
    for text, count in zip(NUMERIC_GOLDENS, zip(O200K_COUNTS, QWEN_COUNTS, strict=True), strict=True):
        assert f"| `{text}` | {' '.join(map(str, harmony.encode(text)))} | {count[0]} | {count[1]} |" in page
    for name, number in harmony.special.items():
        if not name.startswith("<|reserved_"):
            escaped = name.replace("|", r"\|")  # a bar would end the cell
            assert f"| `{escaped}` | {number} |" in page
    for number in CUT:
        assert f"| {number} | `{json.dumps(harmony.token_bytes(number).decode(), ensure_ascii=False)}` |" in page
