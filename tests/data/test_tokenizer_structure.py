"""What openai-harmony's parser lets through, and that the project's own does not; one case each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_harmony import HarmonyEncoding, HarmonyError

from recipes.data.conversation import Exchange, Frame, HarmonyRenderer
from recipes.data.harmony import EOD, HarmonyTokenizer
from recipes.train.conversation_validity import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    MESSAGE,
    RETURN,
    START,
    answer_fault,
    is_valid_answer,
)

# The ids of the words are held against the tokenizer by a test below.
ASSISTANT, ANALYSIS, FINAL, USER, TWO, THREE, SPACE, HALF = 173781, 35644, 17196, 1428, 17, 18, 220, 162
COMMENTARY = (12606, 815)
THOUGHT = [START, ASSISTANT, CHANNEL, ANALYSIS, MESSAGE, TWO, END]
ANSWER = [START, ASSISTANT, CHANNEL, FINAL, MESSAGE, THREE, RETURN]
OPEN_THOUGHT, OPEN_ANSWER, FINAL_OF = THOUGHT[:-1], ANSWER[:-1], ANSWER[:5]
NOT_CLOSED = "a message that nothing closes"
SPECIAL = "a special token inside a header or words"
CHANNELS = "a header that is neither the assistant's analysis nor its final"
ORDER = "not analysis first and then one final"
OUTSIDE = "a token outside of messages"
ONE_CHANNEL = "a header without one <|channel|>"


def headed(*header: int) -> list[int]:
    return [START, *header, MESSAGE, THREE, RETURN]


# What their parser reads without a word, also when it is strict: the ids, and the rule of ours that they break.
LET_THROUGH: dict[str, tuple[list[int], str]] = {
    "nothing at all": ([], "no message"),
    "final without an end": ([*THOUGHT, *OPEN_ANSWER], NOT_CLOSED),
    "final cut in the middle": ([*THOUGHT, *FINAL_OF], NOT_CLOSED),
    "thought without an end": ([*OPEN_THOUGHT, *ANSWER], SPECIAL),
    "final closed by <|end|>": ([*THOUGHT, *OPEN_ANSWER, END], "a final that <|return|> does not close"),
    "final closed by <|call|>": ([*THOUGHT, *OPEN_ANSWER, CALL], NOT_CLOSED),
    "thought closed by <|return|>": ([*OPEN_THOUGHT, RETURN, *ANSWER], "an analysis that <|end|> does not close"),
    "thought closed by <|call|>": ([*OPEN_THOUGHT, CALL, *ANSWER], SPECIAL),
    "no thought": (ANSWER, ORDER),
    "no final": (THOUGHT, ORDER),
    "thought after the final": ([*THOUGHT, *OPEN_ANSWER, END, *THOUGHT], ORDER),
    "thought after the end of the turn": ([*THOUGHT, *ANSWER, *THOUGHT], ORDER),
    "final, thought, final": ([*OPEN_ANSWER, END, *THOUGHT, *ANSWER], ORDER),
    "two finals": ([*THOUGHT, *OPEN_ANSWER, END, *ANSWER], ORDER),
    "two turns": ([*THOUGHT, *ANSWER, *ANSWER], ORDER),
    "empty final": ([*THOUGHT, *FINAL_OF, RETURN], "an empty final"),
    "final of white space": ([*THOUGHT, *FINAL_OF, SPACE, RETURN], "an empty final"),
    "commentary": ([*THOUGHT, START, ASSISTANT, CHANNEL, *COMMENTARY, MESSAGE, TWO, END, *ANSWER], CHANNELS),
    "a channel that nobody knows": ([*THOUGHT, *headed(ASSISTANT, CHANNEL, TWO)], CHANNELS),
    "a space after the channel": ([*THOUGHT, *headed(ASSISTANT, CHANNEL, FINAL, SPACE)], CHANNELS),
    "a recipient": ([*THOUGHT, *headed(ASSISTANT, CHANNEL, FINAL, SPACE, TWO)], CHANNELS),
    "no channel": ([*THOUGHT, *headed(ASSISTANT)], ONE_CHANNEL),
    "channel written as text": ([*THOUGHT, *headed(ASSISTANT, SPACE, FINAL)], ONE_CHANNEL),
    "another role": ([*THOUGHT, *headed(USER, CHANNEL, FINAL)], CHANNELS),
    "constrained final": ([*THOUGHT, *headed(ASSISTANT, CHANNEL, FINAL, CONSTRAIN, TWO)], SPECIAL),
    "<|start|> in a text": ([*OPEN_THOUGHT, START, END, *ANSWER], SPECIAL),
    "<|channel|> in a text": ([*OPEN_THOUGHT, CHANNEL, END, *ANSWER], SPECIAL),
    "<|message|> in a text": ([*OPEN_THOUGHT, MESSAGE, END, *ANSWER], SPECIAL),
    "<|constrain|> in a text": ([*OPEN_THOUGHT, CONSTRAIN, END, *ANSWER], SPECIAL),
    "<|startoftext|> in a text": ([*OPEN_THOUGHT, 199998, END, *ANSWER], SPECIAL),
    "<|endoftext|> in a text": ([*OPEN_THOUGHT, EOD, END, *ANSWER], SPECIAL),
    "<|endofprompt|> in a text": ([*OPEN_THOUGHT, 200018, END, *ANSWER], SPECIAL),
    "the first reserved id": ([*OPEN_THOUGHT, 200000, END, *ANSWER], SPECIAL),
    "the first id above the named ones": ([*THOUGHT, *FINAL_OF, 200019, RETURN], SPECIAL),
    "the last id of the vocabulary": ([*THOUGHT, *FINAL_OF, 201087, RETURN], SPECIAL),
    "their id outside of the vocabulary": ([*THOUGHT, *FINAL_OF, 201088, RETURN], SPECIAL),
    "an id that nobody has": ([*THOUGHT, *FINAL_OF, 201089, RETURN], SPECIAL),
    "half a character in the final": ([*THOUGHT, *FINAL_OF, THREE, HALF, RETURN], "words that are not UTF-8"),
    "half a character in the thought": ([*OPEN_THOUGHT, HALF, END, *ANSWER], "words that are not UTF-8"),
}

# What both refuse.
REFUSED: dict[str, tuple[list[int], str]] = {
    "text before the first <|start|>": ([TWO, *THOUGHT, *ANSWER], OUTSIDE),
    "text between messages": ([*THOUGHT, TWO, *ANSWER], OUTSIDE),
    "text after the last message": ([*THOUGHT, *ANSWER, TWO], OUTSIDE),
    "end of the document": ([*THOUGHT, *ANSWER, EOD], OUTSIDE),
    "a second <|end|>": ([*THOUGHT, END, *ANSWER], OUTSIDE),
    "no first <|start|>": ([*THOUGHT[1:], *ANSWER], OUTSIDE),
    "<|start|> twice": ([START, *THOUGHT, *ANSWER], SPECIAL),
    "<|start|> alone": ([*THOUGHT, START], "a header that <|message|> does not end"),
    "header cut": ([*THOUGHT, *ANSWER[:4]], "a header that <|message|> does not end"),
    "empty channel": ([*THOUGHT, *headed(ASSISTANT, CHANNEL)], CHANNELS),
    "two channels": ([*THOUGHT, *headed(ASSISTANT, CHANNEL, ANALYSIS, CHANNEL, FINAL)], ONE_CHANNEL),
    "no role": ([*THOUGHT, *headed(CHANNEL, FINAL)], CHANNELS),
    "unknown role": ([*THOUGHT, *headed(TWO, CHANNEL, FINAL)], CHANNELS),
    "reserved id in the header": ([*THOUGHT, *headed(ASSISTANT, 200500, CHANNEL, FINAL)], SPECIAL),
}

VALID: dict[str, list[int]] = {
    "a thought and an answer": [*THOUGHT, *ANSWER],
    "two thoughts": [*THOUGHT, *THOUGHT, *ANSWER],
    "an empty thought": [*THOUGHT[:5], END, *ANSWER],
    "a header of other tokens": [*THOUGHT, *headed(456, 421, 493, CHANNEL, FINAL)],
}


@pytest.fixture(scope="module")
def renderer(assets: Path) -> HarmonyRenderer:
    return HarmonyRenderer(assets, Frame("You are a test.", "High", "2026-01-01", "2024-06", "Answer."))


@pytest.fixture(scope="module")
def theirs(renderer: HarmonyRenderer) -> HarmonyEncoding:
    return renderer._encoding


def read(theirs: HarmonyEncoding, ids: Sequence[int]) -> list[tuple[str, str | None, str]]:
    """(role, channel, text) of each message, as openai-harmony's strict parser reads them."""
    messages = theirs.parse_messages_from_completion_tokens(ids, None, strict=True)
    return [(m.author.role.value, m.channel, "".join(part.text for part in m.content)) for m in messages]


