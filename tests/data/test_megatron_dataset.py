from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.data.megatron_dataset import IndexedDataset, IndexedDatasetWriter, bin_path, idx_path
from vpstore.errors import RecipeRefused

DTYPES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def write(prefix: Path, documents: list[list[int]], dtype: str = "int32") -> None:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)


def test_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3], [200007], [70000, 0]])
    assert bin_path(tmp_path / "x").read_bytes() == b"".join(
        bytes.fromhex(item) for item in ("01000000", "02000000", "03000000", "470d0300", "70110100", "00000000")
    )
    assert idx_path(tmp_path / "x").read_bytes() == b"".join(
        (
            b"MMIDIDX\x00\x00",
            bytes.fromhex("0100000000000000"),  # version
            b"\x04",  # int32
            bytes.fromhex("0300000000000000"),  # sequences
            bytes.fromhex("0400000000000000"),  # marks of documents
            bytes.fromhex("03000000 01000000 02000000"),
            bytes.fromhex("0000000000000000 0c00000000000000 1000000000000000"),
            bytes.fromhex("0000000000000000 0100000000000000 0200000000000000 0300000000000000"),
        )
    )


def test_size_of_the_index_is_the_published_one(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1]] * 219)
    assert idx_path(tmp_path / "x").stat().st_size == 4422


@pytest.mark.parametrize(("name", "code"), DTYPES.items())
def test_every_dtype_has_its_code(tmp_path: Path, name: str, code: int) -> None:
    write(tmp_path / "x", [[1, 2], [3]], name)
    assert idx_path(tmp_path / "x").read_bytes()[17] == code
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.dtype == np.dtype(name)
    assert dataset[1].tolist() == [3]


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20), max_size=20))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    prefix = tmp_path_factory.mktemp("ds") / "x"
    write(prefix, documents)
    dataset = IndexedDataset(prefix)
    assert [dataset[n].tolist() for n in range(len(dataset))] == documents
    assert dataset.lengths.tolist() == [len(document) for document in documents]
    assert dataset.documents.tolist() == list(range(len(documents) + 1))
    assert dataset.items.tolist() == sum(documents, [])


@pytest.mark.parametrize("number", [-1, 2])
def test_an_item_that_is_not_there(tmp_path: Path, number: int) -> None:
    write(tmp_path / "x", [[1], [2]])
    with pytest.raises(IndexError):
        IndexedDataset(tmp_path / "x")[number]


@pytest.mark.parametrize(
    ("document", "dtype"), [([], "int32"), ([[1]], "int32"), ([256], "uint8"), ([-1], "uint8"), ([2**31], "int32")]
)
def test_what_does_not_fit_is_refused(tmp_path: Path, document: list[int], dtype: str) -> None:
    with pytest.raises(RecipeRefused, match="does not fit"):
        write(tmp_path / "x", [document], dtype)
    assert not idx_path(tmp_path / "x").exists()


def test_a_dtype_without_a_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="no code"):
        IndexedDatasetWriter(tmp_path / "x", "float16")


HEAD = "<9sQBQQ"


def _patched(data: bytes, offset: int, layout: str, value: int) -> bytes:
    size = struct.calcsize(layout)
    return data[:offset] + struct.pack(layout, value) + data[offset + size :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"X" + data[1:],
        lambda data: _patched(data, 9, "<Q", 2),  # version
        lambda data: _patched(data, 17, "<B", 9),  # dtype code
        lambda data: _patched(data, 17, "<B", 5),  # another dtype: the size of the items contradicts it
        lambda data: _patched(data, 18, "<Q", 2**60),  # sequences
        lambda data: _patched(data, 26, "<Q", 0),  # marks
        lambda data: _patched(data, 34, "<i", -3),  # a length
        lambda data: _patched(data, 34, "<i", 0),
        lambda data: _patched(data, 34 + 8, "<q", 4),  # an offset
        lambda data: _patched(data, 34 + 24, "<q", 1),  # first mark
        lambda data: _patched(data, 34 + 24 + 16, "<q", 3),  # last mark
        lambda data: _patched(data, 34 + 24 + 8, "<q", 0),  # marks do not rise
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "x", [[1, 2, 3], [4]])
    path = idx_path(tmp_path / "x")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RecipeRefused, match="damaged"):
        IndexedDataset(tmp_path / "x")


def test_missing_and_cut_items_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4]])
    items = bin_path(tmp_path / "x")
    items.write_bytes(items.read_bytes()[:-4])
    with pytest.raises(RecipeRefused, match="damaged"):
        IndexedDataset(tmp_path / "x")
    items.unlink()
    with pytest.raises(RecipeRefused, match="damaged"):
        IndexedDataset(tmp_path / "x")


def test_an_interrupted_writer_leaves_no_index(tmp_path: Path) -> None:
    def interrupted() -> None:
        with IndexedDatasetWriter(tmp_path / "x", "int32") as writer:
            writer.add_document([1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(RecipeRefused, match="damaged"):
        IndexedDataset(tmp_path / "x")
