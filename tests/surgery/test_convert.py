"""convert_dense on a donor that was really trained: better than the baseline, exact in form, resumable."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_pico import Bench, pico_donor, pico_params, pico_student, trained_donor
from surgery_pico import Built, build, damaged, gates, shuffled, split_qkv
from torch import Tensor

from recipes import convert_dense
from recipes.checkpoint import donor_config_json, load_donor, load_student, parse_donor_config
from recipes.data.batches import AlignedDataset, calibration_batches
from recipes.model.attention import GroupedQueryAttention
from recipes.model.convert_attention import Setting, Streams, fit_attention, pool_attention
from recipes.model.convert_heads import DonorRow
from recipes.model.convert_loss import mean_loss, unigram_loss
from recipes.model.donor import DonorLayer
from recipes.model.layerwise import Row, filled
from recipes.model.stream import Stream
from recipes.model.transformer import Student
from recipes.names import EMBEDDING, HEAD
from recipes.ops.heads import fuse_qkv
from recipes.tensors import TensorReader, write_safetensors
from vpstore.errors import RecipeRefused


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.make(tmp_path_factory.mktemp("convert") / "bench", trained_donor())


@pytest.fixture(scope="module")
def fitted(bench: Bench) -> Built:
    return build(convert_dense, bench.context(pico_params(), "fitted"))


@pytest.fixture(scope="module")
def pooled(bench: Bench) -> Built:
    return build(convert_dense, bench.context(pico_params(method="pooled", max_loss_over_unigram=9.0), "pooled"))


def loss(built: Built) -> float:
    assert built.report is not None
    return float(built.report.metrics["loss"]["held_out_loss"])


def donor_loss(bench: Bench) -> float:
    config = parse_donor_config(json.loads((bench.root / "parent/config.json").read_text()))
    donor = load_donor(TensorReader(bench.root / "parent"), config)
    batches = calibration_batches(AlignedDataset(bench.root / "data", "valid"), sequence_length=128, tokens=512)
    hidden = [donor.forward_hidden(batch.ids_BT, batch.documents_BT).detach() for batch in batches]
    return mean_loss(hidden, donor.head_weight.detach(), batches)


def test_the_fit_beats_the_mended_original_by_far(bench: Bench, fitted: Built, pooled: Built) -> None:
    """Before healing, on held-out bytes: the fit keeps most of what the pooled baseline loses."""
    parent = donor_loss(bench)
    assert parent < loss(fitted) < loss(pooled)
    assert loss(fitted) - parent < 0.5 * (loss(pooled) - parent)
    assert fitted.plan.report is not None
    assert pooled.plan.report is not None
    ours, theirs = (built.plan.report.metrics["held_out"] for built in (fitted, pooled))  # type: ignore[union-attr]
    assert ours["attention_r2"] > theirs["attention_r2"]
    assert ours["ffn_r2"] > max(theirs["ffn_r2"], -0.2)
    assert ours["stream_r2"] > theirs["stream_r2"]


def test_gates_pass_and_each_layer_is_reported(fitted: Built) -> None:
    assert set(gates(fitted.report).values()) == {"passed"}
    assert fitted.plan.report is not None
    rows = fitted.plan.report.plots["layers"]
    assert [row["layer"] for row in rows] == [1, 2]
    assert {"attention_r2", "ffn_r2", "value_energy_lost", "key_energy_lost"} <= set(rows[0])
    assert json.dumps(rows)


def test_embedding_head_and_norms_are_the_parents_bits(bench: Bench, fitted: Built) -> None:
    parent = TensorReader(bench.root / "parent")
    names = [EMBEDDING, HEAD, "model.norm.weight"]
    names += [
        f"model.layers.{i}.{norm}.weight" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    for name in names:
        assert torch.equal(fitted.staged.read(name).view(torch.int16), parent.read(name).view(torch.int16))


def test_offsets_are_neutral_and_the_value_residual_can_learn(bench: Bench, fitted: Built) -> None:
    """T3 and T12: the sink takes less than a thousandth of nearly every query's mass; lambda is not frozen."""
    student = load_student(fitted.staged, pico_student())
    batch = calibration_batches(AlignedDataset(bench.root / "data", "valid"), sequence_length=128, tokens=512)[0]
    with torch.no_grad():
        x_BTH, state = student.start(batch.ids_BT, batch.documents_BT)
        for layer in student.layers:
            attention, inner = layer.self_attn, layer.input_layernorm(x_BTH)
            q, k, _ = attention.project(inner)
            sink = torch.sigmoid(attention.softmax_offset - attention.log_sum_exp(q, k, state))
            assert float(sink.flatten().quantile(0.95)) < 1e-3
            assert float(attention.softmax_offset.detach().min()) > -60.0
            x_BTH = layer(x_BTH, state)
    assert fitted.staged.read("model.layers.1.self_attn.value_residual") == 4.0
    assert "model.layers.0.self_attn.value_residual" not in fitted.staged


