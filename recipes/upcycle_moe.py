"""vpDense -> vpMoE: layers 2 and up get a router, routed experts and a shared expert.

Place in the path: config -> **recipe**. The shared expert is the dense feed-forward; routed experts are slices of it
(recipes.ops.experts says how); the router's rows are drawn at random and freed of the mean of their inputs, which would
give some experts a constant head start.

Invariants: layer 1 stays dense, at the dense width; router bias and expert bias are 0; R0's logits equal the parent's
bit for bit; each tensor's random numbers depend on the seed and its own name alone.

Example:
    stage vpMoE@upcycle, inputs parent = vpDense@wake-up, data = healing_text, tokenizer = o200k-harmony
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from recipes import runtime
from recipes.checkpoint import parse_student_config, require_shapes, student_files
from recipes.data.batches import AlignedDataset, calibration_batches
from recipes.model.config import MoeConfig, StudentConfig
from recipes.model.layerwise import Layerwise, Row, Rows, logit_distance, rows_of
from recipes.model.transformer import Layer
from recipes.names import layer_tensor, split_layer
from recipes.ops.experts import Draw, expert_fc1, expert_fc2, routed_scale
from recipes.ops.router import Spread, router_rows, split_groups, spread, without_direction
from recipes.params.upcycle_moe import Params
from recipes.planned import PlannedTensor
from recipes.recipe import Context, Gate, Intermediate, Needs, Plan, Report
from recipes.tensors import TensorReader, kept, planned, planned_rows, read_safetensors
from recipes.walk_needs import student_needs
from vpstore.errors import RecipeRefused

ROUTER_INPUTS = "router_inputs"


def needs(context: Context) -> Needs:
    """The mixture, and the walks of the routers' inputs and of the gates."""
    walked = context.params.calibration_tokens + context.params.check_tokens
    return student_needs(context.params.model, walked=walked, streams=4)


def intermediates(context: Context) -> Sequence[Intermediate]:
    """The mean input of each router on calibration text."""
    _require_upcyclable(_parent_config(context), context.params)
    return [Intermediate(ROUTER_INPUTS, partial(_router_inputs, context))]


def _router_inputs(context: Context, done: Mapping[str, Path]) -> dict[str, Tensor]:
    """The mean over tokens of what the dense feed-forward of each layer sees, float32, by tensor name."""
    parent = Layerwise(context.inputs["parent"].tensors(), _parent_config(context), device=runtime.device())
    streams = parent.start(_calibration(context))
    means: dict[str, Tensor] = {}
    for number in range(1, parent.config.num_layers + 1):
        context.progress("router inputs", number - 1, parent.config.num_layers)
        streams, mean_D = _through(parent.layer(number), streams)
        if context.params.model.is_moe(number):
            means[layer_tensor(number, "mlp.router.mean_input")] = mean_D.cpu()
    return means


@torch.no_grad()
def _through(layer: Layer, streams: Sequence[Row]) -> tuple[list[Row], Tensor]:
    """The streams after the layer, and the mean of what its feed-forward saw."""
    moved, total, tokens = [], streams[0].x_BTH.new_zeros((), dtype=torch.float64), 0
    for x_BTH, state in streams:
        middle = x_BTH + layer.self_attn(layer.input_layernorm(x_BTH), state)
        seen = layer.post_attention_layernorm(middle)
        total = total + seen.double().sum(dim=(0, 1))
        tokens += seen.shape[0] * seen.shape[1]
        moved.append(Row(middle + layer.feed_forward(seen, state), state))
        state.shared.clear()
    return moved, (total / tokens).float()


def plan(context: Context) -> Plan:
    """Every tensor of the mixture: kept, dealt out or drawn.

    Raises:  RecipeRefused: a target whose experts cannot be cut from the parent's feed-forward.
    """
    params: Params = context.params
    moe = _require_upcyclable(_parent_config(context), params)
    reader = context.inputs["parent"].tensors()
    tensors = [kept(reader, name) for name in reader.names() if not _is_replaced(name, params.model)]
    for number in range(1, params.model.num_layers + 1):
        if params.model.is_moe(number):
            tensors += _LayerPlan(context, reader, moe, number).tensors()
    require_shapes(tensors, params.model)
    return Plan(tensors, student_files(params.model, context.inputs["tokenizer"]))


def _parent_config(context: Context) -> StudentConfig:
    return parse_student_config(context.inputs["parent"].json("config.json"))


def _moe(params: Params) -> MoeConfig:
    moe: MoeConfig | None = params.model.moe
    if moe is None:
        raise _refusal("the target has no experts", "a [model.moe] table", "none")
    return moe


