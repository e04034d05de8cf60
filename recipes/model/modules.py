"""The plain parts: projections, embedding, RMS norm.

Place in the path: recipe -> **model**. What differs from torch's own: how a fresh one is drawn (normal, standard
deviation 0.02, biases 0), and that the norm computes in float32.

Invariants: drawing with the same generator state gives the same weights; a linear layer is y = W x + b, W [out, in].

Example:
    >>> Projection(64, 32)(torch.zeros(1, 64)).shape
    torch.Size([1, 32])
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from recipes.model.precision import wide

INITIAL_STD = 0.02


@runtime_checkable
class Drawable(Protocol):
    """A module that can draw its own weights afresh."""

    def draw(self, generator: Generator | None = None) -> None:
        """Draw all weights that the module itself holds (not its children's)."""


class Projection(nn.Linear):
    """A linear layer with a small normal start; its product is made in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of `x`, whatever the weight is kept in."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def draw(self, generator: Generator | None = None) -> None:
        """Draw the weight, zero the bias."""
        if self.weight.is_meta:  # a shape without values, which torch takes milliseconds to draw
            return
        nn.init.normal_(self.weight, std=INITIAL_STD, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        """What torch calls while constructing."""
        self.draw()


class Embedding(nn.Embedding):
    """A table of rows with a small normal start."""

    def draw(self, generator: Generator | None = None) -> None:
        """Draw the rows."""
        if self.weight.is_meta:
            return
        nn.init.normal_(self.weight, std=INITIAL_STD, generator=generator)

    def reset_parameters(self) -> None:
        """What torch calls while constructing."""
        self.draw()


class RmsNorm(nn.Module):
    """g * x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32, given back in x's dtype."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`."""
        x_wide = wide(x)
        scale = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + self.eps)
        return (x_wide * scale * self.weight.to(x_wide.dtype)).to(x.dtype)
