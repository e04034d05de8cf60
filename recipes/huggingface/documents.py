"""The JSON files beside the weights of an export: config.json, generation_config.json, tokenizer_config.json.

Place in the path: families -> **huggingface** -> export. Pure.

Invariants: every number that decides a logit stands in config.json under the name that transformers gives it; nothing
of the machine or of a package's version is written.

Example:
    student_document(config, HARMONY)["auto_map"]["AutoModelForCausalLM"]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from recipes.checkpoint import STUDENT_ARCHITECTURE, STUDENT_MODEL_TYPE
from recipes.huggingface.families import Family
from recipes.model.config import MoeConfig, StudentConfig

MODELING: Final = "modeling_vpmoe"  # the module that auto_map names
_CLASSES: Final = {"AutoConfig": "VpConfig", "AutoModel": "VpModel", "AutoModelForCausalLM": STUDENT_ARCHITECTURE}


def student_document(config: StudentConfig, family: Family) -> dict[str, Any]:
    """config.json of a student for `modeling_vpmoe.VpConfig`."""
    is_local = [config.uses_tpa(number) for number in range(1, config.num_layers + 1)]
    return {
        "architectures": [STUDENT_ARCHITECTURE],
        "auto_map": {auto: f"{MODELING}.{name}" for auto, name in _CLASSES.items()},
        "model_type": STUDENT_MODEL_TYPE,
        "dtype": "bfloat16",
        "attention": config.attention,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_query_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "query_rank": config.query_rank,
        "kv_rank": config.kv_rank,
        "layer_types": ["sliding_attention" if local else "full_attention" for local in is_local],
        "sliding_window": config.window if any(is_local) else None,
        "max_position_embeddings": config.max_sequence,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": False,
        **(_experts(config.moe) if config.moe is not None else {}),
        **_ids(family),
    }


def _experts(moe: MoeConfig) -> dict[str, Any]:
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "n_group": moe.num_groups,
        "topk_group": moe.top_groups,
        "moe_intermediate_size": moe.expert_hidden_size,
        "shared_expert_intermediate_size": moe.shared_hidden_size,
        "routed_scaling_factor": moe.routed_scaling,
    }


def donor_document(document: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """config.json of a Qwen3 model: as it is, with the ids that it leaves open."""
    found = {key: value for key, value in document.items() if value is not None or key not in _ids(family)}
    return {**_ids(family), **found}


def generation_document(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """generation_config.json: where a model stops; nothing that would change what it says."""
    own = config.get("eos_token_id")
    ends = [own] if isinstance(own, int) else list(own or [])
    return {**_ids(family), "eos_token_id": ends + [one for one in family.eos_ids if one not in ends]}


def tokenizer_document(document: Mapping[str, Any], config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """tokenizer_config.json: what the artifact has of it, the special tokens and the longest row.

    Args:    document: the artifact's own, or nothing.
    """
    first = config.get("eos_token_id")
    first = first[0] if isinstance(first, list) else first
    by_id = {number: name for name, number in family.spec.special.items()}
    special = {"eos_token": by_id.get(first or -1, family.ends[0]), "pad_token": family.pad}
    if family.bos is not None:
        special["bos_token"] = family.bos
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
        **document,
        "model_max_length": config["max_position_embeddings"],
    }


def _ids(family: Family) -> dict[str, Any]:
    found = {"bos_token_id": family.bos_id, "eos_token_id": family.eos_ids, "pad_token_id": family.pad_id}
    return {key: value for key, value in found.items() if value is not None}