def _is_replaced(name: str, model: StudentConfig) -> bool:
    place = split_layer(name)
    return place is not None and model.is_moe(place[0]) and place[1].startswith("mlp.")


def _require_upcyclable(parent: StudentConfig, params: Params) -> MoeConfig:
    model, moe = params.model, _moe(params)
    if model.model_copy(update={"moe": None}) != parent:
        raise _refusal("the target is not its parent with experts", str(parent), str(model))
    slices = parent.ffn_hidden_size // moe.expert_hidden_size
    faults = [
        (moe.shared_hidden_size != parent.ffn_hidden_size, "shared_hidden_size = ffn_hidden_size"),
        (slices * moe.expert_hidden_size != parent.ffn_hidden_size, "experts that divide ffn_hidden_size"),
        (slices == 0 or moe.num_experts % max(slices, 1) != 0, "as many experts of each slice"),
    ]
    if params.method != "R0":
        faults += [
            (slices != moe.top_k, "R1, R2: top_k slices, so that one virtual group is the whole layer"),
            (
                moe.num_experts // moe.num_groups % moe.top_k != 0,
                "R1, R2: router groups that hold whole virtual groups",
            ),
        ]
    if params.method == "R1":
        faults.append((params.drop_fraction > 0, "R1: drop_fraction = 0, as a re-drawn unit would be missing"))
    for broken, expected in faults:
        if broken:
            raise _refusal("the experts cannot be cut from the dense layers", expected, f"{moe}, {params.method}")
    return moe


def _refusal(what: str, expected: str, found: str) -> RecipeRefused:
    return RecipeRefused(
        what, where="model.moe", expected=expected, found=found, next_step="change the object's or the profile's TOML"
    )


class _LayerPlan:
    """The feed-forward tensors of one MoE layer, each computed on its own."""

    def __init__(self, context: Context, reader: TensorReader, moe: MoeConfig, number: int) -> None:
        self._context, self._reader, self._moe, self._number = context, reader, moe, number
        self._params: Params = context.params
        routed = self._params.method != "R0"
        self._share = self._params.routed_share if routed else 0.0
        scale = routed_scale(self._share, top_k=moe.top_k, routed_scaling=moe.routed_scaling)
        self._fc1_scale, self._fc2_scale = (scale, scale) if routed else (1.0, 0.0)

    def tensors(self) -> list[PlannedTensor]:
        """Shared expert, routed experts, router."""
        return [*self._shared(), *self._experts(), *self._router()]

    def _name(self, suffix: str) -> str:
        return layer_tensor(self._number, f"mlp.{suffix}")

    def _dense(self, suffix: str) -> Tensor:
        return self._reader.read(self._name(suffix))

    def _shared(self) -> list[PlannedTensor]:
        tensors = []
        for suffix in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            old, new = self._name(suffix), self._name(f"shared_expert.{suffix}")
            dtype, shape = self._reader.spec(old)
            if suffix.startswith("fc2") and self._share > 0:
                tensors.append(planned(new, shape, dtype, partial(self._kept_share, suffix)))
            else:
                tensors.append(kept(self._reader, old, new))
        return tensors

    def _kept_share(self, suffix: str) -> Tensor:
        return self._dense(suffix).float() * (1.0 - self._share)

    def _experts(self) -> list[PlannedTensor]:
        count, width, hidden = self._moe.num_experts, self._moe.expert_hidden_size, self._params.model.hidden_size
        drawn: list[tuple[str, tuple[int, ...], Callable[[str], Iterator[Tensor]]]] = [
            ("fc1_weight", (count, width, hidden), partial(self._fc1, "fc1.weight")),
            ("fc1_bias", (count, width), partial(self._fc1, "fc1.bias")),
            ("fc2_weight", (count, hidden, width), self._fc2),
        ]
        bias = planned(self._name("experts.fc2_bias"), (count, hidden), "BF16", self._fc2_bias)
        tensors = []
        for suffix, shape, rows in drawn:
            name = self._name(f"experts.{suffix}")
            tensors.append(planned_rows(name, shape, "BF16", partial(rows, name)))
        return [*tensors, bias]

    def _draw(self, name: str) -> Draw:
        params = self._params
        return Draw(params.seed, name, self._name("experts"), noise=params.fc1_noise, drop=params.drop_fraction)

    def _fc1(self, dense: str, name: str) -> Iterator[Tensor]:
        moe = self._moe
        return expert_fc1(
            self._dense(dense),
            experts=moe.num_experts,
            width=moe.expert_hidden_size,
            scale=self._fc1_scale,
            draw=self._draw(name),
        )

    def _fc2(self, name: str) -> Iterator[Tensor]:
        moe, quiet = self._moe, Draw(self._params.seed, name, "")
        return expert_fc2(
            self._dense("fc2.weight"),
            experts=moe.num_experts,
            width=moe.expert_hidden_size,
            scale=self._fc2_scale,
            draw=self._draw(name) if self._params.method == "R2" else quiet,
        )

    def _fc2_bias(self) -> Tensor:
        """The gates of a token sum to routed_scaling, whatever the router says: each expert adds the same bias."""
        bias_D = self._dense("fc2.bias").float() * (self._share / self._moe.routed_scaling)
        return bias_D.expand(self._moe.num_experts, -1).contiguous()

    def _router(self) -> list[PlannedTensor]:
        count, hidden = self._moe.num_experts, self._params.model.hidden_size
        weight = self._name("router.weight")
        return [
            planned(weight, (count, hidden), "BF16", partial(self._router_weight, weight)),
            planned(self._name("router.bias"), (count,), "BF16", partial(torch.zeros, count)),
            planned(self._name("router.expert_bias"), (count,), "F32", partial(torch.zeros, count)),
        ]

    def _router_weight(self, name: str) -> Tensor:
        mean_D = read_safetensors(self._context.intermediates[ROUTER_INPUTS])[self._name("router.mean_input")]
        share_by = self._moe.top_k if self._params.method == "R1" else 1
        rows_ED = router_rows(
            self._moe.num_experts,
            self._params.model.hidden_size,
            std=self._params.router_std,
            share_by=share_by,
            seed=self._params.seed,
            name=name,
        )
        return without_direction(rows_ED, mean_D)


