"""The vp architecture for Hugging Face transformers 5: compat and real mode, dense and with experts, by its config.

Place in the path: beside the weights of an export; transformers loads it with `trust_remote_code=True`. It stands
alone: torch and transformers are all that it imports; it says again what recipes/model says, in that library's forms.

Invariants: names in the state dict are those of the checkpoint; norms, softmax, the router and all angles are computed
in at least float32; a key that is not visible has a bias of the dtype's lowest number, so that a row of padding alone
attends to its offset and is finite.

Shapes: B batch, T tokens, S keys, H hidden, Q query heads, K KV heads, D head dimension, R rank, E experts, F width, J
groups of experts, k experts a token, N = B * T, V vocabulary, P = D / 2 planes.

Example:
    model = AutoModelForCausalLM.from_pretrained("export", trust_remote_code=True)

Source:  GQA arXiv:2305.13245; TPA arXiv:2501.06425; ALiBi arXiv:2108.12409; groups of experts arXiv:2412.19437.
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

NEUTRAL_OFFSET = -10.0  # where a fresh softmax offset starts: it takes no mass
FRESH_RESIDUAL_LOGIT = 4.0  # sigmoid(4) = 0.982: a layer's own values count almost alone
LOG_FREQ_SCALE = 16.0  # log_freq is this times the logarithm of the frequency
# transformers 5.24 calls a cache `cache`; before that it was `past_key_values`.
CACHE = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class VpConfig(PreTrainedConfig):
    """Shapes. `attention` is "gqa" (compat: RoPE, no window) or "tpa" (real: three local layers to one global)."""

    model_type = "vpmoe"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    attention: str = "gqa"
    vocab_size: int = 201088
    hidden_size: int = 1024
    intermediate_size: int = 512
    num_hidden_layers: int = 28
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 128
    query_rank: int = 4
    kv_rank: int = 2
    layer_types: list[str] | None = None  # None: all full in compat mode, every fourth in real mode
    sliding_window: int | None = None  # tokens that a local layer sees, the current one included
    max_position_embeddings: int = 2048
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    num_experts: int | None = None  # None: no layer has experts; else all but the first have
    num_experts_per_tok: int = 4
    n_group: int = 8
    topk_group: int = 4
    moe_intermediate_size: int = 128
    shared_expert_intermediate_size: int = 512
    routed_scaling_factor: float = 2.5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive the schedule of layers if none is given."""
        if self.layer_types is None:
            is_local = [self.attention == "tpa" and number % 4 != 0 for number in range(1, self.num_hidden_layers + 1)]
            self.layer_types = ["sliding_attention" if local else "full_attention" for local in is_local]
        super().__post_init__(**kwargs)


