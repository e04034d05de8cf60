"""The arithmetic of `diff`, held against slow loops over Python's own numbers and, for 8-bit floats, against torch."""

from __future__ import annotations

import math
import random
import struct
import tracemalloc
from fractions import Fraction

import pytest

from vpstore.errors import BadManifest
from vpstore.numbers import compare_tensors

FORMATS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "U64": "Q", "I32": "i", "U32": "I", "I16": "h", "U16": "H",
           "I8": "b", "U8": "B"}  # fmt: skip
LIMITS = {"I64": (-(2**63), 2**63 - 1), "U64": (0, 2**64 - 1), "I32": (-(2**31), 2**31 - 1), "U32": (0, 2**32 - 1),
          "I16": (-(2**15), 2**15 - 1), "U16": (0, 2**16 - 1), "I8": (-128, 127), "U8": (0, 255)}  # fmt: skip


def packed(dtype: str, values: list[float] | list[int]) -> memoryview:
    if dtype == "BF16":
        return memoryview(b"".join(struct.pack("<f", value)[2:] for value in values))
    return memoryview(struct.pack(f"<{len(values)}{FORMATS[dtype]}", *values))


def unpacked(dtype: str, data: memoryview) -> list[float]:
    if dtype == "BF16":
        return [struct.unpack("<f", b"\0\0" + bytes(data[at : at + 2]))[0] for at in range(0, len(data), 2)]
    return list(struct.unpack(f"<{len(data) // struct.calcsize(FORMATS[dtype])}{FORMATS[dtype]}", data))


def norm(values: list[Fraction]) -> float:
    return math.sqrt(sum(value * value for value in values))


def values_of(dtype: str, rng: random.Random, count: int) -> list[float] | list[int]:
    if dtype in LIMITS:
        low, high = LIMITS[dtype]
        return [rng.choice([low, high, 0, rng.randint(low, high)]) for _ in range(count)]
    return [rng.choice([0.0, -0.0, 1.0, rng.uniform(-3, 3), rng.uniform(-3, 3) * 1e-4]) for _ in range(count)]


@pytest.mark.parametrize("dtype", [*FORMATS, "BF16"])
def test_figures_are_those_of_exact_arithmetic(dtype: str) -> None:
    rng = random.Random(dtype)
    before = packed(dtype, values_of(dtype, rng, 200))
    after = packed(dtype, values_of(dtype, rng, 200))
    pairs = [(Fraction(a), Fraction(b)) for a, b in zip(unpacked(dtype, before), unpacked(dtype, after), strict=True)]
    apart = [abs(a - b) for a, b in pairs]
    ratios = [d / max(abs(a), abs(b)) for d, (a, b) in zip(apart, pairs, strict=True) if d]
    found = compare_tensors(dtype, before, after)
    assert not found.is_identical
    assert found.max_abs == pytest.approx(float(max(apart)), rel=1e-15)
    assert found.max_rel == pytest.approx(float(max(ratios)), rel=1e-15)
    assert found.norm_before == pytest.approx(norm([a for a, _ in pairs]), rel=1e-12)
    assert found.norm_after == pytest.approx(norm([b for _, b in pairs]), rel=1e-12)
    assert found.norm_difference == pytest.approx(norm(apart), rel=1e-12)


@pytest.mark.parametrize("dtype", [*FORMATS, "BF16"])
def test_a_tensor_is_identical_to_itself(dtype: str) -> None:
    data = packed(dtype, values_of(dtype, random.Random(7), 100))
    found = compare_tensors(dtype, data, memoryview(bytes(data)))
    assert found.is_identical
    assert (found.max_abs, found.max_rel, found.norm_difference) == (0.0, 0.0, 0.0)
    assert found.norm_before == found.norm_after


def test_neighbours_among_large_integers_are_one_apart() -> None:
    """As doubles they would be equal."""
    for dtype, value in (("I64", 2**62), ("U64", 2**64 - 2), ("I64", -(2**63))):
        found = compare_tensors(dtype, packed(dtype, [value]), packed(dtype, [value + 1]))
        assert (found.is_identical, found.max_abs) == (False, 1.0)


