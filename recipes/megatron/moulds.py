"""What `torch.save` writes of a tensor, without calling it for each of many alike.

Place in the path: **megatron**; torch_dist writes by it.

Invariants: the bytes are those of `torch.save` without the zip's checksums, which no reader of torch looks at.

Example:
    out.writelines(Moulds().pieces(tensor))

Source:  https://docs.pytorch.org/docs/stable/generated/torch.serialization.set_crc32_options.html
"""

from __future__ import annotations

import io
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils.serialization import config

from recipes.tensors import raw_bytes


def saved(value: Any) -> bytes:
    """The bytes of one value."""
    out = io.BytesIO()
    save(value, out)
    return out.getvalue()


def save(value: Any, out: IO[bytes]) -> None:
    """Write one value, at the place where `out` stands."""
    with config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
        torch.save(value, out)


class Moulds:
    """What `torch.save` puts before and behind the bytes of a tensor: the same for all of one dtype and shape.

    Some 80,000 pieces of experts have six shapes; saving each by itself takes as long as writing its bytes. So that
    nothing else depends on the bytes, the zip's checksums are left out, which no reader of torch looks at.
    """

    def __init__(self) -> None:
        self._around: dict[tuple[torch.dtype, torch.Size], tuple[bytes, bytes]] = {}

    def pieces(self, tensor: Tensor) -> tuple[bytes, memoryview, bytes]:
        """What `torch.save` writes of a contiguous tensor that has its storage for itself."""
        data, kind = raw_bytes(tensor), (tensor.dtype, tensor.shape)
        if kind not in self._around:
            zeros, ones = (saved(_filled(tensor, byte)) for byte in (0, 255))
            begin = next(place for place, (one, other) in enumerate(zip(zeros, ones, strict=True)) if one != other)
            end = begin + len(data)
            assert zeros[:begin] + zeros[end:] == ones[:begin] + ones[end:]
            self._around[kind] = zeros[:begin], zeros[end:]
        before, behind = self._around[kind]
        return before, data, behind


def _filled(like: Tensor, byte: int) -> Tensor:
    """A tensor all of whose bytes are the same."""
    return torch.full((like.nbytes,), byte, dtype=torch.uint8).view(like.dtype).reshape(like.shape)