def test_the_words_have_these_ids(harmony: HarmonyTokenizer) -> None:
    words = {"assistant": ASSISTANT, "analysis": ANALYSIS, "final": FINAL, "user": USER}
    for word, number in {**words, "2": TWO, "3": THREE, " ": SPACE}.items():
        assert harmony.encode(word) == [number]
    assert harmony.encode("commentary") == [*COMMENTARY]
    assert harmony.token_bytes(HALF) == b"\xe6"


@pytest.mark.parametrize("name", LET_THROUGH)
def test_their_parser_lets_it_through_and_ours_does_not(
    harmony: HarmonyTokenizer, theirs: HarmonyEncoding, name: str
) -> None:
    ids, fault = LET_THROUGH[name]
    read(theirs, ids)
    assert answer_fault(ids, harmony.decode) == fault
    assert not is_valid_answer(ids, harmony.decode)


@pytest.mark.parametrize("name", REFUSED)
def test_both_parsers_refuse_it(harmony: HarmonyTokenizer, theirs: HarmonyEncoding, name: str) -> None:
    ids, fault = REFUSED[name]
    with pytest.raises(HarmonyError):
        read(theirs, ids)
    assert answer_fault(ids, harmony.decode) == fault


@pytest.mark.parametrize("name", VALID)
def test_both_parsers_accept_it(harmony: HarmonyTokenizer, theirs: HarmonyEncoding, name: str) -> None:
    assert answer_fault(VALID[name], harmony.decode) == ""
    assert read(theirs, VALID[name])[-1] == ("assistant", "final", "3")


