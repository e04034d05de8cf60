from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.batches import AlignedDataset, Batch, calibration_batches, packed_batches
from recipes.data.megatron_dataset import IndexedDatasetWriter
from recipes.data.order import document_order
from recipes.data.packed_rows import packed_rows
from recipes.data.packing import Packing
from vpstore.errors import RecipeRefused

GOLDEN_ORDER = [7, 5, 6, 1, 4, 3, 0, 2]
FIELDS = ("ids_BT", "labels_BT", "loss_mask_BT", "span_BT", "documents_BT")


def write(folder: Path, documents: list[list[int]], stem: str = "text") -> None:
    """Loss mask: 1 where the next token is in the same document and even; span: the next token modulo 3."""
    arrays = {"tokens": "int32", "lossmask": "uint8", "span": "uint8"}
    for name, dtype in arrays.items():
        with IndexedDatasetWriter(folder / "train" / f"{stem}_{name}", dtype) as writer:
            for tokens in documents:
                following = [*tokens[1:], None]
                masks = [0 if token is None else int(token % 2 == 0) for token in following]
                spans = [0 if token is None else token % 3 for token in following]
                writer.add_document({"tokens": tokens, "lossmask": masks, "span": spans}[name])


@pytest.fixture
def documents() -> list[list[int]]:
    lengths = (3, 1, 7, 12, 2, 5)
    starts = np.cumsum((0, *lengths))
    return [list(range(100 + start, 100 + start + length)) for start, length in zip(starts, lengths, strict=False)]


@pytest.fixture
def dataset(tmp_path: Path, documents: list[list[int]]) -> AlignedDataset:
    write(tmp_path, documents)
    return AlignedDataset(tmp_path, "train")


def draw(dataset: AlignedDataset, count: int, *, packing: Packing = "document_bounded", **changes: int) -> list[Batch]:
    settings = {"sequence_length": 4, "sequences": 2, "seed": 5, "start_step": 0, **changes}
    rows = packed_rows(dataset, packing, sequence_length=settings["sequence_length"], seed=settings["seed"])
    batches = packed_batches(rows, sequences=settings["sequences"], start_step=settings["start_step"])
    return list(islice(batches, count))


def equal(left: Batch, right: Batch) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in FIELDS)


def test_shapes_and_dtypes(dataset: AlignedDataset) -> None:
    batch = draw(dataset, 1, sequence_length=8, sequences=3)[0]
    assert all(getattr(batch, name).shape == (3, 8) for name in FIELDS)
    assert batch.loss_mask_BT.dtype == torch.float32
    assert {getattr(batch, name).dtype for name in FIELDS if name != "loss_mask_BT"} == {torch.int64}


