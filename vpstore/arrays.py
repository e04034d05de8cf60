"""Stored tensors as arrays: of NumPy, of PyTorch, or of whoever speaks DLPack.

Place in the path: beside the store; behind what `vpstore.open` gives. The only module that knows PyTorch, and with
`numbers` the only one that knows NumPy; each is imported when it is asked for, and neither is needed for the bytes.
Invariants: an array has the stored values, bit for bit, in the stored shape and dtype, or there is an error; nobody can
write into the store through one.

Example:
    numpy_array("BF16", (2, 3), data).dtype  # ml_dtypes.bfloat16
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from vpstore.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, np.dtype[Any]]
    TorchTensor = torch.Tensor

# safetensors' names; all are little-endian.
_NUMPY: Final = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U64": "<u8", "I32": "<i4", "U32": "<u4",
    "I16": "<i2", "U16": "<u2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1", "C64": "<c8",
}  # fmt: skip
_ML_DTYPES: Final = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_TORCH: Final = {
    "F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "U64": "uint64", "I32": "int32",
    "U32": "uint32", "I16": "int16", "U16": "uint16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
    **_ML_DTYPES,
}  # fmt: skip
CPU: Final = (1, 0)  # as DLPack numbers devices


def numpy_array(dtype: str, shape: tuple[int, ...], data: memoryview) -> Array:
    """The tensor as a read-only array over the very bytes; 16 and 8 bit floats have the dtypes of ml_dtypes.

    Raises:  UsageError: no array has such a dtype, or a package is missing.
    """
    with _needed("numpy"):
        import numpy as np
    if dtype in _NUMPY:
        wanted = np.dtype(_NUMPY[dtype])
    elif dtype in _ML_DTYPES:
        with _needed("ml_dtypes"):
            import ml_dtypes
        wanted = np.dtype(getattr(ml_dtypes, _ML_DTYPES[dtype]))
    else:
        raise _lacking("numpy", dtype)
    array: Array = np.frombuffer(data, dtype=wanted) if data.nbytes else np.empty(shape, dtype=wanted)
    array.flags.writeable = False
    return array.reshape(shape)


def torch_tensor(dtype: str, shape: tuple[int, ...], data: memoryview) -> torch.Tensor:
    """The tensor as one of PyTorch, on the CPU, over a copy of the bytes that is the caller's own.

    Raises:  UsageError: PyTorch has no such dtype here, or is not installed.
    """
    with _needed("torch"):
        import torch
    wanted = getattr(torch, _TORCH.get(dtype, ""), None)
    if wanted is None:
        raise _lacking("torch", dtype)
    if not data.nbytes:
        return torch.empty(shape, dtype=wanted)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(wanted).reshape(shape)


def dlpack(dtype: str, shape: tuple[int, ...], data: memoryview, **asked: Any) -> Any:
    """A DLPack capsule over a copy of the bytes: by NumPy, or by PyTorch where NumPy's dtype is not its own.

    Raises:  UsageError: neither has the dtype.
    """
    if dtype in _NUMPY:
        return numpy_array(dtype, shape, data).copy().__dlpack__(**asked)
    return torch_tensor(dtype, shape, data).__dlpack__(**asked)


@contextmanager
def _needed(name: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            "a package for arrays is not installed",
            where=name,
            expected=f"{name} in this environment",
            next_step=f"pip install {name}; the bytes of a tensor, its `data`, need none",
        ) from error


def _lacking(package: str, dtype: str) -> UsageError:
    return UsageError(
        f"{package} has no such dtype",
        where=dtype,
        expected=", ".join(sorted(_TORCH)),
        next_step="take the bytes: `data`, little-endian and row-major",
    )
