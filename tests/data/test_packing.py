"""Best-fit packing: whole documents, each once, found again by a slow oracle; and the rows that come out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import FIELDS, draw, equal, write

from recipes.data import packing as packing_module
from recipes.data.batches import AlignedDataset, calibration_batches
from recipes.data.order import document_order, row_order
from recipes.data.packed_rows import NO_DOCUMENT, PAD_ID, packed_rows
from recipes.data.packing import BestFit, PackedDocuments, Piece, best_fit_decreasing, pieces_of
from recipes.model.stream import Stream

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any)
GOLDEN = [7, 3, 5, 12, 1, 2, 9, 4, 4, 6]
GOLDEN_ROW_OF = [2, 3, 3, 0, 0, 4, 1, 1, 3, 2]


REAL_BLOCK = packing_module.BLOCK_DOCUMENTS


@pytest.fixture(scope="module", autouse=True)
def _small_blocks() -> Iterator[None]:
    """Several blocks in an epoch of a few documents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "BLOCK_DOCUMENTS", 8)
        yield


def slow_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """The rule word by word, looking at every row for every item."""
    free: list[int] = []
    row_of = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        fitting = [row for row in range(len(free)) if free[row] >= sizes[item]]
        row = min(fitting, key=lambda row: (free[row], row), default=len(free))
        if row == len(free):
            free.append(capacity)
        free[row] -= sizes[item]
        row_of[item] = row
    return row_of


def realistic(count: int, *, seed: int = 0) -> np.ndarray:
    """Lengths of conversations: 5, 50 and 95 per cent lie below 546, 862 and 1,199 tokens, none above 1,982."""
    share = np.random.default_rng(seed).random(count)
    return np.interp(share, [0, 0.05, 0.5, 0.95, 1], [250, 546, 862, 1199, 1982]).astype(np.int64)


@given(capacity=st.integers(1, 50), data=st.data())
@settings(max_examples=200, deadline=None)
def test_it_is_best_fit_decreasing(capacity: int, data: Any) -> None:
    sizes = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    row_of = best_fit_decreasing(sizes, capacity=capacity)
    assert row_of.tolist() == slow_best_fit(sizes, capacity)
    assert np.bincount(row_of, weights=sizes).max(initial=0) <= capacity


def test_rows_of_a_small_case_are_the_same_for_ever() -> None:
    assert best_fit_decreasing(GOLDEN, capacity=13).tolist() == GOLDEN_ROW_OF
    packed = PackedDocuments(np.arange(100, 110), np.array(GOLDEN), row_tokens=13)
    assert [[piece.document - 100 for piece in packed.row(row)] for row in range(len(packed))] == [
        [3, 4], [6, 7], [0, 9], [2, 8, 1], [5]
    ]  # fmt: skip
    assert packed.tokens.tolist() == [13, 13, 13, 12, 2]
    best = BestFit(np.array(GOLDEN), row_tokens=13, seed=1)  # two blocks: 2 5 8 9 1 4 6 0, and 3 7
    assert [[piece.document for piece in best.row(row)] for row in range(7)] == [
        [0, 9], [2, 1, 5, 4], [6, 8], [7], [3], [0, 2], [3, 4]
    ]  # fmt: skip


def test_of_equal_items_the_earlier_and_of_equal_rows_the_older() -> None:
    assert best_fit_decreasing([5, 5, 2, 2, 2], capacity=7).tolist() == [0, 1, 0, 1, 2]
    assert best_fit_decreasing([4, 5, 2], capacity=7).tolist() == [1, 0, 0]  # not into the older, emptier one


