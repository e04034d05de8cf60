"""How many parameters a student has, group by group, counted on the model itself.

The model is built on the meta device, so counting 6 billion takes no memory.

Invariants: every parameter belongs to exactly one group; the expert bias is a buffer and counts nowhere.

Example:
    >>> parameter_counts(config)["grape"]
    64
"""

from __future__ import annotations

from functools import cache

import torch

from recipes.model.attention import GroupedQueryAttention
from recipes.model.config import StudentConfig
from recipes.model.transformer import Layer, Student
from recipes.names import EMBEDDING, HEAD

GROUPS = (
    "embedding",
    "head",
    "global_attention",
    "local_attention",
    "norms",
    "qk_norm",
    "softmax_offset",
    "value_residual",
    "grape",
    "dense_ffn",
    "routed_experts",
    "shared_experts",
    "router",
)


def meta_student(config: StudentConfig) -> Student:
    """The model without memory: shapes and names only."""
    with torch.device("meta"):
        return Student(config)


def parameter_counts(config: StudentConfig) -> dict[str, int]:
    """Parameters of each of `GROUPS`; absent groups are 0.

    GQA counts as global attention and TPA as local, so in compat mode all attention is global.
    """
    return dict(_counted(config))


@cache
def _counted(config: StudentConfig) -> tuple[tuple[str, int], ...]:
    student = meta_student(config)
    counts = dict.fromkeys(GROUPS, 0)
    for name, parameter in student.named_parameters():
        counts[_group(student, name)] += parameter.numel()
    return tuple(counts.items())


def parameter_totals(config: StudentConfig) -> dict[str, int]:
    """Sums over the groups: `total`, `non_embedding` (neither embedding nor head), and both again for what is active.

    Active: what one token goes through, that is top_k of the routed experts and all else.
    """
    counts = parameter_counts(config)
    total = sum(counts.values())
    tables = counts["embedding"] + counts["head"]
    idle = 0
    if config.moe is not None:
        idle = counts["routed_experts"] // config.moe.num_experts * (config.moe.num_experts - config.moe.top_k)
    return {
        "total": total,
        "non_embedding": total - tables,
        "active": total - idle,
        "active_non_embedding": total - tables - idle,
    }


def _group(student: Student, name: str) -> str:
    """The group of a parameter, by its name and by the kind of its layer."""
    if name in (EMBEDDING, HEAD):
        return "embedding" if name == EMBEDDING else "head"
    parts = name.split(".")
    if parts[1] != "layers":
        return "grape" if parts[1] == "grape" else "norms"
    return _layer_group(student.layers[int(parts[2])], parts[3:])


def _layer_group(layer: Layer, parts: list[str]) -> str:
    """The group of a layer's parameter, e.g. ["self_attn", "q_norm", "weight"]."""
    module, part = parts[0], parts[1]
    if module == "mlp":
        return {"router": "router", "experts": "routed_experts", "shared_expert": "shared_experts"}.get(
            part, "dense_ffn"
        )
    if module != "self_attn":
        return "norms"
    if part in ("softmax_offset", "value_residual"):
        return part
    if part in ("q_norm", "k_norm"):
        return "qk_norm"
    return "global_attention" if isinstance(layer.self_attn, GroupedQueryAttention) else "local_attention"
