"""The modelling file that travels with an export, against recipes/model: another text of the same mathematics."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from student_builder import SMALL_MOE, apart, config_of, ids_of, student_of

from recipes.huggingface.documents import student_document
from recipes.huggingface.families import HARMONY
from recipes.huggingface.modeling_vpmoe import VpConfig, VpForCausalLM
from recipes.model.config import MoeConfig

WIDE_MOE = MoeConfig(num_experts=16, expert_hidden_size=8, shared_hidden_size=12, num_groups=8, top_groups=4, top_k=8)
CONFIGS = {
    "compat": config_of("gqa", layers=2),
    "real": config_of("tpa"),
    "experts": config_of("tpa", moe=SMALL_MOE),
    "two a group": config_of("tpa", moe=WIDE_MOE),
}
TOKENS = 300  # more than twice the window: ours computes local layers in bands then
KINDS = pytest.mark.parametrize("kind", ["compat", "real", "experts"])


@cache
def _model(kind: str, dtype: torch.dtype) -> VpForCausalLM:
    document = {key: value for key, value in student_document(CONFIGS[kind], HARMONY).items() if key != "auto_map"}
    config = VpConfig(**document, attn_implementation="eager", experts_implementation="eager")
    model = VpForCausalLM(config)
    missing, unexpected = model.load_state_dict(student_of(CONFIGS[kind], dtype=torch.float64).state_dict())
    assert not missing
    assert not unexpected
    return model.to(dtype).eval()


def model_of(kind: str, dtype: torch.dtype = torch.float64, **config: Any) -> VpForCausalLM:
    model = deepcopy(_model(kind, dtype))
    for key, value in config.items():
        setattr(model.config, key, value)
    return model


def hidden(model: VpForCausalLM, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    """Below the head, whose 201,088 rows would be most of each test's time."""
    return model.model(ids, **more).last_hidden_state


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_ours(kind: str, attention: str) -> None:
    model, ids = model_of(kind), ids_of(1, TOKENS)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        assert apart(hidden(model, ids), student_of(CONFIGS[kind]).forward_hidden(ids)) < 1e-12


@pytest.mark.parametrize("change", ["window", "slopes", "offset", "residual"])
def test_a_wrong_model_is_noticed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of("real"), ids_of(1, TOKENS)
    if change == "window":
        model.config.sliding_window = 127
    elif change == "slopes":
        monkeypatch.setattr(type(model.model), "biases", lambda self, masks, past: masks)
    else:
        name = {"offset": "softmax_offset", "residual": "value_residual"}[change]
        with torch.no_grad():
            getattr(model.model.layers[1].self_attn, name).add_(0.1)
    with torch.no_grad():
        assert apart(hidden(model, ids), student_of(CONFIGS["real"]).forward_hidden(ids)) > 1e-4


@KINDS
def test_documents_in_a_row_do_not_see_each_other(kind: str) -> None:
    ids = ids_of(1, TOKENS)
    documents = torch.zeros_like(ids)
    documents[:, 170:] = 1
    positions = torch.cat((torch.arange(170), torch.arange(TOKENS - 170)))[None]
    with torch.no_grad():
        found = hidden(model_of(kind), ids, position_ids=positions, use_cache=False)
        assert apart(found, student_of(CONFIGS[kind]).forward_hidden(ids, documents)) < 1e-12


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kind: str, side: str) -> None:
    rows = [ids_of(1, tokens, seed=tokens)[0] for tokens in (5, 150, 33)]
    model, most = model_of(kind), 150
    batch, mask = torch.full((3, most), HARMONY.pad_id), torch.zeros(3, most, dtype=torch.int64)
    places = [slice(most - len(row), most) if side == "left" else slice(0, len(row)) for row in rows]
    for number, (row, place) in enumerate(zip(rows, places, strict=True)):
        batch[number, place], mask[number, place] = row, 1
    with torch.no_grad():
        found = hidden(model, batch, attention_mask=mask)
        assert found.isfinite().all()
        for number, (row, place) in enumerate(zip(rows, places, strict=True)):
            assert apart(found[number, place], hidden(model, row[None])[0]) < 1e-12


