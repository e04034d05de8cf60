"""vpDense0-5_28 (real) -> vpDense: more layers, the same function.

Place in the path: config -> **recipe**. Old layers move to the places of a role-preserving map; each inserted layer
copies the nearest old layer of its role with both output projections and their biases zero, so that it adds exactly 0
to the stream until it is trained.

Invariants: moved tensors are their parent's bits; the logits equal the parent's bit for bit, in float32 and in
bfloat16 compute (a gate).

Example:
    stage vpDense@expand, inputs parent = vpDense0-5_28@real-heal, data = healing_text, tokenizer = o200k-harmony
"""

from __future__ import annotations

from functools import partial

import torch

from recipes import runtime
from recipes.checkpoint import parse_student_config, require_shapes, student_files
from recipes.data.batches import AlignedDataset, calibration_batches
from recipes.model.config import StudentConfig
from recipes.model.layerwise import Layerwise, Rows, logit_distance, rows_of
from recipes.names import layer_tensor, split_layer
from recipes.ops.depth import depth_map, inserted_layers, require_valid_map, source_layers
from recipes.params.expand_depth import Params
from recipes.planned import PlannedTensor
from recipes.recipe import Context, Gate, Needs, Plan, Report, json_file
from recipes.tensors import TORCH_DTYPES, TensorReader, kept, planned
from recipes.walk_needs import student_needs
from vpstore.errors import RecipeRefused

ZEROED = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")
VALUE_RESIDUAL = "self_attn.value_residual"


def needs(context: Context) -> Needs:
    """The deeper model, and its gate's walks."""
    return student_needs(context.params.model, walked=context.params.check_tokens, streams=4)


def plan(context: Context) -> Plan:
    """Every tensor of the deeper model: moved, copied or zero.

    Raises:  RecipeRefused: a map that breaks a condition, or a target that differs in more than its depth.
    """
    params: Params = context.params
    reader = context.inputs["parent"].tensors()
    parent = _parent_config(context)
    _require_only_deeper(parent, params.model)
    places = _places(params, parent)
    inserted = inserted_layers(places, params.model.num_layers)
    sources = source_layers(places, params.model.num_layers, global_every=parent.global_every)
    tensors = [kept(reader, name) for name in reader.names() if split_layer(name) is None]
    for layer, source in enumerate(sources, start=1):
        tensors += _layer(reader, layer, source, fresh=params.inserted_value_residual if layer in inserted else None)
    require_shapes(tensors, params.model)
    expansion = json_file("expansion.json", {"map": list(places), "inserted": list(inserted)})
    return Plan(tensors, [expansion, *student_files(params.model, context.inputs["tokenizer"])])


def _parent_config(context: Context) -> StudentConfig:
    return parse_student_config(context.inputs["parent"].json("config.json"))


def _require_only_deeper(parent: StudentConfig, model: StudentConfig) -> None:
    expected = parent.model_copy(update={"num_layers": model.num_layers})
    if model == expected:
        return
    names = [name for name in type(model).model_fields if getattr(model, name) != getattr(expected, name)]
    raise RecipeRefused(
        "depth expansion would change more than the depth",
        where=", ".join(f"model.{name}" for name in names),
        expected=", ".join(repr(getattr(expected, name)) for name in names),
        found=", ".join(repr(getattr(model, name)) for name in names),
        next_step="give the deeper model the parent's shape, or expand another parent",
    )


def _places(params: Params, parent: StudentConfig) -> tuple[int, ...]:
    old, new, every = parent.num_layers, params.model.num_layers, parent.global_every
    places = params.depth_map or depth_map(old, new, global_every=every)
    require_valid_map(places, old_layers=old, new_layers=new, global_every=every)
    return places


def _layer(reader: TensorReader, layer: int, source: int, *, fresh: float | None) -> list[PlannedTensor]:
    """Tensors of new `layer` from old `source`; `fresh` is an inserted layer's residual logit, None for a moved one."""
    prefix = layer_tensor(source, "")
    suffixes = [name.removeprefix(prefix) for name in reader.names() if name.startswith(prefix)]
    if fresh is None:
        return [kept(reader, layer_tensor(source, s), layer_tensor(layer, s)) for s in suffixes]
    tensors = []
    for suffix in suffixes:
        name, old_name = layer_tensor(layer, suffix), layer_tensor(source, suffix)
        if suffix in ZEROED:
            dtype, shape = reader.spec(old_name)
            tensors.append(planned(name, shape, dtype, partial(torch.zeros, shape, dtype=TORCH_DTYPES[dtype])))
        elif suffix != VALUE_RESIDUAL:
            tensors.append(kept(reader, old_name, name))
    # Named for itself, because layer 1, which has none, may be the one that is copied.
    return [*tensors, planned(layer_tensor(layer, VALUE_RESIDUAL), (), "F32", partial(torch.tensor, fresh))]


def check(context: Context, staged: TensorReader) -> Report:
    """Hold the logits against the parent's on held-out tokens, in both compute dtypes."""
    params: Params = context.params
    parent = _parent_config(context)
    reader = context.inputs["parent"].tensors()
    rows = _held_out(context, params)
    gates = []
    for label, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        before = Layerwise(reader, parent, dtype=dtype, device=runtime.device())
        after = Layerwise(staged, params.model, dtype=dtype, device=runtime.device())
        apart = logit_distance(before, before.hidden(rows), after, after.hidden(rows))
        gates.append(Gate(f"logits_max_abs_difference_{label}", apart.largest, "==", 0.0))
    metrics = {
        "checked_tokens": params.check_tokens,
        "layers": {"old": parent.num_layers, "new": params.model.num_layers},
    }
    return Report(metrics, gates)


def _held_out(context: Context, params: Params) -> list[Rows]:
    dataset = AlignedDataset(context.inputs["data"].path, "valid")
    length = min(params.check_tokens, params.model.max_sequence)
    batches = calibration_batches(dataset, sequence_length=length, tokens=params.check_tokens)
    return rows_of(batches, device=runtime.device())
