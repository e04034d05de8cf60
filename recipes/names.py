"""Names of tensors and shards: the Hugging Face layout, one shard a module.

Place in the path: recipe -> **tensors**. One shard a module keeps unchanged modules one blob in every artifact.
Names carry 0-based layer indices, as Hugging Face's do; everything else in the project counts layers from 1.

Example:
    >>> shard_of("model.layers.3.mlp.fc1.weight")
    'model-layer-004.safetensors'
"""

from __future__ import annotations

import re

from vpstore.errors import RecipeRefused

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
LOG_FREQ = "model.grape.log_freq"
INDEX_FILE = "model.safetensors.index.json"

_COEFFICIENTS = re.compile(r"coefficients\.([a-z]+)\..+")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_SHARDS = {
    EMBEDDING: "model-embedding.safetensors",
    HEAD: "model-head.safetensors",
    FINAL_NORM: "model-final-norm.safetensors",
    LOG_FREQ: "model-grape.safetensors",
}


def coefficient_tensor(table: str, suffix: str) -> str:
    """Full name of a tensor of an artifact of coefficients; a table (a space, or the rows) has a shard of its own."""
    return f"coefficients.{table}.{suffix}"


def layer_tensor(layer: int, suffix: str) -> str:
    """Full name of a tensor of 1-based `layer`."""
    return f"model.layers.{layer - 1}.{suffix}"


def split_layer(name: str) -> tuple[int, str] | None:
    """The 1-based layer and the suffix of a layer's tensor; None for the others."""
    match = _LAYER.fullmatch(name)
    return (int(match[1]) + 1, match[2]) if match else None


def shard_of(name: str) -> str:
    """The shard file that holds the tensor `name`.

    Raises:  RecipeRefused: a name of no known module.
    """
    if name in _SHARDS:
        return _SHARDS[name]
    if (table := _COEFFICIENTS.fullmatch(name)) is not None:
        return f"coefficients-{table[1]}.safetensors"
    found = split_layer(name)
    if found is None:
        raise RecipeRefused(
            "a tensor belongs to no known module",
            where=name,
            expected="model.layers.<i>.…, " + ", ".join(sorted(_SHARDS)),
            next_step="add the module to recipes/names.py",
        )
    return f"model-layer-{found[0]:03d}.safetensors"
