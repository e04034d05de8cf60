"""Continuations by a cache against whole passes over ever longer rows."""

from __future__ import annotations

import pytest
import torch
from student_builder import SMALL_MOE, config_of, ids_of, student_of

from recipes.model import generation
from recipes.model.cache import Cache
from recipes.model.generation import Limits, generate
from recipes.model.precision import Numerics
from recipes.model.stream import Stream

MODELS = {"compat": config_of("gqa"), "real": config_of("tpa"), "moe": config_of("tpa", moe=SMALL_MOE)}
VALID = 5_000  # fewer ids to choose from, so that a test does not multiply by the whole head
LENGTHS = (1, 7, 130, 200)  # below and above the window of 128; the last two pass their window's border


def prompts() -> list[list[int]]:
    return [ids_of(1, length, seed=length)[0].tolist() for length in LENGTHS]


def by_whole_passes(student, prompt: list[int], count: int, stops=()) -> list[int]:  # type: ignore[no-untyped-def]
    """The plain way: a pass over all that is there for each token."""
    row = list(prompt)
    for _ in range(count):
        hidden_TH = student.forward_hidden(torch.tensor([row]))[0]
        row.append(int((hidden_TH[-1] @ student.head_weight[:VALID].T).argmax()))
        if row[-1] in stops:
            break
    return row[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_cache_says_what_whole_passes_say(name: str) -> None:
    student = student_of(MODELS[name], dtype=torch.float32)
    found = generate(student, prompts(), Limits(12, (), VALID))
    assert found == [by_whole_passes(student, prompt, 12) for prompt in prompts()]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_hidden_states_by_a_cache_are_those_of_whole_passes(name: str) -> None:
    student, ids_BT = student_of(MODELS[name]), ids_of(2, 300)
    lengths_B = torch.tensor([126, 170])
    cache = Cache(lengths_B.clone(), places=300)
    student.hidden_of(ids_BT[:, :170], Stream.of_rows(170, device=ids_BT.device, cache=cache))
    cache.is_filled = True
    whole_BTH = student.forward_hidden(ids_BT)
    for _ in range(130):  # over the border of every window
        next_B1 = ids_BT.gather(1, cache.lengths_B[:, None])
        hidden_BH = student.hidden_of(next_B1, Stream.of_rows(1, device=ids_BT.device, cache=cache))[:, 0]
        expected_BH = whole_BTH[torch.arange(2), cache.lengths_B]
        torch.testing.assert_close(hidden_BH, expected_BH, rtol=1e-9, atol=1e-9)
        cache.advance()


@torch.no_grad()
def test_a_window_that_is_one_token_too_long_is_seen() -> None:
    student, ids_BT = student_of(MODELS["real"]), ids_of(1, 140)
    whole_BTH = student.forward_hidden(ids_BT)
    cache = Cache(torch.tensor([139]), places=140)
    cache._size = lambda window: cache.places if window is None else min(window + 1, cache.places)  # type: ignore[method-assign]
    student.hidden_of(ids_BT[:, :139], Stream.of_rows(139, device=ids_BT.device, cache=cache))
    cache.is_filled = True
    hidden_BH = student.hidden_of(ids_BT[:, 139:], Stream.of_rows(1, device=ids_BT.device, cache=cache))[:, 0]
    assert not torch.allclose(hidden_BH, whole_BTH[:, -1], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_row_ends_with_its_stop_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    student, asked = student_of(MODELS["real"], dtype=torch.float32), prompts()
    free = [by_whole_passes(student, prompt, 9) for prompt in asked]
    stops = {free[0][2], free[3][5]}
    expected = [by_whole_passes(student, prompt, 9, stops) for prompt in asked]
    assert len({len(answer) for answer in expected}) > 1
    for passes in (1, 4):
        monkeypatch.setitem(generation._PASSES, "cpu", passes)
        assert generate(student, asked, Limits(9, stops, VALID)) == expected
    monkeypatch.setitem(generation._ROWS, "cpu", 3)
    assert generate(student, [*asked, []], Limits(9, stops, VALID)) == [*expected, []]
    assert generate(student, asked, Limits(0, stops, VALID)) == [[]] * len(asked)


@torch.no_grad()
def test_the_narrow_way_goes_by_grouped_experts_and_says_nearly_the_same() -> None:
    moe = SMALL_MOE.model_copy(update={"expert_hidden_size": 8})
    student = student_of(config_of("tpa", moe=moe), dtype=torch.float32)
    ways = (Numerics(torch.bfloat16), Numerics(torch.bfloat16, is_grouped=True))
    plain, grouped = (generate(student, prompts(), Limits(1, (), VALID), numerics=way) for way in ways)
    assert sum(one == other for one, other in zip(plain, grouped, strict=True)) > len(plain) / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_captured_passes_say_what_the_cpu_says(name: str) -> None:
    student = student_of(MODELS[name], dtype=torch.float64)
    expected = generate(student, prompts(), Limits(40, (), VALID))
    assert generate(student.cuda(), prompts(), Limits(40, (), VALID)) == expected