def test_rows_are_the_stream_of_shuffled_documents(dataset: AlignedDataset, documents: list[list[int]]) -> None:
    """Against a slow loop over single tokens."""
    T, rows = 4, 40
    stream: list[tuple[int, int, int, int]] = []  # token, mask, span, serial number of the document
    serial = 0
    for epoch in range(10):
        for number in document_order(len(documents), seed=5, epoch=epoch):
            tokens = documents[number]
            for place, token in enumerate(tokens):
                label = tokens[place + 1] if place + 1 < len(tokens) else None
                mask, span = (0, 0) if label is None else (int(label % 2 == 0), label % 3)
                stream.append((token, mask, span, serial))
            serial += 1
    got = [batch for batch in draw(dataset, rows // 2)]
    for row in range(rows):
        batch, place = got[row // 2], row % 2
        window = stream[row * T : row * T + T + 1]
        assert batch.ids_BT[place].tolist() == [entry[0] for entry in window[:-1]]
        assert batch.labels_BT[place].tolist() == [entry[0] for entry in window[1:]]
        assert batch.loss_mask_BT[place].tolist() == [entry[1] for entry in window[:-1]]
        assert batch.span_BT[place].tolist() == [entry[2] for entry in window[:-1]]
        assert batch.documents_BT[place].tolist() == [entry[3] - window[0][3] for entry in window[:-1]]


def test_no_label_that_counts_crosses_a_document(dataset: AlignedDataset) -> None:
    for batch in draw(dataset, 40):
        same = batch.documents_BT[:, :-1] == batch.documents_BT[:, 1:]
        assert not bool(((batch.loss_mask_BT[:, :-1] > 0) & ~same).any())
        counted = batch.loss_mask_BT > 0
        assert torch.equal(counted, counted & (batch.labels_BT == batch.ids_BT + 1) & (batch.labels_BT % 2 == 0))


PACKINGS = st.sampled_from(["document_bounded", "whole_row", "best_fit"])


@given(
    packing=PACKINGS,
    start=st.integers(0, 200),
    length=st.integers(1, 40),
    sequences=st.integers(1, 5),
    seed=st.integers(-5, 2**65),
)
@settings(max_examples=60, deadline=None)
def test_any_step_can_be_resumed_exactly(
    tmp_path_factory: pytest.TempPathFactory, packing: Packing, start: int, length: int, sequences: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("ds")
    write(folder, [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]])
    dataset = AlignedDataset(folder, "train")
    shape: Any = {"packing": packing, "sequence_length": length, "sequences": sequences, "seed": seed}
    whole = draw(dataset, start + 3, **shape)
    resumed = draw(AlignedDataset(folder, "train"), 3, **shape, start_step=start)
    assert all(equal(left, right) for left, right in zip(whole[start:], resumed, strict=True))


def test_rows_do_not_depend_on_how_many_a_step_takes(dataset: AlignedDataset) -> None:
    one = torch.cat([batch.ids_BT for batch in draw(dataset, 24, sequences=1)])
    many = torch.cat([batch.ids_BT for batch in draw(dataset, 4, sequences=6)])
    assert torch.equal(one, many)


def test_every_epoch_shows_every_token_once(dataset: AlignedDataset, documents: list[list[int]]) -> None:
    total = dataset.tokens
    assert total == sum(map(len, documents)) == 30
    batch = draw(dataset, 1, sequence_length=total, sequences=4)[0]
    rows = batch.ids_BT.tolist()
    assert all(sorted(row) == sorted(sum(documents, [])) for row in rows)
    assert len({tuple(row) for row in rows}) == 4


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(document_order(50, seed=seed, epoch=epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_order_is_the_same_for_ever() -> None:
    assert document_order(8, seed=1, epoch=2).tolist() == GOLDEN_ORDER


def test_calibration_takes_the_first_documents_in_order(dataset: AlignedDataset, documents: list[list[int]]) -> None:
    batches = calibration_batches(dataset, sequence_length=5, tokens=13)
    assert [tuple(batch.ids_BT.shape) for batch in batches] == [(1, 5), (1, 5), (1, 3)]
    flat = sum(documents, [])
    assert torch.cat([batch.ids_BT[0] for batch in batches]).tolist() == flat[:13]
    assert torch.cat([batch.labels_BT[0] for batch in batches]).tolist() == flat[1:14]
    assert batches[0].documents_BT.tolist() == [[0, 0, 0, 1, 2]]


def test_calibration_may_take_all_but_not_more(dataset: AlignedDataset) -> None:
    last = calibration_batches(dataset, sequence_length=30, tokens=30)[0]
    assert last.loss_mask_BT[0, -1] == 0
    with pytest.raises(RecipeRefused, match="too small"):
        calibration_batches(dataset, sequence_length=5, tokens=31)


def test_shards_follow_each_other_by_name(tmp_path: Path) -> None:
    write(tmp_path, [[5, 6]], "shard_01")
    write(tmp_path, [[1, 2], [3]], "shard_00")
    dataset = AlignedDataset(tmp_path, "train")
    assert [dataset.document(n)[0].tolist() for n in range(len(dataset))] == [[1, 2], [3], [5, 6]]


def test_arrays_that_are_not_aligned_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2], [3]])
    with IndexedDatasetWriter(tmp_path / "train/text_span", "uint8") as writer:
        writer.add_document([0])  # as many tokens and documents in all, in other places
        writer.add_document([0, 0])
    with pytest.raises(RecipeRefused, match="not aligned"):
        AlignedDataset(tmp_path, "train")


@given(
    packing=PACKINGS,
    rows=st.sampled_from([4, 8, 12]),
    length=st.integers(1, 24),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 30),
)
@settings(max_examples=15, deadline=None)
def test_one_two_and_four_processes_see_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, packing: Packing, rows: int, length: int, seed: int, start: int
) -> None:
    """Each process draws for itself, from the step alone; the union in the order of the ranks is the global batch."""
    folder = tmp_path_factory.mktemp("ds")
    write(folder, [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]])
    shape: Any = {"packing": packing, "sequence_length": length, "sequences": rows, "seed": seed, "start_step": start}
    whole = draw(AlignedDataset(folder, "train"), 3, **shape)
    for world in (1, 2, 4):
        ranks = [draw(AlignedDataset(folder, "train"), 3, **shape) for _ in range(world)]
        for step, batch in enumerate(whole):
            shares = [ranks[rank][step].share(rank, world) for rank in range(world)]
            assert all(share.ids_BT.shape == (rows // world, length) for share in shares)
            for name in FIELDS:
                union = torch.cat([getattr(share, name) for share in shares])
                assert torch.equal(union, getattr(batch, name)), (world, name)


def test_a_share_that_leaves_rows_out_is_refused(dataset: AlignedDataset) -> None:
    batch = draw(dataset, 1, sequences=6)[0]
    for rank, world in ((0, 4), (2, 2), (-1, 2), (0, 0)):
        with pytest.raises(RecipeRefused, match="shared out"):
            batch.share(rank, world)


def test_micro_batches_are_the_rows_in_order(dataset: AlignedDataset) -> None:
    batch = draw(dataset, 1, sequences=5)[0]
    parts = list(batch.cut(2))
    assert [part.ids_BT.shape[0] for part in parts] == [2, 2, 1]
    for name in FIELDS:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_the_two_slicing_packings_differ_in_documents_and_nothing_else(dataset: AlignedDataset) -> None:
    bounded, whole = (
        draw(dataset, 1, sequence_length=10, packing=packing)[0] for packing in ("document_bounded", "whole_row")
    )
    assert int(bounded.documents_BT.max()) > 0
    assert not whole.documents_BT.any()
    assert all(torch.equal(getattr(whole, name), getattr(bounded, name)) for name in FIELDS if name != "documents_BT")
    assert bounded.tokens == whole.tokens == bounded.ids_BT.numel()


@pytest.mark.parametrize("kind", ["idx", "bin"])
@pytest.mark.parametrize("part", ["tokens", "lossmask", "span"])
def test_a_shard_that_lacks_a_file_is_not_passed_over(tmp_path: Path, part: str, kind: str) -> None:
    for stem in ("shard_00", "shard_01"):
        write(tmp_path, [[1, 2], [3]], stem)
    (tmp_path / f"train/shard_01_{part}.{kind}").unlink()
    with pytest.raises(RecipeRefused, match="damaged") as refusal:
        AlignedDataset(tmp_path, "train")
    assert refusal.value.where.startswith(f"shard_01_{part}")


def test_a_shard_of_which_only_items_are_left_is_not_passed_over(tmp_path: Path) -> None:
    for stem in ("shard_00", "shard_01"):
        write(tmp_path, [[1, 2], [3]], stem)
    for path in (tmp_path / "train").glob("shard_01_*.idx"):
        path.unlink()
    with pytest.raises(RecipeRefused, match="damaged"):
        AlignedDataset(tmp_path, "train")


@pytest.mark.parametrize(
    ("part", "dtype"), [("tokens", "int64"), ("tokens", "uint16"), ("lossmask", "int32"), ("span", "int8")]
)
def test_another_dtype_is_refused(tmp_path: Path, part: str, dtype: str) -> None:
    """The same values: whoever maps the files by the stated dtypes would read others."""
    write(tmp_path, [[1, 2], [3]])
    with IndexedDatasetWriter(tmp_path / f"train/text_{part}", dtype) as writer:
        writer.add_document([1, 1])
        writer.add_document([0])
    with pytest.raises(RecipeRefused, match="another dtype") as refusal:
        AlignedDataset(tmp_path, "train")
    assert (refusal.value.where, refusal.value.found) == (f"train/text_{part}", dtype)


@pytest.mark.parametrize(
    ("part", "dtype", "least", "most"),
    [("tokens", "int32", 0, 201087), ("lossmask", "uint8", 0, 1), ("span", "uint8", 0, 2)],
)
def test_values_that_mean_nothing_are_refused_when_they_are_read(
    tmp_path: Path, part: str, dtype: str, least: int, most: int
) -> None:
    write(tmp_path, [[1, 2], [3, 4]])
    for value in (least, most, most + 1, *([-1] if part == "tokens" else [])):
        with IndexedDatasetWriter(tmp_path / f"train/text_{part}", dtype) as writer:
            writer.add_document([0, 0])
            writer.add_document([0, value])
        dataset = AlignedDataset(tmp_path, "train")
        dataset.document(0)
        if least <= value <= most:
            dataset.document(1)
            continue
        with pytest.raises(RecipeRefused, match="means nothing") as refusal:
            dataset.document(1)
        assert refusal.value.where == f"{tmp_path.name}/train/text_{part}, document 1"
        with pytest.raises(RecipeRefused, match="means nothing"):
            draw(dataset, 4)


@pytest.mark.parametrize("part", ["lossmask", "span"])
def test_a_last_length_that_differs_is_refused(tmp_path: Path, part: str) -> None:
    """The same number of sequences: only a comparison of every length sees it."""
    write(tmp_path, [[1, 2], [3, 4], [5, 6, 7]])
    with IndexedDatasetWriter(tmp_path / f"train/text_{part}", "uint8") as writer:
        for length in (2, 2, 4):
            writer.add_document([0] * length)
    with pytest.raises(RecipeRefused, match="not aligned") as refusal:
        AlignedDataset(tmp_path, "train")
    assert "lengths" in refusal.value.expected
    assert refusal.value.where == f"train/text_{part}"


@pytest.mark.parametrize("part", ["lossmask", "span"])
def test_a_document_index_that_differs_is_refused(tmp_path: Path, part: str) -> None:
    """The same lengths and the same number of documents; one boundary lies elsewhere."""
    write(tmp_path, [[1, 2], [3, 4], [5, 6], [7, 8]])
    marks = {"tokens": [0, 1, 2, 4], "lossmask": [0, 1, 2, 4], "span": [0, 1, 2, 4], part: [0, 1, 3, 4]}
    for name, documents in marks.items():
        path = tmp_path / f"train/text_{name}.idx"
        index = path.read_bytes()[: -8 * 5]
        head = bytearray(index[:34])
        head[26:34] = (4).to_bytes(8, "little")
        path.write_bytes(bytes(head) + index[34:] + np.asarray(documents, "<i8").tobytes())
    with pytest.raises(RecipeRefused, match="not aligned") as refusal:
        AlignedDataset(tmp_path, "train")
    assert "documents" in refusal.value.expected
    path.write_bytes(path.read_bytes()[:-32] + np.asarray(marks["tokens"], "<i8").tobytes())
    if part == "span":  # the control: with the boundary back in its place, the same files are taken
        assert len(AlignedDataset(tmp_path, "train")) == 4


def test_missing_data_and_empty_sizes_are_refused(tmp_path: Path, dataset: AlignedDataset) -> None:
    with pytest.raises(RecipeRefused, match="no shards"):
        AlignedDataset(tmp_path, "valid")
    with pytest.raises(RecipeRefused, match="no batch"):
        draw(dataset, 1, sequence_length=0)
    with pytest.raises(RecipeRefused, match="no batch"):
        draw(dataset, 1, sequences=0)
