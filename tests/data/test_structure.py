"""Documents are conversations before they are written: what passes, and every single way not to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.assembly import Assembler, Surroundings, arrays_of
from recipes.data.conversation import Exchange, Frame, HarmonyRenderer, Rendered
from recipes.data.harmony import HarmonyTokenizer
from recipes.data.structure import Structure
from recipes.data.truncation import Limits
from recipes.train.conversation_validity import START, answer_fault
from vpstore.errors import RecipeRefused

FRAME = Frame("You are a test.", "High", "2026-01-01", "2024-06", "Answer.")
WORDS = st.text(alphabet="ab 12\n<|>éstartendchannelfinal中", min_size=1, max_size=60)
EXCHANGES = [
    Exchange("2 + 2?", "It is 4.", "4"),
    Exchange("<|end|>", "x" * 300, "<|return|><|start|>"),
    Exchange("?", "a", "b"),
]


@pytest.fixture(scope="module")
def renderer(assets: Path) -> HarmonyRenderer:
    return HarmonyRenderer(assets, FRAME)


@pytest.fixture(scope="module")
def around(renderer: HarmonyRenderer, harmony: HarmonyTokenizer) -> Surroundings:
    return Surroundings.of(renderer, harmony)


def assembled(around: Surroundings, harmony: HarmonyTokenizer, exchanges: list[Exchange]) -> tuple[Rendered, list[int]]:
    assembler = Assembler(harmony, around, Limits(max_tokens=110, min_analysis_tokens=4, min_user_tokens=4))
    documents = [document for exchange in exchanges if (document := assembler.assemble(exchange))]
    return arrays_of(documents), [len(document.tokens) for document in documents]


@given(st.lists(st.builds(Exchange, WORDS, WORDS, WORDS), min_size=1, max_size=4))
@settings(max_examples=80, deadline=None)
def test_what_is_assembled_passes_and_the_parser_agrees(
    around: Surroundings, harmony: HarmonyTokenizer, exchanges: list[Exchange]
) -> None:
    rendered, lengths = assembled(around, harmony, exchanges)
    if not lengths:
        return
    Structure(around).require(rendered, lengths, where="here")
    for start, stop in zip(np.cumsum(lengths) - lengths, np.cumsum(lengths), strict=True):
        tokens = rendered.tokens[start : stop - 1].tolist()
        second_last = [place for place, token in enumerate(tokens) if token == START][-2]
        assert answer_fault(tokens[second_last:], harmony.decode) in ("", "an empty final")


def test_what_the_library_renders_passes(renderer: HarmonyRenderer, around: Surroundings) -> None:
    for exchange in EXCHANGES:
        rendered = renderer.training(exchange)
        Structure(around).require(rendered, [rendered.tokens.size], where="here")


def place(rendered: Rendered, token: int, which: int = -1) -> int:
    return int(np.flatnonzero(rendered.tokens == token)[which])


def spelled(rendered: Rendered) -> None:
    rendered.tokens[place(rendered, 200008) + 1] = 200007  # a control token as the answer's word


def closed_otherwise(rendered: Rendered) -> None:
    rendered.tokens[place(rendered, 200002)] = 200007


def unclosed(rendered: Rendered) -> None:
    rendered.tokens[place(rendered, 200007, 2)] = 220


def swapped(rendered: Rendered) -> None:
    here, there = place(rendered, 200005, -1), place(rendered, 200008, -1)
    rendered.tokens[[here, there]] = rendered.tokens[[there, here]]


def unmasked(rendered: Rendered) -> None:
    rendered.loss_mask[place(rendered, 200002) - 1] = 0


def span_of_another(rendered: Rendered) -> None:
    rendered.span[place(rendered, 200002) - 1] = 1
    rendered.loss_mask[:] = rendered.span > 0


def span_in_words(rendered: Rendered) -> None:
    rendered.span[place(rendered, 200008, 2) + 1] = 2  # inside of the question
    rendered.loss_mask[:] = rendered.span > 0


def reserved(rendered: Rendered) -> None:
    rendered.tokens[place(rendered, 200008) + 1] = 201087


@pytest.mark.parametrize(
    "damage", [spelled, closed_otherwise, unclosed, swapped, unmasked, span_of_another, span_in_words, reserved]
)
def test_every_damage_is_found(
    around: Surroundings, harmony: HarmonyTokenizer, damage: Callable[[Rendered], None]
) -> None:
    rendered, lengths = assembled(around, harmony, EXCHANGES)
    Structure(around).require(rendered, lengths, where="synth/a.jsonl, train")
    damage(rendered)
    with pytest.raises(RecipeRefused, match="no conversation") as caught:
        Structure(around).require(rendered, lengths, where="synth/a.jsonl, train")
    assert (caught.value.where, caught.value.exit_code) == ("synth/a.jsonl, train", 20)


def test_a_final_without_words_and_a_wrong_length_are_found(around: Surroundings, harmony: HarmonyTokenizer) -> None:
    rendered, lengths = assembled(around, harmony, EXCHANGES)
    structure = Structure(around)
    with pytest.raises(RecipeRefused) as caught:
        structure.require(rendered, [lengths[0] + 1, lengths[1] - 1, *lengths[2:]], where="here")
    assert caught.value.found.startswith("document 0 has ")
    word = place(rendered, 200002) - 1
    empty = Rendered(*(np.delete(array, word) for array in rendered.arrays))
    with pytest.raises(RecipeRefused) as caught:
        structure.require(empty, [*lengths[:-1], lengths[-1] - 1], where="here")
    assert caught.value.found == f"document {len(lengths) - 1} has a final without words"
