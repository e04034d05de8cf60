"""The feed-forward block: W2 relu(W1 x + b1)^2 + b2, without a gate.

Place in the path: recipe -> **model**; dense layers and the shared expert are this very module, so that a dense block
moved into a shared expert goes through the same matrix products.

Example:
    >>> FeedForward(64, 32)(torch.zeros(1, 1, 64)).shape
    torch.Size([1, 1, 64])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recipes.model.modules import Projection


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2, elementwise. Source: So et al. 2021, arXiv:2109.08668 (Primer)."""
    return torch.relu(x).square()


class FeedForward(nn.Module):
    """Two projections with biases around a squared ReLU."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.fc1 = Projection(hidden_size, width)
        self.fc2 = Projection(width, hidden_size)

    def hidden_activations(self, x: Tensor) -> Tensor:
        """relu(W1 x + b1)^2."""
        return relu_squared(self.fc1(x))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        y: Tensor = self.fc2(self.hidden_activations(x))
        return y
