"""What `vpstore.open` gives, as arrays; and what `vpstore.resolve` gives, as a path."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from small_project import Project

import vpstore
from vpstore import api
from vpstore.errors import NoSuchTensor, UsageError
from vpstore.verbs.reading import StoredTensor
from vpstore.workspace import Workspace

# Of each kind some numbers that the dtype has, in two rows.
PLAIN: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "U64": np.uint64, "I32": np.int32,
    "U32": np.uint32, "I16": np.int16, "U16": np.uint16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
    "C64": np.complex64,
}  # fmt: skip
NARROW: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip
ALL = {**PLAIN, **NARROW}


def stored(dtype: str, shape: tuple[int, ...] = (2, 3)) -> tuple[StoredTensor, Any]:
    count = int(np.prod(shape))
    values = np.resize(np.array([1, 2, 4, 0.5, 16, 1]), count).astype(ALL[dtype]).reshape(shape)
    return StoredTensor("w", dtype, shape, memoryview(values.tobytes())), values


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4)])
def test_an_array_has_the_values_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    tensor, values = stored(dtype, shape)
    for array in (tensor.numpy(), np.asarray(tensor)):
        assert (array.dtype, array.shape, array.tobytes()) == (values.dtype, shape, values.tobytes())
        assert not array.flags.writeable
    other = tensor.torch()
    assert (tuple(other.shape), raw(other)) == (shape, values.tobytes())
    assert str(other.dtype).removeprefix("torch.") == values.dtype.name


@pytest.mark.parametrize("dtype", [*PLAIN, "BF16"])
def test_pytorch_takes_it_as_it_is(dtype: str) -> None:
    tensor, values = stored(dtype)
    for take in (torch.tensor, torch.as_tensor, torch.from_dlpack):
        found = take(tensor)
        assert raw(found) == values.tobytes()
        found.zero_()  # the caller's own
    assert bytes(tensor.data) == values.tobytes()


def test_numpy_takes_it_by_either_protocol() -> None:
    tensor, values = stored("F32")
    assert np.array_equal(np.from_dlpack(tensor), values)
    assert np.array_equal(np.array(tensor, dtype=np.float64), values)
    assert np.add(tensor, 1).tolist() == (values + 1).tolist()
    assert np.array(tensor).flags.writeable  # a copy, as np.array promises
    assert np.shares_memory(np.asarray(tensor, copy=False), np.frombuffer(tensor.data, np.uint8))
    with pytest.raises(ValueError, match="w is float32; as float64 it has to be copied"):
        np.asarray(tensor, dtype=np.float64, copy=False)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "X7"])
def test_a_dtype_that_arrays_lack_is_one_error(dtype: str) -> None:
    tensor = StoredTensor("w", dtype, (8,), memoryview(bytes(4)))
    for take in (tensor.numpy, tensor.torch, lambda: np.asarray(tensor), lambda: torch.from_dlpack(tensor)):
        with pytest.raises(UsageError, match="has no such dtype") as caught:
            take()
        assert caught.value.where == dtype
        assert "data" in caught.value.next_step


@pytest.mark.parametrize(("package", "way"), [("torch", "torch"), ("ml_dtypes", "numpy"), ("numpy", "numpy")])
def test_a_package_that_is_not_there_is_one_error(package: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, _ = stored("BF16")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match="not installed") as caught:
        getattr(tensor, way)()
    assert caught.value.where == package


INDEXED = """
    shard(scratch / "other.safetensors", {"body": b"other", "only": b"x"})
    index = {"weight_map": {"body": "other.safetensors", "kept": "model.safetensors"}}
    named = "model.safetensors.index.json"
    (scratch / named).write_text(json.dumps(index))
    return Staged(
        [StagedFile("other.safetensors", "application/vnd.safetensors", scratch / "other.safetensors"),
         StagedFile(named, "application/json", scratch / named),
         """


def with_index(built: Project) -> Workspace:
    """The project, whose plant has a second shard with a second body, and an index."""
    grow = built.root / "small" / "grow.py"
    end = "    return Staged(\n        ["
    assert end in grow.read_text()
    grow.write_text(grow.read_text().replace(end, INDEXED.lstrip("\n").rstrip(" ")))
    built.run("build", "plant@sprout", "plant@bloom")
    return Workspace.find(built.root)


def test_the_index_says_which_file_is_meant(built: Project) -> None:
    opened = api.open("plant", work=with_index(built))
    assert bytes(opened["body"].data) == b"other"
    assert bytes(opened["kept"].data) == bytes(range(32))
    # What no index names is there as well; the body that it does not mean has its file's name before its own.
    assert set(opened) == {"body", "model.safetensors:body", "kept", "only", "void"}


def test_an_artifact_without_tensors_says_so(built: Project) -> None:
    with pytest.raises(NoSuchTensor, match="holds no tensors") as caught:
        vpstore.open("reports@plant-bloom", checkout=built.root)
    assert caught.value.where == "reports@plant-bloom"


def test_a_checkout_can_be_named(built: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = vpstore.resolve("plant", checkout=built.root / "configs")
    assert isinstance(found, os.PathLike)
    assert os.fspath(found) == str(found) == str(found.path)
    assert (Path(found) / "model.safetensors").is_file()
    assert vpstore.open("plant", checkout=str(built.root))["kept"].numpy().tolist() == list(range(32))
    with pytest.raises(UsageError, match="two places"):
        vpstore.open("plant", checkout=built.root, work=Workspace.find(built.root))
    with pytest.raises(UsageError):
        vpstore.resolve("plant", checkout=tmp_path)


def test_the_package_shows_what_it_has() -> None:
    assert {"build", "open", "resolve", "__version__"} <= set(dir(vpstore))
    assert {"audit", "export", "export_check", "why"} <= set(dir(api))
    assert all(getattr(vpstore, name) is not None for name in vpstore.__all__)