@given(lengths=LENGTHS, capacity=st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_pieces_are_the_documents_and_only_long_ones_are_cut(lengths: list[int], capacity: int) -> None:
    numbers = np.arange(len(lengths)) + 7
    pieces = list(
        zip(*(part.tolist() for part in pieces_of(numbers, np.array(lengths), row_tokens=capacity)), strict=True)
    )
    want = [
        (number + 7, start, min(capacity, length - start))
        for number, length in enumerate(lengths)
        for start in range(0, length, capacity)
    ]
    assert pieces == want
    assert Counter(number for number, _, _ in pieces).keys() == {n + 7 for n, length in enumerate(lengths) if length}
    cut = sum(count > 1 for count in Counter(number for number, _, _ in pieces).values())
    assert BestFit(np.array(lengths), row_tokens=capacity, seed=0).documents_cut == cut


@given(lengths=LENGTHS, capacity=st.integers(1, 50), seed=st.integers(0, 2**64))
@settings(max_examples=60, deadline=None)
def test_every_epoch_has_every_piece_once(lengths: list[int], capacity: int, seed: int) -> None:
    best = BestFit(np.array(lengths), row_tokens=capacity, seed=seed)
    total, number = sum(lengths), 0
    parts = pieces_of(np.arange(len(lengths)), np.array(lengths), row_tokens=capacity)
    want = sorted(map(Piece, *(part.tolist() for part in parts)))
    for epoch in range(3):
        found: list[Piece] = []
        while best.tokens_before(number) < (epoch + 1) * total:
            row = best.row(number)
            assert 0 < sum(piece.size for piece in row) <= capacity
            assert best.tokens_before(number + 1) - best.tokens_before(number) == sum(piece.size for piece in row)
            found += row
            number += 1
        assert sorted(found) == want


@given(lengths=LENGTHS, capacity=st.integers(1, 50), numbers=st.lists(st.integers(0, 150), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_row_depends_on_its_number_alone(lengths: list[int], capacity: int, numbers: list[int]) -> None:
    """In whatever order rows are asked for, backwards too."""
    walked = BestFit(np.array(lengths), row_tokens=capacity, seed=3)
    rows = [walked.row(number) for number in range(max(numbers) + 1)]
    jumping = BestFit(np.array(lengths), row_tokens=capacity, seed=3)
    for number in numbers:
        assert jumping.row(number) == rows[number]
        assert jumping.tokens_before(number) == sum(piece.size for row in rows[:number] for piece in row)


def test_a_block_is_packed_when_it_is_needed_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    pack = BestFit._packed
    monkeypatch.setattr(BestFit, "_packed", lambda self, number: packed.append(number) or pack(self, number))
    best = BestFit(np.full(80, 5), row_tokens=10, seed=0)  # 4 rows a block, 10 blocks an epoch
    assert packed == []
    for number in range(4):
        best.row(number)
        best.tokens_before(number + 1)
    assert packed == [0]
    best.row(4)
    assert packed == [0, 1]
    fresh = BestFit(np.full(80, 5), row_tokens=10, seed=0)
    packed.clear()
    fresh.row(41)
    assert packed == list(range(11))  # the way to the first block of the second epoch, each block once


def test_rows_of_a_block_are_shuffled_by_seed_epoch_and_block() -> None:
    orders = {
        tuple(row_order(50, seed=seed, epoch=epoch, block=block).tolist())
        for seed in range(3) for epoch in range(3) for block in range(3)
    }  # fmt: skip
    assert len(orders) == 27
    assert tuple(document_order(50, seed=0, epoch=0)) not in orders
    monotone = np.sort(np.random.default_rng(0).integers(1, 100, 64))[::-1]
    best = BestFit(monotone, row_tokens=100, seed=0)
    longest = [best.row(number)[0].size for number in range(12)]
    assert longest != sorted(longest, reverse=True)


def test_the_fill_of_realistic_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "BLOCK_DOCUMENTS", REAL_BLOCK)
    best = BestFit(realistic(6 * REAL_BLOCK), row_tokens=2048, seed=0)
    assert best.documents_cut == 0
    assert 0.95 <= best.fill < 1
    first, last = (np.array([best.row(n)[0].size for n in range(start, start + 800)]) for start in (0, 900))
    assert abs(first.mean() - last.mean()) < 40  # tokens: long documents do not gather


@pytest.fixture
def documents() -> list[list[int]]:
    lengths = (3, 1, 7, 12, 2, 5, 4, 9, 30, 6)
    starts = np.cumsum((0, *lengths))
    return [list(range(100 + start, 100 + start + length)) for start, length in zip(starts, lengths, strict=False)]


@pytest.fixture
def dataset(tmp_path: Path, documents: list[list[int]]) -> AlignedDataset:
    write(tmp_path, documents)
    return AlignedDataset(tmp_path, "train")


def test_rows_hold_what_is_stored(dataset: AlignedDataset, documents: list[list[int]]) -> None:
    """Against a loop over single tokens: ids, masks and spans as stored; a piece keeps the label that was cut off."""
    T = 13
    best = BestFit(dataset.lengths, row_tokens=T, seed=5)
    for number, batch in enumerate(draw(dataset, 30, packing="best_fit", sequence_length=T, sequences=1)):
        want = []
        for serial, (document, start, size) in enumerate(best.row(number)):
            tokens, mask, span = dataset.document(document)
            for at in range(start, start + size):
                label = documents[document][at + 1] if at + 1 < len(tokens) else PAD_ID
                want.append((documents[document][at], label, int(mask[at]), int(span[at]), serial))
        want += [(PAD_ID, PAD_ID, 0, 0, NO_DOCUMENT)] * (T - len(want))
        found = zip(*(getattr(batch, name)[0].tolist() for name in FIELDS), strict=True)
        assert list(found) == want
        assert batch.tokens == sum(piece.size for piece in best.row(number))


def test_no_document_that_fits_is_ever_cut(dataset: AlignedDataset, documents: list[list[int]]) -> None:
    """And the negative control: the packings that slice do cut them, so this would be seen."""
    T, firsts = 13, {tokens[0] for tokens in documents}
    assert packed_rows(dataset, "best_fit", sequence_length=T, seed=5).documents_cut == 1

    def beginnings(packing: Any) -> set[int]:
        batches = draw(dataset, 40, packing=packing, sequence_length=T, sequences=1)
        return {int(batch.ids_BT[0, 0]) for batch in batches}

    of_the_cut_one = {documents[8][T], documents[8][2 * T]}
    assert beginnings("best_fit") <= firsts | of_the_cut_one
    assert not beginnings("document_bounded") <= firsts | of_the_cut_one


def test_nothing_attends_across_documents_or_to_padding(dataset: AlignedDataset) -> None:
    """What a query sees is exactly the earlier tokens of its own document; whole_row is the negative control."""
    for packing in ("best_fit", "whole_row"):
        batch = draw(dataset, 1, packing=packing, sequence_length=13, sequences=8)[0]
        state = Stream.of(batch.documents_BT)
        at_T = torch.arange(13)
        visible = state.bias(("all", None), at_T, at_T, None)[:, 0, 0] == 0
        ids = batch.ids_BT
        is_padding = ids == PAD_ID
        earlier = at_T[:, None] >= at_T
        # Ids of a document are consecutive numbers, those of two documents are not: the token says where it belongs.
        origin = torch.where(is_padding, -1, torch.searchsorted(torch.tensor(starts(dataset)), ids, right=True))
        same = origin[:, :, None] == origin[:, None, :]
        assert torch.equal(visible, same & earlier) == (packing == "best_fit")
        assert bool(is_padding.any()) == (packing == "best_fit")


def starts(dataset: AlignedDataset) -> list[int]:
    return sorted(int(dataset.document(number)[0][0]) for number in range(len(dataset)))


def test_two_readers_give_the_same_rows(dataset: AlignedDataset) -> None:
    options: Any = {"packing": "best_fit", "sequence_length": 13}
    whole = draw(dataset, 20, **options)
    assert all(equal(one, other) for one, other in zip(whole, draw(dataset, 20, **options), strict=True))
    other_seed = draw(dataset, 20, seed=6, **options)
    assert not all(equal(one, other) for one, other in zip(whole, other_seed, strict=True))


def test_calibration_takes_the_first_documents_whole(dataset: AlignedDataset, documents: list[list[int]]) -> None:
    batches = calibration_batches(dataset, sequence_length=13, tokens=12, packing="best_fit")
    seen = sorted(
        token for batch in batches for token in batch.ids_BT[batch.documents_BT != NO_DOCUMENT].flatten().tolist()
    )
    assert seen == sum(documents[:4], [])  # 3 + 1 + 7 tokens do not reach 12; the fourth is taken whole
    assert sum(batch.tokens for batch in batches) == 23
    exact = calibration_batches(dataset, sequence_length=13, tokens=11, packing="best_fit")
    assert sum(batch.tokens for batch in exact) == 11
    everything = calibration_batches(dataset, sequence_length=13, tokens=dataset.tokens, packing="best_fit")
    assert sum(batch.tokens for batch in everything) == dataset.tokens


def test_the_slicing_packings_have_no_padding(dataset: AlignedDataset) -> None:
    for packing in ("document_bounded", "whole_row"):
        rows = packed_rows(dataset, packing, sequence_length=13, seed=0)
        assert (rows.fill, rows.documents_cut, rows.tokens_before(7)) == (1.0, None, 91)
    for batch in draw(dataset, 9, sequence_length=13):
        assert not (batch.documents_BT == NO_DOCUMENT).any()
