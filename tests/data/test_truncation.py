"""Structured truncation, by arithmetic and on rendered rows; openai-harmony's parser and a slow oracle judge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai_harmony import HarmonyEncoding, Role, load_harmony_encoding

from recipes.data.assembly import Assembled, Assembler, Surroundings, arrays_of
from recipes.data.conversation import Exchange, Frame, HarmonyRenderer
from recipes.data.harmony import EOD, HarmonyTokenizer
from recipes.data.truncation import Kept, Limits

FRAME = Frame("You are a test.", "High", "2026-01-01", "2024-06", "Answer.")
NO_LIMIT = Limits(max_tokens=10**9, min_analysis_tokens=4, min_user_tokens=4)
SIZES = st.integers(0, 300)
FLOORS = st.integers(4, 40)
# Characters of one to four bytes, many of which take several tokens; look-alikes of control tokens; white space.
HARD = st.text(alphabet="ab 1\n<|>éß中文👩🏳𓀀𐍈\u200d", min_size=1, max_size=60).filter(lambda text: bool(text.strip()))
TEXTS = st.one_of(HARD, st.sampled_from(["<|end|>", "<|start|>assistant<|channel|>final<|message|>x<|return|>"]))


@pytest.fixture(scope="module")
def renderer(assets: Path) -> HarmonyRenderer:
    return HarmonyRenderer(assets, FRAME)


@pytest.fixture(scope="module")
def around(renderer: HarmonyRenderer, harmony: HarmonyTokenizer) -> Surroundings:
    return Surroundings.of(renderer, harmony)


@pytest.fixture(scope="module")
def parser(assets: Path) -> HarmonyEncoding:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(assets))
        return load_harmony_encoding("HarmonyGptOss")


@given(SIZES, SIZES, SIZES, st.integers(0, 60), st.integers(1, 800), FLOORS, FLOORS)
@settings(max_examples=500, deadline=None)
@example(10, 90, 30, 20, 100, 8, 8)
def test_what_is_kept(user: int, analysis: int, final: int, fixed: int, limit: int, low_a: int, low_u: int) -> None:
    limits = Limits(limit, low_a, low_u)
    kept = limits.kept(fixed=fixed, user=user, analysis=analysis, final=final)
    least = fixed + final + min(user, low_u) + min(analysis, low_a)
    assert (kept is None) == (least > limit)  # dropped only if even the floors do not fit
    if kept is None:
        return
    assert fixed + final + kept.user + kept.analysis == min(limit, fixed + final + user + analysis)  # nothing is wasted
    assert min(user, low_u) <= kept.user <= user
    assert min(analysis, low_a) <= kept.analysis <= analysis
    if kept.user < user:
        assert kept.analysis == min(analysis, low_a)  # the question is cut only once the reasoning is at its floor


def test_the_example_of_the_module() -> None:
    assert Limits(100, 8, 8).kept(fixed=20, user=10, analysis=90, final=30) == Kept(user=10, analysis=40)


def slow_masks(tokens: list[int], harmony: HarmonyTokenizer) -> tuple[list[int], list[int]]:
    """Loss mask and span by a walk over the tokens, one state after the other."""
    names = {number: name for name, number in harmony.special.items()}
    spans, span, header = [], 0, None
    for token in tokens:
        name = names.get(token)
        if name == "<|start|>":
            header, at = [], len(spans)
        elif name == "<|message|>":
            text = harmony.decode(header or [])
            span = {"assistant<|channel|>analysis": 1, "assistant<|channel|>final": 2}.get(text, 0)
            spans[at:] = [span] * (len(spans) - at)
            header = None
        elif header is not None:
            header.append(token)
        if name == "<|endoftext|>":
            span = 0
        spans.append(span)
    following = [*spans[1:], 0]
    return [int(value > 0) for value in following], following


def check(document: Assembled, exchange: Exchange, harmony: HarmonyTokenizer, parser: HarmonyEncoding) -> None:
    rendered = arrays_of([document])
    tokens = rendered.tokens.tolist()
    mask, span = slow_masks(tokens, harmony)
    assert rendered.loss_mask.tolist() == mask
    assert rendered.span.tolist() == span
    assert tokens[-1] == EOD
    messages = parser.parse_messages_from_completion_tokens(tokens[:-1], None)
    assert [message.author.role for message in messages[-3:]] == [Role.USER, Role.ASSISTANT, Role.ASSISTANT]
    assert [message.channel for message in messages[-2:]] == ["analysis", "final"]
    user, analysis, final = (message.content[0].text for message in messages[-3:])
    assert final == exchange.final
    assert exchange.analysis.endswith(analysis)
    assert exchange.user.endswith(user)
    assert analysis
    assert user
    for text, whole, cut in (
        (user, exchange.user, document.user_cut),
        (analysis, exchange.analysis, document.analysis_cut),
    ):
        assert (text == whole) == (cut == 0)


@given(TEXTS, TEXTS, TEXTS, st.integers(0, 160), FLOORS, FLOORS)
@settings(max_examples=300, deadline=None)
def test_every_length_gives_a_whole_conversation(
    around: Surroundings,
    harmony: HarmonyTokenizer,
    parser: HarmonyEncoding,
    user: str,
    analysis: str,
    final: str,
    room: int,
    low_a: int,
    low_u: int,
) -> None:
    exchange, limit = Exchange(user, analysis, final), around.size + room
    document = Assembler(harmony, around, Limits(limit, low_a, low_u)).assemble(exchange)
    counts = [len(harmony.encode(text)) for text in (user, analysis, final)]
    if document is None:
        assert around.size + counts[2] + min(counts[0], low_u) + min(counts[1], low_a) > limit
        return
    assert len(document.tokens) <= limit
    assert len(document.tokens) + document.user_cut + document.analysis_cut == around.size + sum(counts)
    check(document, exchange, harmony, parser)


def test_every_limit_of_one_row(around: Surroundings, harmony: HarmonyTokenizer, parser: HarmonyEncoding) -> None:
    exchange = Exchange(
        "Where is 中文 👩‍👩‍👧 spoken, and by whom?", "First 👩🏽‍🚀 𓀀𓀁𓀂 then, 中文字 " * 4, "Here: 答 👍🏽"
    )
    whole = Assembler(harmony, around, NO_LIMIT).assemble(exchange)
    assert whole is not None
    sizes = []
    for limit in range(around.size, len(whole.tokens) + 3):
        document = Assembler(harmony, around, Limits(limit, 6, 4)).assemble(exchange)
        sizes.append(len(document.tokens) if document else 0)
        if document is not None:
            assert limit - 3 <= len(document.tokens) <= limit or document.tokens == whole.tokens
            check(document, exchange, harmony, parser)
    assert sizes == sorted(sizes)
    assert sizes[0] == 0
    assert sizes[-1] == len(whole.tokens)


def test_a_cut_without_care_would_split_a_character(harmony: HarmonyTokenizer) -> None:
    """The negative control of the rule that a text begins at a character."""
    ids = harmony.encode("𓀀𓀁𓀂")
    assert "\ufffd" in harmony.decode(ids[1:])


def test_thousands_of_rows_are_what_openai_harmony_renders(
    assets: Path, renderer: HarmonyRenderer, around: Surroundings, harmony: HarmonyTokenizer
) -> None:
    assembler = Assembler(harmony, around, NO_LIMIT)
    rows = [json.loads(line) for line in (assets / "synth_sample.jsonl").read_text(encoding="utf-8").splitlines()]
    prose = [json.loads(line)["text"] for line in (assets / "corpus/prose.jsonl").read_text("utf-8").splitlines()]
    pieces = [text[at : at + 61] for text in prose for at in range(0, len(text), 400)]
    pieces = [piece for piece in pieces if piece.strip()]
    exchanges = [Exchange(row["query"], row["synthetic_reasoning"], row["synthetic_answer"]) for row in rows]
    exchanges += [Exchange(*pieces[n : n + 3]) for n in range(0, 2500)]
    assert len(exchanges) == 3000
    documents = [assembler.assemble(exchange) for exchange in exchanges]
    ours = arrays_of([document for document in documents if document])
    theirs = [renderer.training(exchange).arrays for exchange in exchanges]
    for number, array in enumerate(ours.arrays):
        assert np.array_equal(array, np.concatenate([each[number] for each in theirs]))


@given(TEXTS, TEXTS, TEXTS)
@settings(max_examples=300, deadline=None)
def test_generated_rows_are_what_openai_harmony_renders(
    renderer: HarmonyRenderer, around: Surroundings, harmony: HarmonyTokenizer, user: str, analysis: str, final: str
) -> None:
    exchange = Exchange(user, analysis, final)
    document = Assembler(harmony, around, NO_LIMIT).assemble(exchange)
    assert document is not None
    for ours, theirs in zip(arrays_of([document]).arrays, renderer.training(exchange).arrays, strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


def test_a_frame_that_spells_the_marking_words(assets: Path, harmony: HarmonyTokenizer) -> None:
    """The surroundings are cut at control tokens, not at words that a frame might hold."""
    frame = Frame("a question", "Low", "2026-01-01", "2024-06", "some thought")
    renderer = HarmonyRenderer(assets, frame)
    exchange = Exchange("u", "a", "f")
    document = Assembler(harmony, Surroundings.of(renderer, harmony), NO_LIMIT).assemble(exchange)
    assert document is not None
    assert document.tokens == renderer.training(exchange).tokens.tolist()


# 2 + 2 in the frame above, written down once: header and text of each message on a line of its own.
# fmt: off
GOLDEN = [
    200006, 17360, 200008, 3575, 553, 261, 1746, 558, 87447, 100594, 25, 220, 1323, 19, 12, 3218, 198, 6576, 3521, 25,
    220, 1323, 21, 12, 2290, 12, 2290, 279, 30377, 289, 25, 1932, 279, 2, 13888, 18403, 25, 8450, 11, 49159, 11, 1721,
    13, 21030, 2804, 413, 7360, 395, 1753, 3176, 13, 200007,
    200006, 77944, 200008, 2, 68406, 279, 17045, 13, 200007,
    200006, 1428, 200008, 17, 659, 220, 17, 30, 200007,
    200006, 173781, 200005, 35644, 200008, 17, 659, 220, 17, 314, 220, 19, 13, 200007,
    200006, 173781, 200005, 17196, 200008, 19, 200002,
    199999,
]
# fmt: on


def test_one_row_token_by_token(around: Surroundings, harmony: HarmonyTokenizer) -> None:
    document = Assembler(harmony, around, NO_LIMIT).assemble(Exchange("2 + 2?", "2 + 2 = 4.", "4"))
    assert document is not None
    rendered = arrays_of([document])
    assert rendered.tokens.tolist() == GOLDEN
    assert rendered.span.tolist() == [0] * 69 + [1] * 14 + [2] * 7 + [0] * 2
    assert rendered.loss_mask.tolist() == [0] * 69 + [1] * 21 + [0] * 2
