"""The vp architecture for stock Megatron-Core, 0.16 to 0.19: one file, which imports megatron and torch alone.

What it brings: TPA on windowed layers, GRAPE-M (learnable frequencies), ALiBi on global layers, a window that respects
documents, the softmax offset, the value residual, and the shared expert with its bias. Router, experts, dispatch,
embedding and head are Megatron's own.

Invariants: parameters have the names and layouts of the public stack, so that one checkpoint fits both; frequencies,
offsets and residual logits stay float32 whatever the model is cast to; scores, softmax and norms are computed in at
least float32.

Shapes, as in Megatron: s tokens, b rows, h hidden, n query heads and g key/value heads of this rank, r rank, d head
dimension, E experts.

Example:
    >>> model = VpModel(config, vocab_size=201088, max_sequence_length=2048)  # config: a VpConfig
    >>> losses = model(ids, positions, hidden, labels=labels)  # hidden: [b, 1, s, s], True where a token may not look
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

LOG_FREQ_SCALE = 16.0  # log_freq is 16 times the logarithm of the frequency
NEUTRAL_OFFSET = -10.0  # an offset that takes no mass; 0 would take as much as a score of 0
FRESH_RESIDUAL_LOGIT = 4.0  # a fresh layer mixes sigmoid(4) = 0.982 of its own values


MEGATRON = ((0, 16), (0, 19))  # versions of Megatron-Core, the first and the last


class UnfitConfig(ValueError):
    """A configuration that the vp architecture has no code for."""


@dataclass
class VpConfig(TransformerConfig):
    """Megatron's config with the switches of the vp architecture; all off is a plain GQA model with an offset."""

    use_tpa: bool = False
    """Build q, k and v of windowed layers from factors."""

    tpa_q_rank: int = 4
    tpa_rank: int = 2

    grape_m: bool = False
    """Learn the rotary frequencies, one set for all layers."""

    grape_a: bool = False
    """Bias the scores of layers without rotary positions by distance (ALiBi)."""

    value_residual: bool = False
    """Mix the values of layers 2 and up with those of layer 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hetereogenous_dist_checkpoint = True  # Megatron's spelling: layers differ, each has keys of its own
        faults = [fault for is_fault, fault in self._faults() if is_fault]
        if faults:
            raise UnfitConfig("; ".join(faults))

    def _faults(self) -> list[tuple[bool, str]]:
        has_experts = self.num_moe_experts is not None
        known = MEGATRON[0] <= _version() <= MEGATRON[1]
        return [
            (
                not known,
                f"Megatron-Core {_version()} is none of {MEGATRON[0]} to {MEGATRON[1]}, which this file is for",
            ),
            (
                self.value_residual and self.pipeline_model_parallel_size > 1,
                "the value residual needs pipeline_model_parallel_size 1: layer 1's values do not travel",
            ),
            (
                self.value_residual and self.recompute_granularity == "full",
                "the value residual and full recomputation exclude each other: layer 1's values are kept",
            ),
            (self.context_parallel_size > 1, "context_parallel_size must be 1: attention sees whole rows"),
            (
                self.grape_m and self.apply_rope_fusion,
                "GRAPE-M needs --no-rope-fusion: the fused kernel has no gradient",
            ),
            (self.bias_activation_fusion, "squared ReLU needs --no-bias-gelu-fusion"),
            (
                self.tensor_model_parallel_size > (self.num_query_groups or self.num_attention_heads),
                "tensor_model_parallel_size must not exceed the number of key/value heads",
            ),
            (has_experts and bool(self.moe_grouped_gemm), "--moe-grouped-gemm knows no expert bias"),
            (has_experts and bool(self.moe_shared_expert_overlap), "--moe-shared-expert-overlap knows no shared bias"),
        ]


def _version() -> tuple[int, int]:
    from megatron.core.package_info import MAJOR, MINOR

    return MAJOR, MINOR


def add_arguments(parser):
    """The plugin's own flags, for `extra_args_provider`; they have the names of the public stack where it has one."""
    group = parser.add_argument_group("vp", "the vp architecture")
    group.add_argument("--use-tpa", action="store_true", help="TPA on windowed layers")
    group.add_argument("--tpa-q-rank", type=int, default=4, help="rank of the queries' factors")
    group.add_argument("--tpa-rank", type=int, default=2, help="rank of the keys' and values' factors")
    group.add_argument("--grape-m", action="store_true", help="learnable rotary frequencies")
    group.add_argument("--grape-a", action="store_true", help="ALiBi on layers without rotary positions")
    group.add_argument("--value-residual", action="store_true", help="mix values with those of layer 1")
    group.add_argument("--eod-id", type=int, default=None, help="token behind which documents end")
    return parser


