"""vpDense0-5_28 compat -> real: TPA, windows and GRAPE-M on local layers, ALiBi without rotation on global ones.

Place in the path: config -> **recipe**. Two walks through the layers, each fitting a layer on the stream that the
layers before it, already rebuilt, give: first the local layers, the global ones still as they were; then the global
layers, with the output projections of the local layers between them fitted once more to the changed stream.

Invariants: feed-forward, norms of the stream, embedding and head are the parent's bits; GRAPE-M starts as RoPE with the
parent's base, in float32; every figure is measured on held-out text that no fit has seen.

Example:
    stage vpDense0-5_28@real-morph, inputs parent = vpDense0-5_28@compat-heal, data, tokenizer
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from recipes import runtime
from recipes.checkpoint import parse_student_config, require_shapes, student_files
from recipes.data.batches import AlignedDataset, Batch, calibration_batches
from recipes.model.config import StudentConfig
from recipes.model.grape import initial_log_freq
from recipes.model.layerwise import Layerwise, rows_of
from recipes.model.morph import Fit
from recipes.model.morph_walk import Knobs, Modes, Walk, layer_tensors, step_name, steps
from recipes.model.walk import Rowset, figures_in, with_figures
from recipes.names import HEAD, LOG_FREQ, layer_tensor, split_layer
from recipes.params.morph_real import Params
from recipes.planned import PlannedTensor
from recipes.recipe import Context, Gate, Intermediate, Needs, Plan, Report
from recipes.tensors import DTYPE_NAMES, TensorReader, kept, planned, read_safetensors
from recipes.train.losses import score_tokens
from recipes.walk_needs import checkpoint_bytes, student_needs
from vpstore.errors import RecipeRefused

LOSSES = "held-out-loss"  # the intermediate between the two walks


def needs(context: Context) -> Needs:
    """The student twice, as steps and as shards, and two walks beside its parent."""
    params: Params = context.params
    walked, steps = params.calibration_tokens + params.probe_tokens, checkpoint_bytes(params.model)
    return student_needs(params.model, walked=walked, streams=16, disk_bytes=steps)


def intermediates(context: Context) -> Sequence[Intermediate]:
    """One step for each layer of each walk, and the held-out loss at the end of each walk.

    Raises:  RecipeRefused: a target that differs from the parent in more than its attention.
    """
    params: Params = context.params
    parent = parse_student_config(context.inputs["parent"].json("config.json"))
    _require_same_but_attention(parent, params.model)
    walk = _walk(context, parent)
    fits = [
        (phase, Intermediate(step_name(phase, n), partial(walk.step, phase, n))) for phase, n in steps(params.model)
    ]
    return [
        *(fit for phase, fit in fits if phase == "local"),
        Intermediate(LOSSES, partial(_losses, context, walk)),
        *(fit for phase, fit in fits if phase == "global"),
    ]


def _require_same_but_attention(parent: StudentConfig, model: StudentConfig) -> None:
    if parent.attention == "gqa" and model == parent.model_copy(update={"attention": "tpa"}):
        return
    raise RecipeRefused(
        "the morph would change more than the attention",
        where="model",
        expected=str(parent.model_copy(update={"attention": "tpa"})) + " from a parent in compat mode",
        found=f"{model} from a parent with attention {parent.attention!r}",
        next_step="give the real model its compat parent's shape",
    )


def _walk(context: Context, parent: StudentConfig) -> Walk:
    params: Params = context.params
    rows = Rowset(
        fit=rows_of(_batches(context, "train", params.calibration_tokens), device=runtime.device()),
        probe=rows_of(_batches(context, "valid", params.probe_tokens), device=runtime.device()),
    )
    fit = Fit(ridge=params.ridge, query_sweeps=params.query_sweeps, plane_floor=params.plane_floor)
    reader = context.inputs["parent"].tensors()
    return Walk(reader, Modes(parent, params.model), rows, Knobs(fit, params.damping))


def _batches(context: Context, split: Literal["train", "valid"], tokens: int) -> list[Batch]:
    params: Params = context.params
    length = min(params.sequence_length, params.model.max_sequence)
    dataset = AlignedDataset(context.inputs["data"].path, split)
    return calibration_batches(dataset, sequence_length=length, tokens=tokens)


def _losses(context: Context, walk: Walk, done: Mapping[str, Path]) -> dict[str, Tensor]:
    """Held-out loss of the parent, and of the model whose local layers are rebuilt."""
    params: Params = context.params
    batches = _batches(context, "valid", params.probe_tokens)
    head_VH = context.inputs["parent"].tensors().read(HEAD)
    old, new = walk.endings("local", done)
    losses = {"compat": _mean_loss(old, head_VH, batches), "after_local": _mean_loss(new, head_VH, batches)}
    return with_figures({}, losses)


def _mean_loss(hidden: Sequence[Tensor], head_VH: Tensor, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy over the labels that count, nats; the largest float if it is not finite."""
    hidden_NH = torch.cat([x.flatten(0, 1) for x in hidden])
    labels_N, mask_N = (
        torch.cat([part.flatten() for part in parts]).to(hidden_NH.device)
        for parts in ([b.labels_BT for b in batches], [b.loss_mask_BT for b in batches])
    )
    nll_N = score_tokens(hidden_NH, head_VH.to(hidden_NH.device), labels_N).nll_N.double()
    loss = float((nll_N * mask_N).sum() / mask_N.sum())
    return loss if math.isfinite(loss) else sys.float_info.max