def wide(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def composed(a: Tensor, b: Tensor, rank: int) -> Tensor:
    """(1/R) A B for each token: [B, T, heads, D]; rows of `a` are (head, rank), of `b` (rank, dimension)."""
    return torch.matmul(a.unflatten(-1, (-1, rank)), b.unflatten(-1, (rank, -1))) / rank


def rotate(x_BQTD: Tensor, cos_BTP: Tensor, sin_BTP: Tensor) -> Tensor:
    """Turn every plane (i, i + D/2) of every head by its token's angle."""
    first, second = wide(x_BQTD).chunk(2, dim=-1)
    cos, sin = cos_BTP[:, None], sin_BTP[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BQTD.dtype)


def create_masks_for_generate(
    config: VpConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """A mask for each kind of layer, always as a tensor: the offset and ALiBi leave no kernel that would need none."""
    makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    plain = copy(config)
    plain._attn_implementation = "eager"  # others leave a mask out where their own kernels need none
    given = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
    return {
        kind: makers[kind](config=plain, **given, **{CACHE: kwargs.get(CACHE)})
        for kind in sorted(set(config.layer_types or []))
    }


def score_bias(mask: Tensor, slopes_Q: Tensor | None, past: int | Tensor) -> Tensor:
    """0, or -slope * distance, where a key is visible, the lowest number elsewhere: float32 [B, 1 or Q, T, S].

    Args:    mask: bool, or additive already. past: tokens in the cache before these.
    """
    lowest = torch.finfo(torch.float32).min
    bias = torch.where(mask, 0.0, lowest) if mask.dtype == torch.bool else mask.float()
    if slopes_Q is None:
        return bias
    tokens, keys = mask.shape[-2:]
    index_T1 = torch.arange(tokens, device=mask.device)[:, None] + past
    distance_TS = (index_T1 - torch.arange(keys, device=mask.device)).clamp(min=0)
    return bias - slopes_Q[:, None, None] * distance_TS


def eager_attention_forward(
    module: VpAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax with the offset as one more key, whose value is 0; also gives the probabilities."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    logits_BQTS = wide(torch.matmul(query * scaling, key.transpose(-1, -2))) + attention_mask
    sink_BQT1 = wide(module.softmax_offset)[:, None, None].expand(*logits_BQTS.shape[:-1], 1)
    weights = torch.softmax(torch.cat((logits_BQTS, sink_BQT1), dim=-1), dim=-1)[..., :-1].to(value.dtype)
    mixed = torch.matmul(F.dropout(weights, p=dropout, training=module.training), value)
    return mixed.transpose(1, 2), weights


def sdpa_attention_forward(
    module: VpAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same by torch's kernels: a zero key and value at the end carry the offset, in the bias of their column."""
    key, value = (F.pad(x.repeat_interleave(module.num_key_value_groups, dim=1), (0, 0, 0, 1)) for x in (key, value))
    shape = (*query.shape[:3], key.shape[2] - 1)
    sink_BQT1 = module.softmax_offset[:, None, None].expand(*shape[:3], 1)
    bias = torch.cat((attention_mask.expand(shape), sink_BQT1.to(attention_mask.dtype)), dim=-1).to(query.dtype)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling)
    return mixed.transpose(1, 2), None


class VpRMSNorm(nn.Module):
    """g * x / sqrt(mean(x^2) + eps), computed in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype."""
        x_wide = wide(x)
        scale = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + self.eps)
        return (x_wide * scale * wide(self.weight)).to(x.dtype)


class VpGrape(nn.Module):
    """Learnable frequencies exp(log_freq / 16), one module for all local layers."""

    def __init__(self, config: VpConfig) -> None:
        super().__init__()
        self.log_freq = nn.Parameter(torch.empty(config.head_dim // 2, dtype=torch.float32))


class VpAttention(nn.Module):
    """q, k and v from one fused matrix or from TPA's factors; value residual, QK-norm, a softmax offset a head."""

    def __init__(self, config: VpConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_local = (config.layer_types or [])[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if self.is_local else None
        self.uses_rotary = self.is_local or config.attention == "gqa"
        hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        if self.is_local:
            self.a_q = nn.Linear(hidden, heads * config.query_rank, bias=False)
            self.a_k = nn.Linear(hidden, groups * config.kv_rank, bias=False)
            self.a_v = nn.Linear(hidden, groups * config.kv_rank, bias=False)
            self.b_q = nn.Linear(hidden, config.query_rank * self.head_dim, bias=False)
            self.b_k = nn.Linear(hidden, config.kv_rank * self.head_dim, bias=False)
            self.b_v = nn.Linear(hidden, config.kv_rank * self.head_dim, bias=False)
            self.qkv_bias = nn.Parameter(torch.zeros((heads + 2 * groups) * self.head_dim))
        else:
            self.qkv_proj = nn.Linear(hidden, (heads + 2 * groups) * self.head_dim)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden)
        self.q_norm = VpRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = VpRMSNorm(self.head_dim, config.rms_norm_eps)
        self.softmax_offset = nn.Parameter(torch.full((heads,), NEUTRAL_OFFSET, dtype=torch.float32))
        residual = nn.Parameter(torch.tensor(FRESH_RESIDUAL_LOGIT)) if layer_idx else None
        self.register_parameter("value_residual", residual)

    def project(self, x_BTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, Q, T, D], keys and values [B, K, T, D]; fused rows lie per KV head, [q.. k v]."""
        groups = self.config.num_key_value_heads
        if self.is_local:
            q = composed(self.a_q(x_BTH), self.b_q(x_BTH), self.config.query_rank)
            k = composed(self.a_k(x_BTH), self.b_k(x_BTH), self.config.kv_rank)
            v = composed(self.a_v(x_BTH), self.b_v(x_BTH), self.config.kv_rank)
            parts = [part.unflatten(2, (groups, -1)) for part in (q, k, v)]
            fused = torch.cat(parts, dim=3) + self.qkv_bias.view(groups, -1, self.head_dim)
        else:
            fused = self.qkv_proj(x_BTH).unflatten(-1, (groups, -1, self.head_dim))
        q, k, v = fused.split([self.num_key_value_groups, 1, 1], dim=3)
        q, k = self.q_norm(q.flatten(2, 3)), self.k_norm(k.squeeze(3))
        return q.transpose(1, 2), k.transpose(1, 2), v.squeeze(3).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        first_values: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the layer adds to the stream, its probabilities, and the first layer's values for those above."""
        cache = kwargs.pop(CACHE, None)
        q, k, v = self.project(hidden_states)
        if first_values is None or self.value_residual is None:
            first_values = wide(v)
        else:
            share = wide(torch.sigmoid(self.value_residual))
            v = (share * wide(v) + (1 - share) * first_values).to(v.dtype)
        if self.uses_rotary:
            q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        chosen = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention_forward)
        if chosen == "sdpa":  # the library's own passes over an offset without a word
            attend = sdpa_attention_forward
        mixed, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            s_aux=self.softmax_offset,
            **kwargs,
        )
        return self.o_proj(mixed.flatten(-2).to(hidden_states.dtype)), weights, first_values


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return torch.relu(x).square()


class VpMLP(nn.Module):
    """W2 relu(W1 x + b1)^2 + b2."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.fc2(relu_squared(self.fc1(x)))


class VpRouter(nn.Linear):
    """Chooses experts on score + expert bias, within the best groups; gates use the scores alone."""

    def __init__(self, config: VpConfig) -> None:
        super().__init__(config.hidden_size, int(config.num_experts or 0))
        self.config = config
        self.register_buffer("expert_bias", torch.zeros(self.out_features, dtype=torch.float32))

    def forward(self, x_NH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, E], gates [N, k] that sum to the scaling factor, experts [N, k]; ties go to the lowest index."""
        config = self.config
        logits_NE = F.linear(wide(x_NH), wide(self.weight), wide(self.bias))
        score_NJe = (torch.sigmoid(logits_NE).detach() + self.expert_bias).unflatten(-1, (config.n_group, -1))
        ordered_NJe = torch.sort(score_NJe, dim=-1, descending=True).values
        group_NJ = ordered_NJe[..., : config.num_experts_per_tok // config.topk_group].sum(-1)
        kept_Nj = torch.sort(group_NJ, dim=-1, descending=True, stable=True).indices[:, : config.topk_group]
        is_kept_NJ = torch.zeros_like(group_NJ, dtype=torch.bool).scatter(-1, kept_Nj, True)
        open_NE = score_NJe.masked_fill(~is_kept_NJ[..., None], -math.inf).flatten(-2)
        expert_Nk = torch.sort(open_NE, dim=-1, descending=True, stable=True).indices[:, : config.num_experts_per_tok]
        # A softmax of log scores is score / sum of scores, and cannot become 0 / 0.
        chosen_Nk = F.logsigmoid(logits_NE).gather(-1, expert_Nk)
        return logits_NE, config.routed_scaling_factor * torch.softmax(chosen_Nk, dim=-1), expert_Nk


@use_experts_implementation(has_bias=True, has_gate=False)
class VpExperts(nn.Module):
    """All routed experts of a layer, stacked; transformers groups their products where the device can."""

    def __init__(self, config: VpConfig) -> None:
        super().__init__()
        count, width, hidden = int(config.num_experts or 0), config.moe_intermediate_size, config.hidden_size
        self.num_experts, self.act_fn = count, relu_squared
        self.fc1_weight = nn.Parameter(torch.empty(count, width, hidden))
        self.fc1_bias = nn.Parameter(torch.zeros(count, width))
        self.fc2_weight = nn.Parameter(torch.empty(count, hidden, width))
        self.fc2_bias = nn.Parameter(torch.zeros(count, hidden))

    # The names under which the library's grouped products look for the stacks.
    up_proj = property(lambda self: self.fc1_weight)
    up_proj_bias = property(lambda self: self.fc1_bias)
    down_proj = property(lambda self: self.fc2_weight)
    down_proj_bias = property(lambda self: self.fc2_bias)

    def forward(self, x_NH: Tensor, expert_Nk: Tensor, gates_Nk: Tensor) -> Tensor:
        """sum_i gate_i E_i(x), expert by expert, summed in at least float32."""
        total_NH = torch.zeros_like(wide(x_NH))
        for expert in expert_Nk.unique().tolist():
            token, choice = torch.where(expert_Nk == expert)
            inner = relu_squared(F.linear(x_NH[token], self.fc1_weight[expert], self.fc1_bias[expert]))
            out = F.linear(inner, self.fc2_weight[expert], self.fc2_bias[expert])
            total_NH = total_NH.index_add(0, token, wide(out) * gates_Nk[token, choice, None])
        return total_NH.to(x_NH.dtype)


class VpMoE(nn.Module):
    """shared(x) + routed(x)."""

    def __init__(self, config: VpConfig) -> None:
        super().__init__()
        self.router = VpRouter(config)
        self.experts = VpExperts(config)
        self.shared_expert = VpMLP(config.hidden_size, config.shared_expert_intermediate_size)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Same shape."""
        x_NH = x_BTH.flatten(0, -2)
        _, gates_Nk, expert_Nk = self.router(x_NH)
        return self.shared_expert(x_BTH) + self.experts(x_NH, expert_Nk, gates_Nk).view_as(x_BTH)


class VpDecoderLayer(GradientCheckpointingLayer):
    """Attention, then feed-forward or experts, each behind its norm and added to the stream."""

    def __init__(self, config: VpConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = VpRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = VpAttention(config, layer_idx)
        self.post_attention_layernorm = VpRMSNorm(config.hidden_size, config.rms_norm_eps)
        has_experts = config.num_experts is not None and layer_idx > 0
        self.mlp = VpMoE(config) if has_experts else VpMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, hidden_states: Tensor, first_values: Tensor | None, cos: Tensor, sin: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The stream after this layer, and the first layer's values; what has a gradient comes by position."""
        added, _, first_values = self.self_attn(self.input_layernorm(hidden_states), first_values, (cos, sin), **kwargs)
        hidden_states = hidden_states + added
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), first_values


class VpPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model."""

    config_class = VpConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VpDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = False  # no kernel of these takes ALiBi and a learned offset at once
    _supports_flex_attn = False
    # These are few, and lost in eight bits of mantissa: they stay float32 whatever the dtype is.
    _keep_in_fp32_modules_strict = ["log_freq", "softmax_offset", "value_residual", "expert_bias"]
    _can_record_outputs = {
        "hidden_states": VpDecoderLayer,
        "attentions": OutputRecorder(VpAttention, index=1),
        "router_logits": OutputRecorder(VpRouter, index=0),
    }
    create_masks_for_generate = staticmethod(create_masks_for_generate)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VpGrape):
            initialization.copy_(module.log_freq, LOG_FREQ_SCALE * log_frequencies(self.config).float())
        elif isinstance(module, VpAttention):
            initialization.constant_(module.softmax_offset, NEUTRAL_OFFSET)
            if module.value_residual is not None:
                initialization.constant_(module.value_residual, FRESH_RESIDUAL_LOGIT)
            if module.is_local:
                initialization.zeros_(module.qkv_bias)
        elif isinstance(module, VpRouter):
            initialization.zeros_(module.expert_bias)
        elif isinstance(module, VpExperts):
            for weight in (module.fc1_weight, module.fc2_weight):
                initialization.normal_(weight, mean=0.0, std=self.config.initializer_range)
            for bias in (module.fc1_bias, module.fc2_bias):
                initialization.zeros_(bias)


def log_frequencies(config: VpConfig) -> Tensor:
    """Logarithms of RoPE's frequencies base^(-2i/D), float64 [P]."""
    plane = torch.arange(config.head_dim // 2, dtype=torch.float64, device="cpu")
    return -2.0 * plane / config.head_dim * math.log(config.rope_theta)


class VpModel(VpPreTrainedModel):
    """Everything below the head."""

    def __init__(self, config: VpConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(VpDecoderLayer(config, number) for number in range(config.num_hidden_layers))
        self.norm = VpRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.grape = VpGrape(config) if config.attention == "tpa" else None
        self.gradient_checkpointing = False
        self.post_init()

    def position_tables(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every token's angles, [B, T, P], in at least float32."""
        if self.grape is None:
            frequency_P = torch.exp(log_frequencies(self.config)).to(position_ids.device, dtype)
        else:
            frequency_P = torch.exp(wide(self.grape.log_freq) / LOG_FREQ_SCALE).to(position_ids.device)
        angle_BTP = position_ids.to(frequency_P.dtype)[..., None] * frequency_P
        return angle_BTP.cos(), angle_BTP.sin()

    def biases(self, masks: dict[str, Tensor], past: int | Tensor) -> dict[str, Tensor]:
        """Score biases for each kind of layer; global layers of real mode have ALiBi's slopes 2^-(h+1)."""
        found = {}
        for kind, mask in masks.items():
            slopes_Q = None
            if kind == "full_attention" and self.config.attention == "tpa":
                numbers = torch.arange(1, self.config.num_attention_heads + 1, device=mask.device)
                slopes_Q = torch.exp2(-numbers.float())
            found[kind] = score_bias(mask, slopes_Q, past)
        return found

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states after the final norm. Args: cache, past_key_values: one thing under both of its names."""
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x_BTH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = (torch.arange(x_BTH.shape[1], device=x_BTH.device) + past)[None]
        masks = attention_mask
        if not isinstance(masks, dict):  # `generate` may have made them
            masks = create_masks_for_generate(self.config, x_BTH, attention_mask, position_ids, **{CACHE: cache})
        biases = self.biases(masks, past)
        cos, sin = self.position_tables(position_ids, wide(x_BTH).dtype)
        first_values = None
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x_BTH, first_values = layer(
                x_BTH, first_values, cos, sin, attention_mask=biases[kind], **{CACHE: cache}, **kwargs
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(x_BTH), **{CACHE: cache})


class VpForCausalLM(VpPreTrainedModel, GenerationMixin):
    """The model with its untied head."""

    def __init__(self, config: VpConfig) -> None:
        super().__init__(config)
        self.model = VpModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits of every position, or of the last `logits_to_keep`; with labels also the mean loss of the next tokens.

        The loss has no balance term: training the router's balance is the matter of the trainer that made the model.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=past_key_values if cache is None else cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )
