"""Which numbers stay float32 when the rest of a model is bfloat16.

Place in the path: recipe -> **model**. The frequencies, the softmax offsets, the value residual logits and the expert
biases are few, and what they do is lost in eight bits of mantissa: they keep float32 under `model.to(bfloat16)` and on
disk.

Invariants: a pinned tensor never becomes narrower than float32 (it may become float64), whatever is applied to the
module; its gradient follows it.

Example:
    >>> class Scale(KeepsFloat32):
    ...     pinned = ("gain",)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

_NARROW = (torch.bfloat16, torch.float16)


class Numerics(NamedTuple):
    """How a pass computes; what weights, norms, routers and softmax are kept and made in is not chosen here."""

    dtype: torch.dtype | None = None  # of the stream, and so of every matrix product; None: that of the embedding
    is_fused: bool = False  # FlexAttention, grouped products, compiled layers: for training on a GPU
    is_grouped: bool = False  # grouped products alone: for passes that are not worth compiling


REFERENCE = Numerics()


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether a dtype has less than float32's mantissa: then products are narrow, and what `wide` computes is not."""
    return dtype in _NARROW


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms, softmax and routers compute: float32 for the 16-bit types, else the same."""
    return torch.float32 if dtype in _NARROW else dtype


def wide(x: Tensor) -> Tensor:
    """`x` in at least float32; no copy if it is that already."""
    return x.to(wide_dtype(x.dtype))


class KeepsFloat32(nn.Module):
    """A module whose tensors named in `pinned` survive a cast to a narrow dtype."""

    pinned: ClassVar[tuple[str, ...]] = ()

    def pinned_names(self) -> tuple[str, ...]:
        """The pinned tensors that this module really has."""
        return tuple(name for name in self.pinned if getattr(self, name, None) is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsFloat32:
        """Apply `fn`, as torch does for `.to`, `.bfloat16`, `.cuda`, but undo a narrowing of what is pinned."""
        kept = [getattr(self, name) for name in self.pinned_names()]
        kept += [tensor.grad for tensor in kept if tensor.is_leaf and tensor.grad is not None]

        def guarded(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype in _NARROW and any(tensor is one for one in kept):
                return tensor.to(result.device)
            return result

        super()._apply(guarded, recurse)  # type: ignore[no-untyped-call]
        return self