def plan(context: Context) -> Plan:
    """The parent's tensors but for the attention, which the steps have fitted, and the frequencies."""
    params: Params = context.params
    model = params.model
    reader = context.inputs["parent"].tensors()
    tensors = [kept(reader, name) for name in reader.names() if not _is_attention(name)]
    frequencies = partial(initial_log_freq, model.head_dim, base=model.rope_base)
    tensors.append(planned(LOG_FREQ, (model.head_dim // 2,), "F32", frequencies))
    for number in range(1, model.num_layers + 1):
        for suffix, path in sorted(layer_tensors(number, context.intermediates).items()):
            tensors.append(_fitted(layer_tensor(number, suffix), suffix, path))
    require_shapes(tensors, model)
    return Plan(tensors, student_files(model, context.inputs["tokenizer"]), _fit_report(context))


def _is_attention(name: str) -> bool:
    place = split_layer(name)
    return place is not None and place[1].startswith("self_attn.")


def _fitted(name: str, suffix: str, path: Path) -> PlannedTensor:
    value = read_safetensors(path)[suffix]
    return planned(name, tuple(value.shape), DTYPE_NAMES[value.dtype], lambda: read_safetensors(path)[suffix])


def _fit_report(context: Context) -> Report:
    """The table of layers, the losses after each walk, and the gate on keys that change sign."""
    params: Params = context.params
    files = context.intermediates
    rows: list[dict[str, Any]] = [
        {"phase": phase, "layer": number, **figures_in(files[step_name(phase, number)])}
        for phase, number in steps(params.model)
    ]
    flipped = max(row["flipped_share"] for row in rows if "flipped_share" in row)
    gates = [Gate("flipped_keys", flipped, "<=", params.max_flipped_share)]
    metrics = {"worst_output_error": max(row["output_error"] for row in rows)}
    return Report({"morph": metrics}, gates, {"layers": rows})


def check(context: Context, staged: TensorReader) -> Report:
    """Hold the staged model's held-out loss against its parent's."""
    params: Params = context.params
    batches = _batches(context, "valid", params.probe_tokens)
    model = Layerwise(staged, params.model, device=runtime.device())
    hidden = [row.x_BTH for row in model.hidden(rows_of(batches, device=runtime.device()))]
    losses = {**figures_in(context.intermediates[LOSSES]), "real": _mean_loss(hidden, model.head(), batches)}
    increase = losses["real"] - losses["compat"]
    gate = Gate("held_out_loss_increase", increase, "<=", params.max_loss_increase)
    return Report({"held_out_loss": losses}, [gate])