def check(context: Context, staged: TensorReader) -> Report:
    """Hold the logits against the parent's and the router's load against uniform."""
    params: Params = context.params
    rows = _rows(context, "valid", tokens=params.check_tokens, length=params.check_tokens)
    dense = Layerwise(context.inputs["parent"].tensors(), _parent_config(context), device=runtime.device())
    routed = Layerwise(staged, params.model, device=runtime.device())
    # One walk for both: each layer's experts are read once.
    streams = routed.hidden([*rows, *_calibration(context)], collect=True)
    apart = logit_distance(dense, dense.hidden(rows), routed, streams[: len(rows)])
    counts = _router_counts(streams[len(rows) :])
    loads = {number: spread(count_E) for number, count_E in sorted(counts.items())}
    gates = _router_gates(params, loads)
    if params.method == "R0":
        gates.append(Gate("logits_max_abs_difference", apart.largest, "==", 0.0))
    if params.method == "R1":
        gates.append(Gate("logits_relative_difference", apart.relative, "<=", params.max_relative_error))
        gates.append(Gate("split_virtual_groups", split_groups(counts.values(), _moe(params).top_k), "==", 0.0))
    metrics = {
        "method": params.method,
        "is_ablation": params.method == "R2",
        "logits_max_abs_difference": apart.largest,
        "logits_relative_difference": apart.relative,
    }
    plots = {"router": [{"layer": number, **asdict(load)} for number, load in loads.items()]}
    return Report({"upcycle": metrics}, gates, plots)


def _calibration(context: Context) -> list[Rows]:
    params: Params = context.params
    return _rows(context, "train", tokens=params.calibration_tokens, length=params.calibration_sequence)


def _rows(context: Context, split: Literal["train", "valid"], *, tokens: int, length: int) -> list[Rows]:
    limit = min(length, context.params.model.max_sequence)
    dataset = AlignedDataset(context.inputs["data"].path, split)
    return rows_of(calibration_batches(dataset, sequence_length=limit, tokens=tokens), device=runtime.device())


def _router_counts(streams: Sequence[Row]) -> dict[int, Tensor]:
    """Picks of each expert over all rows, by layer."""
    totals: dict[int, Tensor] = {}
    for _, state in streams:
        for number, routing in state.routing.items():
            totals[number] = totals.get(number, torch.zeros_like(routing.counts_E)) + routing.counts_E
    return totals


def _router_gates(params: Params, loads: Mapping[int, Spread]) -> list[Gate]:
    return [
        Gate("router_load_entropy", min(s.relative_entropy for s in loads.values()), ">=", params.min_router_entropy),
        Gate("router_max_load", max(s.max_load for s in loads.values()), "<=", params.max_expert_load),
    ]
