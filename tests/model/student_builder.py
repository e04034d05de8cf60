"""Small students with every weight away from its neutral value, so that nothing can hide behind a zero."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache

import torch

from recipes.model.attention import Attention
from recipes.model.config import MoeConfig, StudentConfig
from recipes.model.transformer import Layer, Student

SMALL_MOE = MoeConfig(num_experts=16, expert_hidden_size=6, shared_hidden_size=12, num_groups=8, top_groups=4, top_k=4)


def config_of(
    attention: str = "tpa", *, layers: int = 4, hidden: int = 16, moe: MoeConfig | None = None
) -> StudentConfig:
    return StudentConfig(hidden_size=hidden, num_layers=layers, ffn_hidden_size=12, attention=attention, moe=moe)


def shaken(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter and buffer drawn anew, large enough to matter; offsets around 0, so that the sink has mass."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.3 * noise)
            elif name.endswith("log_freq"):
                tensor.add_(noise)
            elif name.endswith(("weight", "bias")) and "embed" not in name:
                tensor.copy_(0.3 * noise)
            elif name.endswith("expert_bias"):
                tensor.copy_(0.1 * noise)
            else:
                tensor.copy_(noise)
    return module


@lru_cache(maxsize=4)  # drawing the tables takes longer than most tests do with them
def _drawn(config: StudentConfig, seed: int) -> Student:
    student = shaken(Student(config), seed)
    assert isinstance(student, Student)
    return student


def student_of(config: StudentConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Student:
    return deepcopy(_drawn(config, seed)).to(dtype)


def layer_of(config: StudentConfig, number: int, dtype: torch.dtype = torch.float64) -> Layer:
    layer = shaken(Layer(config, number=number), seed=number).to(dtype)
    assert isinstance(layer, Layer)
    return layer


def attention_of(config: StudentConfig, number: int, dtype: torch.dtype = torch.float64) -> Attention:
    return layer_of(config, number, dtype).self_attn


def ids_of(rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 201088, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    with torch.no_grad():
        return float((found.double() - expected.double()).norm() / expected.double().norm())
