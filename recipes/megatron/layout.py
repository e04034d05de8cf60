"""Names and layouts of a student in a Megatron checkpoint, and back; pure.

Place in the path: recipe -> **megatron**. The keys are those of the public stack, which stock Megatron-Core takes with
the plugin; norms have the names that Megatron's local spec gives them on disk.

Invariants: every tensor of a student has one key and every key one tensor; layouts are equal on both sides: the fused
projection is [q.. k v] for each key/value head, experts are stacked. Only a folded bias changes values.

Shapes: E experts, H hidden.

Example:
    >>> megatron_key("model.layers.0.self_attn.qkv_proj.weight")
    'decoder.layers.0.self_attention.linear_qkv.weight'

Source: sharded_state_dict of Megatron-Core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recipes.checkpoint import expected_tensors
from recipes.model.config import MoeConfig, StudentConfig
from recipes.names import EMBEDDING, FINAL_NORM, HEAD, LOG_FREQ, layer_tensor, split_layer
from recipes.planned import Dtype
from vpstore.errors import RecipeRefused

if TYPE_CHECKING:
    from torch import Tensor

EXTRA_STATE = "._extra_state/shard_"
_WHOLE = {
    EMBEDDING: "embedding.word_embeddings.weight",
    HEAD: "output_layer.weight",
    FINAL_NORM: "decoder.final_layernorm.weight",
    LOG_FREQ: "rotary_pos_emb.log_freq",
}
_ATTENTION = {
    "self_attn.qkv_bias": "self_attention.linear_qkv.bias",
    "self_attn.softmax_offset": "self_attention.core_attention.softmax_offset",
    "self_attn.value_residual": "self_attention.value_residual_logit",
    **{f"self_attn.{factor}.weight": f"self_attention.linear_qkv.linear_{factor}.weight"
       for factor in ("a_q", "a_k", "a_v", "b_q", "b_k", "b_v")},
    **{f"self_attn.qkv_proj.{part}": f"self_attention.linear_qkv.{part}" for part in ("weight", "bias")},
    **{f"self_attn.o_proj.{part}": f"self_attention.linear_proj.{part}" for part in ("weight", "bias")},
    **{f"self_attn.{one}_norm.weight": f"self_attention.{one}_layernorm.weight" for one in ("q", "k")},
}  # fmt: skip
_LAYER = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "post_attention_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    **_ATTENTION,
    **{f"mlp.router.{part}": f"mlp.router.{part}" for part in ("weight", "bias", "expert_bias")},
    **{f"mlp.{fc}.{part}": f"mlp.linear_{fc}.{part}" for fc in ("fc1", "fc2") for part in ("weight", "bias")},
    **{f"mlp.experts.{fc}_{part}": f"mlp.experts.experts.linear_{fc}.{part}"
       for fc in ("fc1", "fc2") for part in ("weight", "bias")},
    **{f"mlp.shared_expert.{fc}.{part}": f"mlp.shared_experts.linear_{fc}.{part}"
       for fc in ("fc1", "fc2") for part in ("weight", "bias")},
}  # fmt: skip
EXPERT_BIAS, SHARED_BIAS = "mlp.experts.fc2_bias", "mlp.shared_expert.fc2.bias"


@dataclass(frozen=True)
class Entry:
    """One tensor of a student as Megatron keeps it."""

    key: str  # in the torch_dist folder
    name: str  # in the artifact
    dtype: Dtype  # in the folder
    shape: tuple[int, ...]
    is_folded: bool = False  # holds other values than the artifact's tensor

    @property
    def is_stack(self) -> bool:
        """Whether its first dimension counts experts, which Megatron reads one by one."""
        return ".experts.experts." in self.key


def megatron_key(name: str) -> str:
    """Megatron's key of a student's tensor.

    Raises:  RecipeRefused: a tensor that Megatron has no place for.
    """
    layer = split_layer(name)
    if layer is None and name in _WHOLE:
        return _WHOLE[name]
    if layer is None or layer[1] not in _LAYER:
        raise RecipeRefused(
            "Megatron has no place for this tensor", where=name, expected="a tensor of a student, by its name"
        )
    return f"decoder.layers.{layer[0] - 1}.{_LAYER[layer[1]]}"


def entries(config: StudentConfig, *, folds_shared_bias: bool = False) -> list[Entry]:
    """Every tensor of a student as Megatron keeps it, in the model's order.

    Args:    folds_shared_bias: for a stack that drops the shared expert's output bias: experts take it over (see
             `folded`), so that the experts' biases are float32.
    """
    found = []
    for name, (dtype, shape) in expected_tensors(config).items():
        layer = split_layer(name)
        suffix = layer[1] if layer else ""
        is_folded = folds_shared_bias and suffix in (EXPERT_BIAS, SHARED_BIAS)
        kept: Dtype = "F32" if is_folded and suffix == EXPERT_BIAS else dtype
        found.append(Entry(megatron_key(name), name, kept, shape, is_folded))
    return found


def folded(expert_bias_EH: Tensor, shared_bias_H: Tensor, moe: MoeConfig) -> Tensor:
    """The experts' output bias with that of the shared expert in it.

    The gates of a token sum to `routed_scaling` and multiply the experts' biases; so the shared bias over that sum,
    added to every expert, adds up to the shared bias again.

    Returns: float32 [E, H]: a sum that is rounded to bfloat16 would not be exact.
    """
    return expert_bias_EH.float() + shared_bias_H.float() / moe.routed_scaling


def extra_states(config: StudentConfig) -> list[str]:
    """Keys of the empty states that every linear layer of Megatron saves besides its weights; experts have one each."""
    return sorted(key for number in range(1, config.num_layers + 1) for key in _layer_states(config, number))


def _layer_states(config: StudentConfig, number: int) -> Iterator[str]:
    prefix = f"decoder.layers.{number - 1}."
    linear = ["self_attention.linear_proj"]
    if config.uses_tpa(number):
        linear += [f"self_attention.linear_qkv.linear_{factor}_{part}" for factor in "ab" for part in "qkv"]
    else:
        linear.append("self_attention.linear_qkv")
    experts: list[str] = []
    if config.moe is not None and config.is_moe(number):
        experts = [f"mlp.experts.experts.linear_{fc}" for fc in ("fc1", "fc2")]
        linear += [f"mlp.shared_experts.linear_{fc}" for fc in ("fc1", "fc2")]
        count = config.moe.num_experts
        yield from (f"{prefix}{one}{EXTRA_STATE}{e}_{count}" for one in experts for e in range(count))
    else:
        linear += [f"mlp.linear_{fc}" for fc in ("fc1", "fc2")]
    yield from (f"{prefix}{one}{EXTRA_STATE}0_1" for one in linear)


def partner(name: str) -> str:
    """The other tensor of a fold: the shared bias of an expert bias, and the other way round.

    Raises:  RecipeRefused: a tensor of no fold.
    """
    layer = split_layer(name)
    other = {EXPERT_BIAS: SHARED_BIAS, SHARED_BIAS: EXPERT_BIAS}.get(layer[1] if layer else "")
    if layer is None or other is None:
        raise RecipeRefused("a tensor takes no part in a fold", where=name, expected=f"{EXPERT_BIAS} or {SHARED_BIAS}")
    return layer_tensor(layer[0], other)