def test_the_plain_layout_scrambles_attention(bench: Bench, fitted: Built, tmp_path: Path) -> None:
    """T1, negative control: the same numbers in [q; k; v] order lose what the fit has kept."""

    def plain(fused: Tensor) -> Tensor:
        q, k, v = split_qkv(fused, queries=8, groups=2)
        return torch.cat([q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)])

    name = "model.layers.0.self_attn.qkv_proj.weight"
    report = convert_dense.check(fitted.context, damaged(fitted, name, plain, tmp_path))
    assert report.metrics["loss"]["held_out_loss"] > loss(fitted) + 0.1


def test_halved_outputs_lose_too(fitted: Built, tmp_path: Path) -> None:
    """T2, negative control: a mean where the sum belongs."""
    name = "model.layers.0.self_attn.o_proj.weight"
    report = convert_dense.check(fitted.context, damaged(fitted, name, lambda w: w / 2, tmp_path))
    assert report.metrics["loss"]["held_out_loss"] > loss(fitted)


def test_a_broken_student_misses_its_gate(fitted: Built, tmp_path: Path) -> None:
    broken = damaged(fitted, "model.norm.weight", lambda g: -g, tmp_path)
    assert gates(convert_dense.check(fitted.context, broken)) == {"held_out_loss_over_unigram": "missed"}


@pytest.mark.slow
def test_it_is_the_same_twice_and_in_any_order_and_after_an_interruption(bench: Bench, fitted: Built) -> None:
    context = bench.context(pico_params(), "again")
    first = convert_dense.intermediates(context)[0]
    write_safetensors(context.scratch / f"{first.name}.safetensors", first.compute({}))
    # A new walk, as after a restart: it must find its way from the first layer's file.
    again = build(convert_dense, context, order=shuffled, with_check=False)
    assert again.bytes_by_shard() == fitted.bytes_by_shard()
    for name, path in fitted.context.intermediates.items():
        assert path.read_bytes() == again.context.intermediates[name].read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 48},
        {"num_layers": 3},
        {"attention": "tpa", "num_layers": 4},
        {"rope_base": 1e4},
        {"norm_eps": 1e-5},
    ],
)
def test_a_parent_of_another_shape_is_refused_before_anything_is_computed(
    bench: Bench, changes: dict[str, object]
) -> None:
    context = bench.context(pico_params(model=pico_student(**changes)), "refused")
    with pytest.raises(RecipeRefused):
        convert_dense.intermediates(context)
    with pytest.raises(RecipeRefused):
        convert_dense.plan(context)


def test_a_tied_parent_is_refused(bench: Bench, tmp_path: Path) -> None:
    tied = donor_config_json(pico_donor(vocab_size=201088, tie_word_embeddings=True))
    (tmp_path / "config.json").write_text(json.dumps(tied))
    context = bench.context(pico_params(), "tied")
    parent = replace(context.inputs["parent"], path=tmp_path)
    with pytest.raises(RecipeRefused):
        convert_dense.plan(replace(context, inputs={**context.inputs, "parent": parent}))


def doubled_layer() -> DonorLayer:
    """A donor layer whose heads agree within each pair and within each half: 16/8 heads that are really 8/2."""
    torch.manual_seed(3)
    config = pico_donor(hidden_size=64)
    layer = DonorLayer(config).requires_grad_(False)
    attention = layer.self_attn
    queries, keys = torch.randn(8, 128, 64) / 8, torch.randn(2, 128, 64) / 8
    attention.q_proj.weight.copy_(queries.repeat_interleave(2, 0).flatten(0, 1))
    attention.k_proj.weight.copy_(keys.repeat_interleave(4, 0).flatten(0, 1))
    attention.v_proj.weight.copy_((torch.randn(2, 128, 64) / 8).repeat_interleave(4, 0).flatten(0, 1))
    attention.o_proj.weight.copy_(torch.randn(64, 2048) / 32)
    attention.q_norm.weight.copy_(1 + 0.3 * torch.randn(128))
    attention.k_norm.weight.copy_(1 + 0.3 * torch.randn(128))
    return layer


def streams(tokens: int = 256, rows: int = 6) -> Streams:
    torch.manual_seed(4)
    donor_model, student_model = trained_donor(), Student(pico_student())
    donor, student = [], []
    for _ in range(rows):
        ids = torch.zeros(1, tokens, dtype=torch.long)
        x = torch.randn(1, tokens, 64)
        donor.append(DonorRow(x, donor_model.start(ids)[1]))
        state = Stream.of_rows(tokens, device=torch.device("cpu"))
        state.rotary = student_model._rotary(state.positions_BT, torch.float32)
        student.append(Row(x, state))
    return Streams(donor, student, drift=0.0)