@KINDS
@pytest.mark.parametrize("implementation", [None, pytest.param("static", marks=pytest.mark.slow)])
def test_greedy_tokens_are_those_of_whole_passes(kind: str, implementation: str | None) -> None:
    model = model_of(kind)
    prompts = torch.cat((ids_of(1, 140, seed=5), ids_of(1, 140, seed=6)))
    mask = torch.ones_like(prompts)
    mask[1, :100] = 0  # the second row is shorter: padding on the left
    asked = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "eos_token_id": None, "pad_token_id": 0}
    how = {} if implementation is None else {"cache_implementation": implementation}
    found = model.generate(prompts, return_dict_in_generate=True, **asked, **how)
    assert torch.equal(found.sequences, model.generate(prompts, use_cache=False, **asked))
    if implementation is None:
        sizes = {layer.keys.shape[2] for layer in found.past_key_values.layers}
        assert sizes == ({147} if kind == "compat" else {127, 147})  # a local layer keeps its window


def test_a_stop_ends_an_answer() -> None:
    model, prompt = model_of("real"), ids_of(1, 12)
    free = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    stop = int(free[0, 14])
    said = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=[stop], pad_token_id=0)
    assert said.shape[1] <= 15
    assert said[0, -1] == stop


@KINDS
@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpointed_gradients_are_the_same(kind: str, reentrant: bool) -> None:
    def gradients(model: VpForCausalLM) -> dict[str, torch.Tensor]:
        hidden(model.train(), ids).square().sum().backward()
        return {name: parameter.grad for name, parameter in model.model.named_parameters()}

    ids = ids_of(1, 140)
    checkpointed = model_of(kind)
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    plain, found = gradients(model_of(kind)), gradients(checkpointed)
    assert all(gradient is not None for gradient in plain.values())
    assert all(torch.allclose(found[name], plain[name], rtol=1e-9, atol=1e-12) for name in plain)


def test_the_loss_is_that_of_the_next_tokens() -> None:
    ids = ids_of(1, 40)
    with torch.no_grad():
        logits = student_of(CONFIGS["experts"])(ids)
        expected = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        assert model_of("experts")(ids, labels=ids).loss == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_grouped_experts_are_the_same(implementation: str) -> None:
    model, ids = model_of("two a group", torch.float32), ids_of(1, 60)
    with torch.no_grad():
        expected = hidden(model, ids)
        model.set_experts_implementation(implementation)
        assert apart(hidden(model, ids), expected) < 1e-6


def test_ties_go_to_the_lowest_expert() -> None:
    router = model_of("experts").model.layers[1].mlp.router
    with torch.no_grad():
        router.weight.zero_()
        router.bias.zero_()
        router.expert_bias.zero_()
        _, gates, experts = router(torch.ones(1, 16, dtype=torch.float64))
    assert experts.tolist() == [[0, 1, 2, 3]]
    assert gates.sum().item() == pytest.approx(SMALL_MOE.routed_scaling)


def test_what_passes_can_be_recorded() -> None:
    with torch.no_grad():
        asked = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
        found = model_of("experts")(ids_of(1, 9), **asked)
    assert [len(found.hidden_states), len(found.attentions), len(found.router_logits)] == [5, 4, 3]
    assert found.attentions[0].sum(-1).max() < 1  # the offset takes its share


def test_a_fresh_model_starts_where_ours_does() -> None:
    fresh, ours = VpForCausalLM(model_of("experts").config).state_dict(), type(student_of(CONFIGS["experts"]))
    expected = ours(CONFIGS["experts"]).state_dict()
    for name, tensor in fresh.items():
        if name.endswith(("log_freq", "softmax_offset", "value_residual", "bias", "norm.weight")):
            assert torch.equal(tensor.float(), expected[name]), name
