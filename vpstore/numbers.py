"""Numbers out of stored tensors: how far apart two tensors of one dtype are.

Place in the path: beside the store; `diff` and `reproduce` hand it the bytes of two tensors. With `arrays` the
only module that knows NumPy, imported when the first comparison is made.
Invariants: bounded memory whatever the size; differences of integers are exact before they are rounded once to a
double; results are finite or infinite, never NaN: where exactly one of two elements is NaN, or an infinity stands
against anything else, they are infinitely far apart; two NaNs, whatever their payload, are not apart at all.

Example:
    compare_tensors("BF16", before, after).max_abs
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from vpstore.errors import BadManifest

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK: Final = 1 << 18  # elements at a time: about 10 MB of doubles in all
_SAFE: Final = 1e140  # squares of what lies between 1 / _SAFE and _SAFE neither overflow nor vanish
_PLAIN: Final = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U64": "<u8", "I32": "<i4", "U32": "<u4",
    "I16": "<i2", "U16": "<u2", "I8": "|i1", "U8": "|u1", "BOOL": "|u1",
}  # fmt: skip
_CODED: Final = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")


@dataclass(frozen=True)
class TensorDifference:
    """How two tensors of one dtype and size differ; the figures are None if the dtype has no arithmetic here."""

    is_identical: bool  # byte for byte
    max_abs: float | None  # largest |a - b|
    max_rel: float | None  # largest |a - b| / max(|a|, |b|), from 0 to 2; 0 where both are zero
    norm_before: float | None  # Euclidean
    norm_after: float | None
    norm_difference: float | None


def compare_tensors(dtype: str, before: memoryview, after: memoryview) -> TensorDifference:
    """Compare two tensors element by element.

    Args:    dtype: of both, as safetensors names it; before, after: their bytes, little-endian, row-major.
    Returns: a max_rel of infinity where an element is infinitely far from its counterpart.
    Raises:  BadManifest: sizes differ, or are no whole number of elements.
    """
    if before.nbytes != after.nbytes:
        raise BadManifest(
            "tensors of different sizes have no difference",
            expected=f"{before.nbytes} bytes",
            found=f"{after.nbytes} bytes",
        )
    decode = _decoder(dtype)
    if decode is None:
        return TensorDifference(_is_equal(before, after), None, None, None, None, None)
    width = _width(dtype)
    if before.nbytes % width:
        raise BadManifest("a tensor is no whole number of elements", expected=f"multiples of {width} bytes for {dtype}")
    sums = _Sums()
    for begin in range(0, before.nbytes, _CHUNK * width):
        span = slice(begin, begin + _CHUNK * width)
        sums.add(before.cast("B")[span], after.cast("B")[span], decode)
    return sums.result()


class _Sums:
    """The figures of the chunks seen so far."""

    def __init__(self) -> None:
        self.is_identical = True
        self.max_abs = self.max_rel = 0.0
        self.norm_before = self.norm_after = self.norm_difference = 0.0

    def add(self, before: memoryview, after: memoryview, decode: Callable[[memoryview], Array]) -> None:
        """Take in one chunk; most chunks of most tensors are equal, and cost one decoding then."""
        import numpy as np

        left = decode(before)
        if _is_equal(before, after):
            norm = _norm(np.abs(left.astype(np.float64)))
            self.norm_before = math.hypot(self.norm_before, norm)
            self.norm_after = math.hypot(self.norm_after, norm)
            return
        self.is_identical = False
        right = decode(after)
        apart = _distance(left, right)
        size_left, size_right = np.abs(left.astype(np.float64)), np.abs(right.astype(np.float64))
        self.max_abs = max(self.max_abs, float(apart.max()))
        self.max_rel = max(self.max_rel, _largest_ratio(apart, np.fmax(size_left, size_right)))
        self.norm_before = math.hypot(self.norm_before, _norm(size_left))
        self.norm_after = math.hypot(self.norm_after, _norm(size_right))
        self.norm_difference = math.hypot(self.norm_difference, _norm(apart))

    def result(self) -> TensorDifference:
        """The figures as one value."""
        return TensorDifference(
            self.is_identical, self.max_abs, self.max_rel, self.norm_before, self.norm_after, self.norm_difference
        )


def _distance(left: Array, right: Array) -> Array:
    """Elementwise |a - b| as doubles."""
    import numpy as np

    if left.dtype.kind in "iu":
        # Modulo 2**64 the larger minus the smaller is their distance, also where it does not fit the signed type.
        wide_left, wide_right = left.astype(np.uint64), right.astype(np.uint64)
        exact = np.where(left > right, wide_left - wide_right, wide_right - wide_left)
        return np.asarray(exact, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(left.astype(np.float64) - right.astype(np.float64))
    is_same = (left == right) | (np.isnan(left) & np.isnan(right))
    return np.where(is_same, 0.0, np.where(np.isnan(apart), np.inf, apart))


def _largest_ratio(apart: Array, size: Array) -> float:
    """Largest |a - b| / max(|a|, |b|)."""
    import numpy as np

    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = apart / size
    # Nothing over nothing is no difference; infinitely far apart stays so although it is divided by an infinity.
    ratio = np.where(apart == 0.0, 0.0, np.where(np.isinf(apart) & ~(size < np.inf), np.inf, ratio))
    return float(np.where(np.isnan(ratio), np.inf, ratio).max())


def _norm(size: Array) -> float:
    """The Euclidean norm of magnitudes, without overflow on the way; infinite if any is infinite or NaN."""
    import numpy as np

    largest = float(size.max()) if size.size else 0.0
    if math.isnan(largest) or math.isinf(largest):
        return math.inf
    if largest == 0.0:
        return 0.0
    scale = 1.0 if 1 / _SAFE < largest < _SAFE else largest
    return scale * math.sqrt(float(np.square(size / scale).sum()))


def _is_equal(before: memoryview, after: memoryview) -> bool:
    """Whether the bytes are the same; NumPy compares ten times as many a second as a memory view does."""
    import numpy as np

    step = 1 << 22
    left, right = (np.frombuffer(side, dtype=np.uint8) for side in (before, after))
    return all(np.array_equal(left[at : at + step], right[at : at + step]) for at in range(0, left.size, step))


def _width(dtype: str) -> int:
    return 1 if dtype in _CODED else 2 if dtype == "BF16" else int(_PLAIN[dtype][2])


def _decoder(dtype: str) -> Callable[[memoryview], Array] | None:
    """From bytes to an array of integers or floats; None for what has no arithmetic here."""
    import numpy as np

    if dtype in _PLAIN:
        plain = np.dtype(_PLAIN[dtype])
        return lambda data: np.frombuffer(data, dtype=plain)
    if dtype == "BF16":
        return _decode_bf16
    if dtype in _CODED:
        table = np.array(_table(dtype))
        return lambda data: np.asarray(table[np.frombuffer(data, dtype=np.uint8)])
    return None


def _decode_bf16(data: memoryview) -> Array:
    """The upper half of a float32."""
    import numpy as np

    return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


@cache
def _table(dtype: str) -> tuple[float, ...]:
    """The values of all 256 codes of an 8-bit float."""
    if dtype == "F8_E8M0":
        return tuple(math.ldexp(1.0, code - 127) if code < 255 else math.nan for code in range(256))
    mantissa_bits = 3 if "E4M3" in dtype else 2
    exponent_bits = 7 - mantissa_bits
    is_unsigned_zero = dtype.endswith("FNUZ")
    bias = (1 << (exponent_bits - 1)) - (0 if is_unsigned_zero else 1)
    values = [_value(code, mantissa_bits, bias) for code in range(256)]
    if is_unsigned_zero:  # one NaN, where minus zero would be
        values[0x80] = math.nan
    elif dtype == "F8_E4M3":  # no infinities; all bits set is NaN
        values[0x7F] = values[0xFF] = math.nan
    else:  # as IEEE 754: the highest exponent holds infinity and NaNs
        for sign, infinity in ((0x00, math.inf), (0x80, -math.inf)):
            values[sign | 0x7C] = infinity
            for code in (0x7D, 0x7E, 0x7F):
                values[sign | code] = math.nan
    return tuple(values)


def _value(code: int, mantissa_bits: int, bias: int) -> float:
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) | mantissa, exponent - bias - mantissa_bits)
