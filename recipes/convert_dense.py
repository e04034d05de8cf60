"""qwen3-0_6B-o200k -> vpDense0-5_28 (compat): fewer heads, a narrower and ungated feed-forward.

Place in the path: config -> **recipe**. Layer by layer, each fitted on the stream that the layers before it, already
converted, give, with calibration text of the training part (recipes.model.convert_walk). `method = "pooled"` is the
baseline that this has to beat: neighbouring heads averaged, their output columns added, the heaviest `up` rows kept.

Invariants: embedding, head and norms of the stream are the parent's bits; every tensor is held against the model before
anything is computed; figures are measured on held-out text that no fit has seen.

The value residual's logit (T12): 9.21 would be lambda = 0.9999, and frozen, because its gradient is lambda (1 -
lambda). Nothing needs that: the output projection is fitted to the values as they are after mixing, so a lambda of 0.98
(logit 4) costs next to nothing and can still learn.

Example:
    stage vpDense0-5_28@convert, inputs parent = qwen3-0_6B-o200k@transplant, data = healing_text, tokenizer
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from recipes import runtime
from recipes.checkpoint import (
    expected_tensors,
    parse_donor_config,
    require_shapes,
    student_files,
)
from recipes.data.batches import AlignedDataset, Batch, calibration_batches
from recipes.model.config import DonorConfig
from recipes.model.convert_ffn import FfnSetting
from recipes.model.convert_loss import mean_loss, unigram_loss
from recipes.model.convert_walk import Knobs, Walk, step_name
from recipes.model.layerwise import Layerwise, rows_of
from recipes.model.walk import Rowset, figures_in
from recipes.names import split_layer
from recipes.params.convert_dense import Params
from recipes.recipe import Context, Gate, Intermediate, Needs, Plan, Report
from recipes.tensors import TensorReader, kept, planned, read_safetensors
from recipes.walk_needs import checkpoint_bytes, student_needs
from vpstore.errors import RecipeRefused

STREAM = "stream"


def needs(context: Context) -> Needs:
    """The student twice, as steps and as shards, and the walk beside the donor."""
    params: Params = context.params
    walked, steps = params.calibration_tokens + params.probe_tokens, checkpoint_bytes(params.model)
    return student_needs(params.model, walked=walked, streams=16, disk_bytes=steps)


def intermediates(context: Context) -> Sequence[Intermediate]:
    """One step a layer, in order, and one for the stream behind the last."""
    params: Params = context.params
    donor = _donor_config(context)
    _require_convertible(donor, params)
    walk: list[Walk] = []

    def step(number: int, done: Mapping[str, Path]) -> dict[str, Tensor]:
        if not walk:
            walk.append(Walk(context.inputs["parent"].tensors(), donor, _rows(context), _knobs(params)))
        if number > donor.num_hidden_layers:
            return walk[0].stream_figures(done)
        context.progress("layers", number - 1, donor.num_hidden_layers)
        return walk[0].step(number, done)

    numbers = range(1, donor.num_hidden_layers + 1)
    steps = [Intermediate(step_name(number), partial(step, number)) for number in numbers]
    return [*steps, Intermediate(STREAM, partial(step, donor.num_hidden_layers + 1))]


def plan(context: Context) -> Plan:
    """Every tensor of the student: kept, or out of its layer's step.

    Raises:  RecipeRefused, ShapeMismatch: a donor that the student cannot be made from.
    """
    params: Params = context.params
    _require_convertible(_donor_config(context), params)
    reader = context.inputs["parent"].tensors()
    tensors = []
    for name, (dtype, shape) in expected_tensors(params.model).items():
        place = split_layer(name)
        if place is None:
            tensors.append(kept(reader, name))
        else:
            tensors.append(planned(name, shape, dtype, partial(_stored, context, *place)))
    require_shapes(tensors, params.model)
    return Plan(tensors, student_files(params.model, context.inputs["tokenizer"]), _figures(context))


def check(context: Context, staged: TensorReader) -> Report:
    """Held-out loss of the staged student, against its parent's and a unigram model's."""
    params: Params = context.params
    batches = _batches(context, "valid", params.probe_tokens)
    student = Layerwise(staged, params.model, device=runtime.device())
    hidden = [row.x_BTH for row in student.hidden(rows_of(batches, device=runtime.device()))]
    loss = mean_loss(hidden, student.head(), batches)
    unigram = unigram_loss(_batches(context, "train", params.calibration_tokens), batches, params.model.vocab_size)
    metrics = {"held_out_loss": loss, "unigram_loss": unigram, "uniform_loss": math.log(params.model.vocab_size)}
    gate = Gate("held_out_loss_over_unigram", loss / unigram, "<=", params.max_loss_over_unigram)
    return Report({"loss": metrics, "method": params.method}, [gate])


def _donor_config(context: Context) -> DonorConfig:
    return parse_donor_config(context.inputs["parent"].json("config.json"))


def _require_convertible(donor: DonorConfig, params: Params) -> None:
    model = params.model
    wanted: dict[str, object] = {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "num_attention_heads": 2 * model.num_query_heads,
        "num_key_value_heads": model.num_query_heads,
        "rope_theta": model.rope_base,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": False,
    }
    unlike = {name: value for name, value in wanted.items() if getattr(donor, name) != value}
    if model.attention != "gqa" or model.moe is not None:
        unlike["model"] = "attention gqa, no experts"
    if unlike:
        raise RecipeRefused(
            "this parent cannot be converted into this student",
            where="convert_dense: the parent's config.json and params.model",
            expected=", ".join(f"{name} = {value}" for name, value in unlike.items()),
            found=", ".join(f"{name} = {getattr(donor, name, model.attention)}" for name in unlike),
            next_step="transplant the vocabulary first, or mend the model table of the configuration",
        )


def _knobs(params: Params) -> Knobs:
    ffn = FfnSetting(
        width=params.model.ffn_hidden_size,
        ridge=params.ridge,
        pair_scale=params.pair_scale,
        steps=params.ffn_steps,
        step_tokens=params.ffn_step_tokens,
        learning_rate=params.ffn_learning_rate,
        seed=params.seed,
    )
    return Knobs(
        config=params.model,
        ffn=ffn,
        is_fitted=params.method == "fitted",
        ridge=params.ridge,
        drift=params.drift,
        token_limit=params.token_limit,
        value_residual=params.value_residual,
    )


def _batches(context: Context, split: str, tokens: int) -> list[Batch]:
    dataset = AlignedDataset(context.inputs["data"].path, "train" if split == "train" else "valid")
    return calibration_batches(dataset, sequence_length=context.params.sequence_length, tokens=tokens)


def _rows(context: Context) -> Rowset:
    params: Params = context.params
    return Rowset(
        fit=rows_of(_batches(context, "train", params.calibration_tokens), device=runtime.device()),
        probe=rows_of(_batches(context, "valid", params.probe_tokens), device=runtime.device()),
    )


def _stored(context: Context, number: int, suffix: str) -> Tensor:
    return read_safetensors(context.intermediates[step_name(number)])[suffix]


def _figures(context: Context) -> Report:
    """What the steps have measured, one row a layer."""
    files = context.intermediates
    numbers = range(1, context.params.model.num_layers + 1)
    rows: list[dict[str, float]] = [{"layer": n, **figures_in(files[step_name(n)])} for n in numbers]
    means = {name: math.fsum(row[name] for row in rows) / len(rows) for name in ("attention_r2", "ffn_r2")}
    return Report({"held_out": {**means, **figures_in(files[STREAM])}}, plots={"layers": rows})
