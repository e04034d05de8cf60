"""Our files, read by Megatron's own reader and written by its own builder; needs the extra `megatron`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes.data.assembly import Assembler, Surroundings, arrays_of
from recipes.data.conversation import Exchange, Frame, HarmonyRenderer
from recipes.data.harmony import HarmonyTokenizer
from recipes.data.megatron_dataset import IndexedDatasetWriter, bin_path, idx_path
from recipes.data.synth_sample import sample_row
from recipes.data.truncation import Limits

ARRAYS = (("tokens", np.int32), ("lossmask", np.uint8), ("span", np.uint8))


@pytest.fixture(scope="module")
def megatron() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses packages that only training needs
        return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.fixture(scope="module")
def documents(assets: Path, harmony: HarmonyTokenizer) -> list[tuple[np.ndarray, ...]]:
    renderer = HarmonyRenderer(assets, Frame("You are a test.", "High", "2026-01-01", "2024-06", "Answer."))
    assembler = Assembler(harmony, Surroundings.of(renderer, harmony), Limits(140, 4, 4))
    found = []
    for number in range(60):
        row = sample_row(number)
        exchange = Exchange(row["query"], row["synthetic_reasoning"], row["synthetic_answer"])
        document = assembler.assemble(exchange)
        assert document is not None
        found.append(arrays_of([document]).arrays)
    return found


@pytest.mark.parametrize("place", range(3))
def test_megatron_reads_what_was_written(
    megatron: Any, documents: list[tuple[np.ndarray, ...]], tmp_path: Path, place: int
) -> None:
    name, dtype = ARRAYS[place]
    prefix = tmp_path / f"shard_00_{name}"
    arrays = [document[place] for document in documents]
    with IndexedDatasetWriter(prefix, dtype) as writer:
        writer.add_document(arrays[0])
        writer.add_documents(np.concatenate(arrays[1:]), [array.size for array in arrays[1:]])
    for mmap in (True, False):
        dataset = megatron.IndexedDataset(str(prefix), mmap=mmap)
        assert len(dataset) == len(arrays)
        assert dataset.sequence_lengths.tolist() == [array.size for array in arrays]
        assert dataset.document_indices.tolist() == list(range(len(arrays) + 1))
        for number, array in enumerate(arrays):
            assert dataset[number].dtype == array.dtype
            assert np.array_equal(dataset[number], array)
        assert np.array_equal(dataset.get(5, offset=3, length=4), arrays[5][3:7])


@pytest.mark.parametrize("place", range(3))
def test_megatron_writes_the_same_bytes(
    megatron: Any, documents: list[tuple[np.ndarray, ...]], tmp_path: Path, place: int
) -> None:
    import torch

    name, dtype = ARRAYS[place]
    arrays = [document[place] for document in documents]
    ours, theirs = tmp_path / f"ours_{name}", tmp_path / f"theirs_{name}"
    with IndexedDatasetWriter(ours, dtype) as writer:
        writer.add_documents(np.concatenate(arrays), [array.size for array in arrays])
    builder = megatron.IndexedDatasetBuilder(str(bin_path(theirs)), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks NumPy for a copy in an old way
        for array in arrays:
            builder.add_document(torch.from_numpy(array), [array.size])
    builder.finalize(str(idx_path(theirs)))
    assert bin_path(ours).read_bytes() == bin_path(theirs).read_bytes()
    assert idx_path(ours).read_bytes() == idx_path(theirs).read_bytes()


def test_a_wrong_byte_is_noticed(megatron: Any, documents: list[tuple[np.ndarray, ...]], tmp_path: Path) -> None:
    """The negative control: the comparison above sees a single wrong item."""
    arrays = [document[0] for document in documents]
    with IndexedDatasetWriter(tmp_path / "x", np.int32) as writer:
        writer.add_documents(np.concatenate(arrays), [array.size for array in arrays])
    data = bytearray(bin_path(tmp_path / "x").read_bytes())
    data[len(data) // 2] ^= 1
    bin_path(tmp_path / "x").write_bytes(bytes(data))
    dataset = megatron.IndexedDataset(str(tmp_path / "x"))
    assert sum(not np.array_equal(dataset[number], array) for number, array in enumerate(arrays)) == 1