def attention_error(layer: DonorLayer, tensors: dict[str, Tensor], rows: Streams, setting: Setting) -> float:
    student = filled(GroupedQueryAttention(setting.config, number=1), tensors, dtype=torch.float32, where="test")
    gap = energy = 0.0
    for old, new in zip(rows.donor, rows.student, strict=True):
        inner = layer.input_layernorm(old.x_BTH)
        wanted = layer.self_attn(inner, old.state)
        gap += float((student(inner, new.state) - wanted).square().sum())
        energy += float(wanted.square().sum())
    return gap / energy


def test_heads_that_agree_are_merged_without_loss() -> None:
    layer, rows = doubled_layer(), streams()
    setting = Setting(pico_student(hidden_size=64), 1, ridge=1e-8, value_residual=4.0, token_limit=1e9)
    tensors, figures = fit_attention(layer, rows, setting)
    assert figures["value_energy_lost"] < 1e-6
    assert figures["key_energy_lost"] < 1e-6
    assert attention_error(layer, tensors, rows, setting) < 1e-3  # bfloat16 is what is left
    torch.testing.assert_close(tensors["q_norm.weight"].float(), layer.self_attn.q_norm.weight, rtol=0.02, atol=0.02)
    pooled = pool_attention(layer, rows.student, setting)
    assert attention_error(layer, pooled, rows, setting) < 1e-3  # the pooled heads are the same ones here


def test_scattered_heads_are_found_again_by_the_partition_and_not_by_pooling() -> None:
    """The donor's heads in another order: the naive grouping mixes what does not belong together."""
    layer, rows = doubled_layer(), streams()
    attention, mixed = layer.self_attn, torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
        weight.copy_(torch.unflatten(weight, 0, (8, -1))[mixed].flatten(0, 1))
    attention.o_proj.weight.copy_(torch.unflatten(attention.o_proj.weight, 1, (8, -1))[:, mixed].flatten(1))
    setting = Setting(pico_student(hidden_size=64), 1, ridge=1e-8, value_residual=4.0, token_limit=1e9)
    tensors, _ = fit_attention(layer, rows, setting)
    assert attention_error(layer, tensors, rows, setting) < 1e-3
    assert attention_error(layer, pool_attention(layer, rows.student, setting), rows, setting) > 0.05


def test_the_refitted_output_never_loses_to_the_sum_on_what_it_has_seen() -> None:
    torch.manual_seed(5)
    layer, rows = DonorLayer(pico_donor(hidden_size=64)).requires_grad_(False), streams()
    setting = Setting(pico_student(hidden_size=64), 1, ridge=1e-6, value_residual=4.0, token_limit=1e9)
    tensors, _ = fit_attention(layer, rows, setting)
    pooled = pool_attention(layer, rows.student, setting)
    best = attention_error(layer, tensors, rows, setting)
    for scale in (0.5, 1.0):  # the mean and the sum
        other = {**pooled, "o_proj.weight": pooled["o_proj.weight"] * scale}
        assert best < attention_error(layer, other, rows, setting)


def test_fused_rows_survive_a_round_trip_through_the_model() -> None:
    """What the merging calls query head s of group c is what the model computes as that head."""
    config = pico_student()
    q, k, v = torch.randn(8, 128, 32), torch.randn(2, 128, 32), torch.randn(2, 128, 32)
    attention = GroupedQueryAttention(config, number=1).requires_grad_(False)
    attention.qkv_proj.weight.copy_(fuse_qkv(q, k, v))
    attention.qkv_proj.bias.zero_()
    x = torch.randn(1, 3, 32)
    got_q, got_k, got_v = attention.project(x)
    torch.testing.assert_close(got_v, torch.einsum("gdh,bth->btgd", v, x))
    for got, wanted in ((got_q, torch.einsum("sdh,bth->btsd", q, x)), (got_k, torch.einsum("gdh,bth->btgd", k, x))):
        torch.testing.assert_close(got, torch.nn.functional.normalize(wanted, dim=-1) * 128**0.5, rtol=1e-3, atol=1e-3)


def test_the_unigram_yardstick_is_a_distribution(bench: Bench) -> None:
    batches = calibration_batches(AlignedDataset(bench.root / "data", "train"), sequence_length=128, tokens=512)
    one = batches[0]

    def share(token: int) -> float:
        return math.exp(-unigram_loss(batches, [replace(one, labels_BT=torch.full_like(one.labels_BT, token))], 256))

    shares = [share(token) for token in range(256)]
    assert sum(shares) == pytest.approx(1.0)
    assert 0 < min(shares) < max(shares) < 0.5
    assert unigram_loss(batches, batches, 256) < math.log(256)