def test_a_negative_id_is_no_answer_and_no_crash(harmony: HarmonyTokenizer) -> None:
    assert answer_fault([*THOUGHT, *FINAL_OF, -1, RETURN], harmony.decode) == SPECIAL


PARTS = st.one_of(
    st.sampled_from([THOUGHT, ANSWER, OPEN_THOUGHT, OPEN_ANSWER, FINAL_OF]),
    st.sampled_from([START, ASSISTANT, CHANNEL, ANALYSIS, FINAL, MESSAGE, END, RETURN, TWO, SPACE, HALF]).map(
        lambda token: [token]
    ),
    st.lists(st.integers(0, 201087), min_size=1, max_size=2),
)


@given(st.lists(PARTS, max_size=6).map(lambda parts: [token for part in parts for token in part]))
@settings(max_examples=500, deadline=None)
def test_whatever_ours_accepts_theirs_reads_alike(
    harmony: HarmonyTokenizer, theirs: HarmonyEncoding, ids: list[int]
) -> None:
    if is_valid_answer(ids, harmony.decode):
        *thoughts, final = read(theirs, ids)
        assert thoughts
        assert {(role, channel) for role, channel, _ in thoughts} == {("assistant", "analysis")}
        assert final[:2] == ("assistant", "final")
        assert final[2].strip()


def spoken(channel: int, closing: int) -> st.SearchStrategy[list[int]]:
    words = st.lists(st.one_of(st.integers(0, 5000), st.integers(0, 199997)), max_size=4)
    return words.map(lambda ids: [START, ASSISTANT, CHANNEL, channel, MESSAGE, *ids, closing])


@given(st.lists(spoken(ANALYSIS, END), min_size=1, max_size=3), spoken(FINAL, RETURN))
@settings(max_examples=300, deadline=None)
def test_well_formed_answers_are_judged_by_their_words_alone(
    harmony: HarmonyTokenizer, theirs: HarmonyEncoding, thoughts: list[list[int]], final: list[int]
) -> None:
    ids = [token for message in [*thoughts, final] for token in message]
    texts = [harmony.decode(message[5:-1]) for message in [*thoughts, final]]
    channels = [*["analysis"] * len(thoughts), "final"]
    assert read(theirs, ids) == [("assistant", channel, text) for channel, text in zip(channels, texts, strict=True)]
    is_text = all("\ufffd" not in text for text in texts) and bool(texts[-1].strip())
    assert is_valid_answer(ids, harmony.decode) is is_text


@given(st.integers(0, 2 * len(THOUGHT) + len(ANSWER) - 1), st.integers(199998, 201100), st.sampled_from("adr"))
@settings(max_examples=300, deadline=None)
def test_one_special_token_too_many_or_too_few_breaks_an_answer(
    harmony: HarmonyTokenizer, place: int, token: int, how: str
) -> None:
    ids = [*THOUGHT, *THOUGHT, *ANSWER]
    assert is_valid_answer(ids, harmony.decode)
    at = place
    if how == "d":  # the next structural token is dropped
        at = next(i for i in range(place, len(ids)) if ids[i] >= 199998)
        changed = ids[:at] + ids[at + 1 :]
    else:
        changed = ids[:at] + [token] + ids[at + (how == "r") :]
    assert changed == ids or not is_valid_answer(changed, harmony.decode)


WORDS = st.text(alphabet="ab 12\n<|>éstartendchannelfinal中\ufeff", min_size=1, max_size=30)


@given(WORDS, WORDS, WORDS.filter(str.strip))
@settings(max_examples=60, deadline=None)
def test_spans_of_a_rendered_exchange_are_what_the_parsers_read(
    renderer: HarmonyRenderer, theirs: HarmonyEncoding, harmony: HarmonyTokenizer, user: str, thought: str, final: str
) -> None:
    rendered = renderer.training(Exchange(user, thought, final))
    tokens, spans = rendered.tokens.tolist(), [0, *rendered.span.tolist()[:-1]]  # back to the token itself
    spoken = [token for token, span in zip(tokens, spans, strict=True) if span]
    assert answer_fault(spoken, harmony.decode) == ""
    assert read(theirs, spoken) == [("assistant", "analysis", thought), ("assistant", "final", final)]
    assert read(theirs, tokens[:-1])[2:] == [("user", None, user), *read(theirs, spoken)]
    for span, channel in ((1, ANALYSIS), (2, FINAL)):
        part = [token for token, found in zip(tokens, spans, strict=True) if found == span]
        assert part[:5] == [START, ASSISTANT, CHANNEL, channel, MESSAGE]
        assert part[-1] == (END if span == 1 else RETURN)
