"""morph_real on pico models: what is rebuilt, what is kept, resumption, gates."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from surgery_pico import Built, Workshop, build, damaged, gates, pico_config, random_tensors, shuffled

from recipes import morph_real
from recipes.checkpoint import load_student
from recipes.model.config import StudentConfig
from recipes.model.grape import rope_frequencies
from recipes.model.morph_walk import steps
from recipes.names import LOG_FREQ, layer_tensor
from recipes.params.morph_real import Params
from recipes.tensors import TensorReader, read_safetensors, write_safetensors
from vpstore.errors import RecipeRefused

PARENT = pico_config(num_layers=8)
REAL = pico_config(num_layers=8, attention="tpa")


def params(**changes: object) -> Params:
    fields = {
        "model": REAL,
        "calibration_tokens": 1000,
        "probe_tokens": 200,
        "sequence_length": 200,
        "ridge": 1e-4,
        "query_sweeps": 1,
        "damping": 0.5,
        "plane_floor": 0.01,
        "max_loss_increase": 1.0,
        "max_flipped_share": 1.0,
    }
    return Params.model_validate({**fields, **changes})


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("morph"), PARENT, random_tensors(PARENT))


@pytest.fixture(scope="module")
def built(workshop: Workshop) -> Built:
    return build(morph_real, workshop.context(params()))


def table(built: Built) -> list[dict[str, object]]:
    assert built.plan.report is not None
    return list(built.plan.report.plots["layers"])


def test_the_gates_pass_and_the_losses_are_reported(built: Built) -> None:
    assert gates(built.plan.report) == {"flipped_keys": "passed"}
    assert gates(built.report) == {"held_out_loss_increase": "passed"}
    assert built.report is not None
    losses = built.report.metrics["held_out_loss"]
    assert set(losses) == {"compat", "after_local", "real"}
    assert built.report.gates[0].value == losses["real"] - losses["compat"]


def test_the_steps_go_local_layers_first_then_from_the_first_global_on() -> None:
    assert steps(REAL) == [("local", n) for n in (1, 2, 3, 5, 6, 7)] + [("global", n) for n in (4, 5, 6, 7, 8)]


def test_all_but_attention_and_frequencies_are_the_parents_bits(built: Built, workshop: Workshop) -> None:
    parent = TensorReader(workshop.root / "parent")
    kept = [name for name in parent.names() if ".self_attn." not in name]
    assert all(torch.equal(built.staged.read(name), parent.read(name)) for name in kept)
    fresh = {name for name in built.staged.names() if ".self_attn." not in name} - set(kept)
    assert fresh == {LOG_FREQ}


def test_grape_starts_as_rope_with_the_parents_base(built: Built) -> None:
    log_freq = built.staged.read(LOG_FREQ)
    assert log_freq.dtype == torch.float32
    plane = torch.arange(64, dtype=torch.float64)
    assert torch.allclose(torch.exp(log_freq.double() / 16), 1e6 ** (-2 * plane / 128), rtol=2e-6)
    model = load_student(built.staged, REAL)
    assert model.model.grape is not None
    assert torch.allclose(model.model.grape.frequencies(), rope_frequencies(128, base=1e6), rtol=2e-6)
    wrong = 10_000 ** (-2 * plane / 128)  # the base that an unset option would give
    assert not torch.allclose(torch.exp(log_freq.double() / 16), wrong, rtol=0.1)


def test_local_keys_and_values_come_close_and_queries_lose_most(built: Built) -> None:
    rows = [row for row in table(built) if row["phase"] == "local"]
    assert len(rows) == 6
    for row in rows:
        assert row["key_cosine"] > 0.999
        assert row["value_r2"] > 0.98
        assert 0.8 < row["query_cosine"] < row["key_cosine"]
        assert row["smallest_constant"] > 0.3
        assert row["output_error"] < 0.3


def test_the_refit_beats_the_copied_projection(built: Built, workshop: Workshop) -> None:
    # Negative control: with the parent's output projections put back, the model is further from its parent.
    old = load_student(TensorReader(workshop.root / "parent"), PARENT)
    new, copied = load_student(built.staged, REAL), load_student(built.staged, REAL)
    for before, layer in zip(old.layers, copied.layers, strict=True):
        layer.self_attn.o_proj = before.self_attn.o_proj
    ids = torch.cumsum(torch.randint(1, 5, (4, 150), generator=torch.Generator().manual_seed(5)), dim=1) % 60
    with torch.no_grad():
        want = old.forward_hidden(ids)
        errors = [float((model.forward_hidden(ids) - want).norm() / want.norm()) for model in (new, copied)]
    assert errors[0] < 0.8 * errors[1]


def test_global_layers_keep_their_shapes_and_damp_their_planes(built: Built, workshop: Workshop) -> None:
    parent = TensorReader(workshop.root / "parent")
    for layer in (4, 8):
        name = layer_tensor(layer, "self_attn.k_norm.weight")
        gain = built.staged.read(name).float() / parent.read(name).float()
        assert float(gain[:8].abs().max()) < 0.9
        assert float(gain[40:64].min()) > 0.95
        assert torch.allclose(gain[:64], gain[64:], rtol=0.02)


@pytest.mark.slow
def test_an_interrupted_build_goes_on_and_gives_the_same_bytes(built: Built, workshop: Workshop) -> None:
    context = workshop.context(params(), "resumed")
    for step in ("local-001", "local-002", "local-003", "local-005"):
        content = (built.context.scratch / f"{step}.safetensors").read_bytes()
        (context.scratch / f"{step}.safetensors").write_bytes(content)
    again = build(morph_real, context, order=shuffled, with_check=False)
    assert again.bytes_by_shard() == built.bytes_by_shard()
    for path in built.context.scratch.glob("*.safetensors"):
        assert (context.scratch / path.name).read_bytes() == path.read_bytes()


def test_a_damaged_model_misses_its_gate(built: Built, tmp_path: Path) -> None:
    broken = damaged(built, "lm_head.weight", lambda head: head * -8, tmp_path)
    assert gates(morph_real.check(built.context, broken)) == {"held_out_loss_increase": "missed"}


def test_keys_that_change_sign_miss_their_gate(built: Built) -> None:
    strict = replace(built.context, params=params(max_flipped_share=-0.0))
    assert gates(morph_real.plan(strict).report) == {"flipped_keys": "passed"}
    path = built.context.intermediates["local-002"]
    changed = {**read_safetensors(path), "figure.flipped_share": torch.tensor(0.25, dtype=torch.float64)}
    other = path.with_name("flipped.safetensors")
    write_safetensors(other, changed)
    files = {**built.context.intermediates, "local-002": other}
    assert gates(morph_real.plan(replace(strict, intermediates=files)).report) == {"flipped_keys": "missed"}


@pytest.mark.parametrize("model", [PARENT, pico_config(num_layers=4, attention="tpa")])
def test_more_than_the_attention_is_refused(workshop: Workshop, model: StudentConfig) -> None:
    with pytest.raises(RecipeRefused, match="more than the attention"):
        morph_real.intermediates(workshop.context(params(model=model)))