class _KeepsFloat32(MegatronModule):
    """Casts leave the parameters that are named in `kept` in float32."""

    kept: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        before = {name: p.data for name, p in self.named_parameters(recurse=False) if name in self.kept}
        super()._apply(fn, recurse)
        for name, old in before.items():
            parameter = getattr(self, name)
            # A model on the meta device has no values to keep.
            parameter.data = parameter.data.float() if old.is_meta else old.to(parameter.device)
        return self


class VpRmsNorm(nn.Module):
    """g * x / sqrt(mean(x^2) + eps), computed in float32; unlike Megatron's wrapper it takes sequence parallelism."""

    def __init__(self, config, hidden_size, eps=1e-6, **_) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.float()).to(x.dtype)


class TpaLinearQkv(MegatronModule):
    """q, k and v of windowed layers: each the product of two factors of the token, divided by the rank.

    Laid out as Megatron's own linear_qkv gives them, [q.. k v] for each key/value head; the one bias is added to that.
    Rows of a are (head, rank), rows of b (rank, dimension). Heads are split over tensor-parallel ranks; b is gathered.
    Source:  Zhang et al. 2025, arXiv:2501.06425.
    """

    def __init__(self, input_size, output_size, *, config, init_method, bias, tp_group=None, **_) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group or parallel_state.get_tensor_model_parallel_group()
        heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
        self.groups, self.width = groups // self.tp_group.size(), width
        self.ranks = {"q": config.tpa_q_rank, "k": config.tpa_rank, "v": config.tpa_rank}
        for name, rank in self.ranks.items():
            rows_a = (heads if name == "q" else groups) * rank
            for factor, rows in (("a", rows_a), ("b", rank * width)):
                linear = ColumnParallelLinear(
                    input_size,
                    rows,
                    config=config,
                    init_method=init_method,
                    bias=False,
                    gather_output=False,
                    tp_group=self.tp_group,
                )
                self.add_module(f"linear_{factor}_{name}", linear)
        rows = output_size // self.tp_group.size()
        self.bias = nn.Parameter(torch.zeros(rows, dtype=config.params_dtype, device=_device(config))) if bias else None
        if self.bias is not None:
            set_tensor_model_parallel_attributes(self.bias, True, 0, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[s, b, h] -> [s, b, g * (n / g + 2) * d]."""
        parts = []
        for name, rank in self.ranks.items():
            a, b = getattr(self, f"linear_a_{name}")(x)[0], getattr(self, f"linear_b_{name}")(x)[0]
            if self.tp_group.size() > 1:
                # Every rank's heads use all of b, so its gradients are summed on the way back, not cut.
                b = all_gather_last_dim_from_tensor_parallel_region(b)
            heads = torch.matmul(a.unflatten(-1, (-1, rank)), b.unflatten(-1, (rank, self.width))) / rank
            parts.append(heads.unflatten(2, (self.groups, -1)))
        qkv = torch.cat(parts, dim=3).flatten(2)
        return (qkv if self.bias is None else qkv + self.bias), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Megatron's default, but the bias is one rank's part of the whole."""
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.bias is not None:
            own = _sharded_own(self, {"bias": self.bias}, prefix, sharded_offsets, metadata)
            found.update(own)
        return found


class VpCoreAttention(_KeepsFloat32):
    """Softmax attention with a learnable offset for each head, under a mask of documents, a window, and ALiBi.

    Megatron's own windowed layers replace a mask that they are given; here a window is taken besides it.
    """

    kept = ("softmax_offset",)

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type=None,
        attention_type="self",
        *,
        softmax_scale=None,
        pg_collection=None,
        **_,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp if pg_collection else parallel_state.get_tensor_model_parallel_group()
        self.heads = config.num_attention_heads // self.tp_group.size()
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        is_local = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if is_local else None  # Megatron counts the keys before the query
        self.uses_alibi = config.grape_a and bool(config.no_rope_freq and config.no_rope_freq[layer_number - 1])
        self.softmax_offset = nn.Parameter(torch.full((self.heads,), NEUTRAL_OFFSET, device=_device(config)))
        set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def forward(
        self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None, **_
    ) -> Tensor:
        """Mixed values, [s, b, n * d].

        Args:    query: [s, b, n, d]; key, value: [s, b, g, d]; attention_mask: bool [b or 1, 1, s, s], True where a
                 token may not look; None: it sees all before it.
        """
        if packed_seq_params is not None:
            raise UnfitConfig("rows of several documents come with an attention mask, not as packed sequences")
        dtype = torch.promote_types(query.dtype, torch.float32)
        q = query.to(dtype).unflatten(2, (key.shape[2], -1))
        scores = torch.einsum("sbgnd,tbgd->bgnst", q, key.to(dtype)).flatten(1, 2) * self.scale
        scores = scores + self._bias(attention_mask, scores)
        offset = self.softmax_offset.to(dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        mass = torch.softmax(torch.cat((scores, offset), dim=-1), dim=-1)[..., :-1]
        mixed = torch.einsum("bgnst,tbgd->sbgnd", mass.unflatten(1, (key.shape[2], -1)), value.to(dtype))
        return mixed.flatten(2).to(query.dtype)

    def _bias(self, attention_mask: Tensor | None, scores: Tensor) -> Tensor:
        """0 or the ALiBi term where a key is visible, -inf elsewhere; [b or 1, n or 1, s, s]."""
        index = torch.arange(scores.shape[-1], device=scores.device)
        distance = index[:, None] - index
        hidden = (distance < 0) if self.window is None else (distance < 0) | (distance >= self.window)
        hidden = hidden[None, None] if attention_mask is None else hidden | attention_mask
        bias = torch.zeros_like(scores[:1, :1])
        if self.uses_alibi:
            # The number of a head counts over all ranks: slopes are 2^-1 .. 2^-n.
            first = self.tp_group.rank() * self.heads
            slopes = torch.exp2(-torch.arange(first + 1, first + self.heads + 1, device=scores.device).to(scores.dtype))
            bias = -slopes[:, None, None] * distance.clamp(min=0)
        return torch.where(hidden, float("-inf"), bias)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The offset, split over heads."""
        return _sharded_own(self, {"softmax_offset": self.softmax_offset}, prefix, sharded_offsets, metadata)


class FirstValues:
    """Layer 1's values on their way to the layers above it, in one forward pass."""

    value: Tensor | None = None


class VpSelfAttention(_KeepsFloat32, SelfAttention):
    """Megatron's self-attention, with values that are mixed with those of layer 1."""

    kept = ("value_residual_logit",)

    def __init__(self, config, submodules, layer_number, *args, **kwargs) -> None:
        SelfAttention.__init__(self, config, submodules, layer_number, *args, **kwargs)
        self.first_values: FirstValues | None = None  # set by the model
        self.value_residual_logit = None
        if config.value_residual and layer_number > 1:
            self.value_residual_logit = nn.Parameter(torch.tensor(FRESH_RESIDUAL_LOGIT, device=_device(config)))

    def get_query_key_value_tensors(self, *args, **kwargs):
        """As Megatron's, with mixed values."""
        found = super().get_query_key_value_tensors(*args, **kwargs)
        if not self.config.value_residual:
            return found
        query, key, value = found
        if self.first_values is None:
            raise UnfitConfig("the value residual needs VpModel, which hands layer 1's values on")
        if self.value_residual_logit is None:
            self.first_values.value = value
            return query, key, value
        share = torch.sigmoid(self.value_residual_logit)
        mixed = share * value.float() + (1 - share) * self.first_values.value.float()
        return query, key, mixed.to(value.dtype)


class VpSharedExpert(MegatronModule):
    """W2 relu(W1 x + b1)^2 + b2 for every token. Megatron's own shared expert refuses biases, or drops the last."""

    def __init__(self, config, gate=False, pg_collection=None, **_) -> None:
        super().__init__(config=config)
        if gate:
            raise UnfitConfig("the shared expert has no gate")
        self.tp_group = pg_collection.tp
        width, hidden = config.moe_shared_expert_intermediate_size, config.hidden_size
        common = {"config": config, "bias": config.add_bias_linear, "skip_bias_add": True, "tp_group": self.tp_group}
        self.linear_fc1 = ColumnParallelLinear(
            hidden, width, init_method=config.init_method, gather_output=False, **common
        )
        self.linear_fc2 = RowParallelLinear(
            width, hidden, init_method=config.output_layer_init_method, input_is_parallel=True, **common
        )

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        y, bias = self.linear_fc1(x)
        y = self.config.activation_func(y if bias is None else y + bias)
        y, bias = self.linear_fc2(y)
        return y if bias is None else y + bias


class VpRouter(TopKRouter):
    """Megatron's router; its logits are a plain product, where Megatron's own asks for Transformer Engine."""

    def gating(self, x: Tensor) -> Tensor:
        """Logits, [s, b, E], in float32, or in float64 with --moe-router-dtype fp64."""
        dtype = torch.float64 if self.config.moe_router_dtype == "fp64" else torch.float32
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias)


class VpExpertOutput(RowParallelLinear):
    """The experts' second layer. Megatron adds its bias in place, which autograd refuses for a view."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As Megatron's."""
        y, bias = super().forward(x)
        return (y.clone() if y._is_view() else y), bias


class GrapeM(_KeepsFloat32):
    """Rotary angles from learnable frequencies exp(log_freq / 16), one set for all layers."""

    kept = ("log_freq",)
    get_rotary_seq_len = RotaryEmbedding.get_rotary_seq_len

    def __init__(self, config, *, base: float) -> None:
        super().__init__(config=config)
        plane = torch.arange(config.kv_channels // 2, dtype=torch.float64, device=_device(config))
        log_freq = -2.0 * LOG_FREQ_SCALE * plane / config.kv_channels * math.log(base)
        self.log_freq = nn.Parameter(log_freq.float())

    def forward(self, max_seq_len: int, offset: int = 0, **_) -> Tensor:
        """Angles of every position, both halves, [s, 1, 1, d]; never kept, for the frequencies learn."""
        position = torch.arange(offset, offset + max_seq_len, dtype=torch.float32, device=self.log_freq.device)
        angle = torch.outer(position, torch.exp(self.log_freq.float() / LOG_FREQ_SCALE))
        return torch.cat((angle, angle), dim=-1)[:, None, None, :]


class VpModel(GPTModel):
    """Megatron's GPT model of vp layers; untied head, rotary positions."""

    def __init__(self, config, *, vocab_size, max_sequence_length, rotary_base=1000000, **kwargs) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config),
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=rotary_base,
            **kwargs,
        )
        if config.grape_m:
            self.rotary_pos_emb = GrapeM(config, base=rotary_base)
        self._first_values = FirstValues()
        for layer in self.decoder.layers:
            layer.self_attention.first_values = self._first_values

    def forward(self, *args, **kwargs):
        """As Megatron's."""
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._first_values.value = None  # it holds a graph