def test_the_ends_of_the_integers_are_as_far_apart_as_they_are() -> None:
    found = compare_tensors("I64", packed("I64", [-(2**63)]), packed("I64", [2**63 - 1]))
    assert found.max_abs == float(2**64 - 1)


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("before", "after", "max_abs", "max_rel"),
    [
        (NAN, NAN, 0.0, 0.0),
        (INF, INF, 0.0, 0.0),
        (0.0, -0.0, 0.0, 0.0),
        (NAN, 1.0, INF, INF),
        (1.0, NAN, INF, INF),
        (NAN, INF, INF, INF),
        (INF, -INF, INF, INF),
        (INF, 1.0, INF, INF),
        (1.0, -1.0, 2.0, 2.0),
        (0.0, 5.0, 5.0, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_what_is_not_finite_is_said_without_nan(
    dtype: str, before: float, after: float, max_abs: float, max_rel: float
) -> None:
    found = compare_tensors(dtype, packed(dtype, [1.0, before]), packed(dtype, [1.0, after]))
    assert (found.max_abs, found.max_rel) == (max_abs, max_rel)
    assert not any(math.isnan(figure) for figure in (found.norm_before, found.norm_after, found.norm_difference))


def test_nans_of_other_payloads_are_other_bytes_and_no_other_value() -> None:
    quiet, other = struct.pack("<I", 0x7FC00000), struct.pack("<I", 0x7FC00001)
    found = compare_tensors("F32", memoryview(quiet), memoryview(other))
    assert (found.is_identical, found.max_abs) == (False, 0.0)


def test_norms_neither_overflow_nor_vanish() -> None:
    large, small = packed("F64", [3e300, 4e300]), packed("F64", [3e-300, 4e-300])
    found = compare_tensors("F64", large, small)
    assert found.norm_before == pytest.approx(5e300, rel=1e-14)
    assert found.norm_after == pytest.approx(5e-300, rel=1e-14)


@pytest.mark.parametrize(
    ("dtype", "torch_name"),
    [
        ("F8_E4M3", "float8_e4m3fn"),
        ("F8_E5M2", "float8_e5m2"),
        ("F8_E4M3FNUZ", "float8_e4m3fnuz"),
        ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
        ("F8_E8M0", "float8_e8m0fnu"),
    ],
)
def test_every_8_bit_float_has_the_value_that_torch_gives_it(dtype: str, torch_name: str) -> None:
    torch = pytest.importorskip("torch")
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(getattr(torch, torch_name)).to(torch.float64).tolist()
    one = next(code for code, value in enumerate(expected) if value == 1.0)
    for code, value in enumerate(expected):
        found = compare_tensors(dtype, memoryview(bytes([one])), memoryview(bytes([code])))
        assert found.max_abs == (INF if math.isnan(value) else abs(value - 1.0)), (code, value)


def test_dtypes_without_arithmetic_are_compared_byte_for_byte() -> None:
    for dtype in ("F4", "C64", "F6_E2M3"):
        same = compare_tensors(dtype, memoryview(b"abcdefgh"), memoryview(b"abcdefgh"))
        other = compare_tensors(dtype, memoryview(b"abcdefgh"), memoryview(b"abcdefgx"))
        assert (same.is_identical, other.is_identical, other.max_abs) == (True, False, None)


def test_booleans_and_empty_tensors() -> None:
    found = compare_tensors("BOOL", memoryview(b"\0\1\1"), memoryview(b"\1\1\1"))
    assert (found.max_abs, found.norm_difference) == (1.0, 1.0)
    empty = compare_tensors("F32", memoryview(b""), memoryview(b""))
    assert (empty.is_identical, empty.max_abs, empty.norm_before) == (True, 0.0, 0.0)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadManifest):
        compare_tensors("F32", memoryview(bytes(8)), memoryview(bytes(4)))
    with pytest.raises(BadManifest):
        compare_tensors("F32", memoryview(bytes(6)), memoryview(bytes(6)))


def test_a_difference_in_the_last_chunk_is_found_in_bounded_memory() -> None:
    size = 64 << 20
    before, after = bytearray(size), bytearray(size)
    after[-4:] = struct.pack("<f", 1.0)
    compare_tensors("F32", memoryview(bytes(4)), memoryview(bytes(4)))  # NumPy is loaded
    tracemalloc.start()
    found = compare_tensors("F32", memoryview(before), memoryview(after))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found.max_abs, found.norm_difference) == (1.0, 1.0)
    assert peak < 32 << 20
