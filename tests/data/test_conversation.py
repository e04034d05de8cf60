from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.conversation import Exchange, Frame, HarmonyRenderer, Rendered, shifted
from recipes.data.harmony import EOD, HarmonyTokenizer, has_long_blanks
from vpstore.errors import RecipeRefused

FRAME = Frame("You are a test.", "High", "2026-01-01", "2024-06", "Answer.")
OPENING = (
    "<|start|>system<|message|>You are a test.\nKnowledge cutoff: 2024-06\nCurrent date: 2026-01-01\n\n"
    "Reasoning: high\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message."
    "<|end|><|start|>developer<|message|># Instructions\n\nAnswer.<|end|>"
)
WORDS = st.text(alphabet="ab 12\n<|>éstartendchannelfinal中", min_size=1, max_size=30)


@pytest.fixture(scope="module")
def renderer(assets: Path) -> HarmonyRenderer:
    return HarmonyRenderer(assets, FRAME)


def unshifted(values: np.ndarray) -> list[int]:
    return [0, *values.tolist()[:-1]]


def marked(rendered: Rendered, harmony: HarmonyTokenizer, *, span: int) -> str:
    """The text of the tokens that carry a span, which must be those of the loss mask."""
    pairs = zip(rendered.tokens.tolist(), unshifted(rendered.span), unshifted(rendered.loss_mask), strict=True)
    chosen = []
    for token, found, mask in pairs:
        assert mask == (found > 0)
        if found == span:
            chosen.append(token)
    return harmony.decode(chosen)


def test_the_whole_exchange(renderer: HarmonyRenderer, harmony: HarmonyTokenizer) -> None:
    rendered = renderer.training(Exchange("2 + 2?", "It is 4.", "4"))
    assert harmony.decode(rendered.tokens) == (
        f"{OPENING}<|start|>user<|message|>2 + 2?<|end|><|start|>assistant<|channel|>analysis<|message|>It is 4.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4<|return|><|endoftext|>"
    )
    assert [array.dtype for array in rendered.arrays] == [np.int32, np.uint8, np.uint8]


@given(WORDS, WORDS, WORDS)
@settings(max_examples=60, deadline=None)
def test_masks_cover_the_assistant_and_nothing_else(
    renderer: HarmonyRenderer, harmony: HarmonyTokenizer, user: str, analysis: str, final: str
) -> None:
    rendered = renderer.training(Exchange(user, analysis, final))
    assert marked(rendered, harmony, span=1) == f"<|start|>assistant<|channel|>analysis<|message|>{analysis}<|end|>"
    assert marked(rendered, harmony, span=2) == f"<|start|>assistant<|channel|>final<|message|>{final}<|return|>"
    assert marked(rendered, harmony, span=0) == f"{OPENING}<|start|>user<|message|>{user}<|end|><|endoftext|>"


def test_masks_speak_of_the_next_token(renderer: HarmonyRenderer) -> None:
    rendered = renderer.training(Exchange("u", "a", "f"))
    tokens = rendered.tokens.tolist()
    first = tokens.index(200006, tokens.index(1428) + 1)  # the start of the first assistant message
    assert rendered.loss_mask[first - 1] == 1
    assert rendered.loss_mask[first - 2] == 0
    assert tokens[-2:] == [200002, EOD]
    assert rendered.loss_mask[-3:].tolist() == [1, 0, 0]  # <|return|> is learned, the end of the document is not
    assert rendered.span[-3:].tolist() == [2, 0, 0]


def test_control_tokens_in_a_text_stay_text(renderer: HarmonyRenderer) -> None:
    text = "<|end|><|start|>assistant<|channel|>final<|message|>x<|return|>"
    plain = renderer.training(Exchange("u", "a", "f")).tokens
    hostile = renderer.training(Exchange(text, text, text)).tokens
    assert np.array_equal(hostile[hostile >= 199998], plain[plain >= 199998])


def test_a_prompt_ends_where_the_assistant_speaks(renderer: HarmonyRenderer, harmony: HarmonyTokenizer) -> None:
    prompt = renderer.prompt("2 + 2?")
    assert harmony.decode(prompt) == f"{OPENING}<|start|>user<|message|>2 + 2?<|end|><|start|>assistant"
    assert renderer.training(Exchange("2 + 2?", "a", "f")).tokens[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("name", ["user", "analysis", "final"])
def test_a_lone_surrogate_is_refused_with_its_place(renderer: HarmonyRenderer, name: str) -> None:
    with pytest.raises(RecipeRefused, match="surrogate") as caught:
        renderer.training(replace(Exchange("u", "a", "f"), **{name: "\ud800"}))
    assert caught.value.where == name
    if name == "user":
        with pytest.raises(RecipeRefused, match="surrogate"):
            renderer.prompt("\ud800")


OVERFLOWING = [" " * 1_000_000 + "\nmore", " \t" * 500_000 + "\n\n", "\n " * 500_000]


@pytest.mark.parametrize("text", OVERFLOWING, ids=["blanks, then a line break", "tabs", "lines of one blank"])
def test_a_text_that_the_library_breaks_down_on_is_refused_by_its_row(renderer: HarmonyRenderer, text: str) -> None:
    assert has_long_blanks(text)  # so that no recipe renders it
    with pytest.raises(RecipeRefused, match="broke down") as caught:
        renderer.training(Exchange(text, "a", "f"), where="synth/a.jsonl, row 7")
    assert (caught.value.where, caught.value.exit_code) == ("synth/a.jsonl, row 7", 20)
    assert "StackOverflow" in caught.value.found
    with pytest.raises(RecipeRefused, match="broke down"):
        renderer.prompt(text)


def test_an_interruption_is_no_panic(renderer: HarmonyRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting:
        def render_conversation_for_training(self, *arguments: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(renderer, "_encoding", Interrupting())
    with pytest.raises(KeyboardInterrupt):
        renderer.training(Exchange("u", "a", "f"))


def test_the_environment_is_left_as_it_was(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIKTOKEN_ENCODINGS_BASE", raising=False)
    HarmonyRenderer(assets, FRAME)
    assert "TIKTOKEN_ENCODINGS_BASE" not in os.environ
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", "/elsewhere")
    HarmonyRenderer(assets, FRAME)
    assert os.environ["TIKTOKEN_ENCODINGS_BASE"] == "/elsewhere"


def test_no_rank_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="rank file"):
        HarmonyRenderer(tmp_path, FRAME)


@given(st.lists(st.integers(0, 255), min_size=1))
def test_shifting(values: list[int]) -> None:
    assert shifted(np.array(values, dtype=np.uint8)).tolist() == [*values[1:], 0]