def block_spec(config: VpConfig) -> TransformerBlockSubmodules:
    """A spec for every layer, by its number: windowed or global, dense or with experts."""
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(config, number) for number in range(1, config.num_layers + 1)], layer_norm=VpRmsNorm
    )


def _layer_spec(config: VpConfig, number: int) -> ModuleSpec:
    experts = config.num_moe_experts if _has_experts(config, number) else None
    spec = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=True, normalization="RMSNorm")
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = VpRmsNorm
    attention = parts.self_attention
    attention.module = VpSelfAttention
    attention.submodules.q_layernorm = attention.submodules.k_layernorm = VpRmsNorm
    attention.submodules.core_attention = VpCoreAttention
    if config.use_tpa and is_layer_window_attention(config.window_size, config.window_attn_skip_freq, number):
        attention.submodules.linear_qkv = TpaLinearQkv
    if experts is not None:
        moe = _submodules(parts.mlp)
        moe.router, moe.shared_experts = VpRouter, VpSharedExpert
        _submodules(moe.experts).linear_fc2 = VpExpertOutput
    return spec


def _submodules(spec):
    """Of a ModuleSpec, which specs of experts are up to 0.16, or of a partial, which they are from 0.17 on."""
    return spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]


def _has_experts(config: VpConfig, number: int) -> bool:
    frequency = config.moe_layer_freq
    if config.num_moe_experts is None:
        return False
    return bool(frequency[number - 1]) if isinstance(frequency, list) else (number - 1) % frequency == 0


def _device(config: TransformerConfig) -> torch.device | int | str | None:
    """Where Megatron makes its own parameters."""
    if config.use_cpu_initialization or config.init_model_with_meta_device:
        return None if torch.get_default_device().type == "meta" else "cpu"
    return torch.cuda.current_device()


def _sharded_own(module, tensors, prefix, sharded_offsets, metadata):
    """These parameters of a module as parts of wholes that are split along their first dimension."""
    metadata = metadata or {}
    groups = {"tp_group": module.tp_group}
    groups["dp_cp_group"] = metadata.get("dp_cp_group") or parallel_state.get_data_parallel_group(
        with_context_parallel=True
    )
    return make_sharded_tensors_for_checkpoint(tensors, prefix, dict.fromkeys(tensors, 0), sharded_offsets, **groups)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2, as Megatron's --squared-relu."""
    return F.relu(x).square()
