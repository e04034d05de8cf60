"""Training batches out of aligned datasets: packed rows, document borders, exact position.

Place in the path: indexed datasets -> packed_rows -> **batches** -> training, calibration. Three datasets describe the
same documents: tokens, loss mask and span; the latter two are stored shifted by one: index t speaks of the label after
it.

Invariants: step s holds rows s * B to (s + 1) * B - 1 of the packing's endless sequence, and a row follows from its
number and the seed. A process of several takes its share of the rows of the same step, so that the order does not
depend on how many there are, and a run resumes by its step number alone. No label that counts crosses a document: the
stored mask is 0 there. The packing is the caller's choice; it stands in its params and so in the key.

Shapes: B rows, T tokens a row.

Example:
    dataset = AlignedDataset(Path("healing_text"), "train")
    rows = packed_rows(dataset, "document_bounded", sequence_length=256, seed=0)
    for batch in packed_batches(rows, sequences=4, start_step=0):
        loss = model(batch.ids_BT, batch.documents_BT)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from recipes.data.encodings import O200K_HARMONY
from recipes.data.megatron_dataset import IndexedDataset
from recipes.data.packed_rows import NO_DOCUMENT, PackedRows, SlicedStream, filled_row, require_sizes
from recipes.data.packing import PackedDocuments, Packing
from vpstore.errors import RecipeRefused

_TOKENS, _MASK, _SPAN = "_tokens", "_lossmask", "_span"
# Of each of the three: what it holds, its dtype, and the largest value that means something.
_ARRAYS = (
    ("ids", np.dtype("<i4"), O200K_HARMONY.n_vocab - 1),
    ("loss mask values", np.dtype("u1"), 1),
    ("spans", np.dtype("u1"), 2),
)
_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Batch:
    """Rows of one step, on the CPU."""

    ids_BT: torch.Tensor  # int64
    labels_BT: torch.Tensor  # int64: the id that follows
    loss_mask_BT: torch.Tensor  # float32: 1 where the label counts
    span_BT: torch.Tensor  # int64: of the label; 1 analysis, 2 final, 0 else
    documents_BT: torch.Tensor  # int64: 0, 1, 2, … within the row, -1 padding; attention stays inside one number

    @property
    def tokens(self) -> int:
        """Number of tokens, padding left out."""
        return int((self.documents_BT != NO_DOCUMENT).sum())

    def share(self, rank: int, world: int) -> Batch:
        """The rows that process `rank` of `world` takes: consecutive ones, so that all shares in order are the batch.

        Raises:  RecipeRefused: rows that do not divide by the number of processes, or no such process.
        """
        rows = self.ids_BT.shape[0]
        if world < 1 or rows % world or not 0 <= rank < world:
            raise RecipeRefused(
                "a batch cannot be shared out so",
                where=f"process {rank} of {world}",
                expected="a number of processes that divides the rows, and a process from 0 below it",
                found=f"{rows} rows",
                next_step="change the rows of the global batch, or the number of processes",
            )
        each = rows // world
        return self._rows(slice(rank * each, (rank + 1) * each))

    def cut(self, rows: int) -> Iterator[Batch]:
        """Micro-batches of `rows` rows, in order; the last one may have fewer."""
        for start in range(0, self.ids_BT.shape[0], rows):
            yield self._rows(slice(start, start + rows))

    def _rows(self, part: slice) -> Batch:
        return Batch(*(getattr(self, field.name)[part] for field in fields(self)))


class AlignedDataset:
    """Tokens, loss mask and span of one split, over all its shards in the order of their names.

    A shard is three indexed datasets `<shard>_tokens`, `<shard>_lossmask`, `<shard>_span`.
    """

    def __init__(self, directory: Path, split: Literal["train", "valid"]) -> None:
        self.where = f"{directory.name}/{split}"
        stems = _stems(directory / split)
        if not stems:
            raise RecipeRefused(
                "a data set has no shards",
                where=self.where,
                expected="at least one <shard>_tokens.idx",
                next_step="build the data set first",
            )
        self.prefixes = [f"{split}/{stem}" for stem in stems]  # of the shards, relative to the data set
        self._shards = [_aligned(directory / split, stem) for stem in stems]
        self.lengths: npt.NDArray[np.int64] = np.concatenate([shard[0].lengths for shard in self._shards]).astype(
            np.int64
        )
        self._shard_starts = np.cumsum([0] + [len(shard[0]) for shard in self._shards])

    def __len__(self) -> int:
        """Number of documents."""
        return int(self.lengths.size)

    @property
    def tokens(self) -> int:
        """Number of tokens of one epoch."""
        return int(self.lengths.sum())

    def document(self, number: int) -> tuple[_Array, _Array, _Array]:
        """Tokens, loss mask and span of one document; the latter two speak of the label, one token ahead.

        Raises:  RecipeRefused: a value that means nothing, such as an id outside of the vocabulary.
        """
        shard = int(np.searchsorted(self._shard_starts, number, side="right")) - 1
        place = number - int(self._shard_starts[shard])
        found = []
        for part, (name, _, most) in zip(self._shards[shard], _ARRAYS, strict=True):
            values = part[place]
            if values.size and not (values.min() >= 0 and values.max() <= most):
                raise RecipeRefused(
                    "a data set holds a value that means nothing",
                    where=f"{self.where}/{part.prefix.name}, document {place}",
                    expected=f"{name} from 0 to {most}",
                    found=f"{values.min()} to {values.max()}",
                    next_step="vpstore verify it, or build it again",
                )
            found.append(values)
        return found[0], found[1], found[2]


def _stems(folder: Path) -> list[str]:
    """Names of the shards, in order, from any file of one: a shard that lacks a file is then found to lack it."""
    ends = [f"{suffix}.{kind}" for suffix in (_TOKENS, _MASK, _SPAN) for kind in ("idx", "bin")]
    return sorted({path.name.removesuffix(end) for end in ends for path in folder.glob(f"*{end}")})


def _aligned(folder: Path, stem: str) -> tuple[IndexedDataset, IndexedDataset, IndexedDataset]:
    tokens, mask, span = (IndexedDataset(folder / (stem + part)) for part in (_TOKENS, _MASK, _SPAN))
    for one, (_, dtype, _) in zip((tokens, mask, span), _ARRAYS, strict=True):
        if one.dtype != dtype:
            raise RecipeRefused(
                "an array of a data set has another dtype",
                where=f"{folder.name}/{one.prefix.name}",
                expected=str(dtype),
                found=str(one.dtype),
                next_step="build the data set again",
            )
    for other in (mask, span):
        for what in ("lengths", "documents"):
            if not np.array_equal(getattr(tokens, what), getattr(other, what)):
                raise RecipeRefused(
                    "two arrays of a data set are not aligned",
                    where=f"{folder.name}/{other.prefix.name}",
                    expected=f"the same {what} as {tokens.prefix.name}",
                    found=f"{len(other)} sequences against {len(tokens)}",
                    next_step="build the data set again",
                )
    return tokens, mask, span


def packed_batches(rows: PackedRows, *, sequences: int, start_step: int) -> Iterator[Batch]:
    """Batches without end, from `start_step` on.

    Args:    sequences: B. start_step: number of batches that are skipped; equal to having drawn and dropped them.
    Raises:  RecipeRefused: B is below 1.
    """
    if sequences < 1:
        raise RecipeRefused("no batch can be made", where="a batch", expected="at least one row", found=str(sequences))
    for step in count(start_step):
        first = step * sequences
        yield _collate([rows.row(number) for number in range(first, first + sequences)])


def calibration_batches(
    dataset: AlignedDataset, *, sequence_length: int, tokens: int, packing: Packing = "document_bounded"
) -> list[Batch]:
    """The first `tokens` tokens of the data set in its own order, one row a batch.

    Sliced, the last row may be shorter. Packed by best fit, the last document is taken whole, so there may be more.
    Raises:  RecipeRefused: the data set holds fewer tokens, or a size is below 1.
    """
    require_sizes(dataset, sequence_length, tokens)
    if dataset.tokens < tokens:
        raise RecipeRefused(
            "the calibration data is too small",
            where=dataset.where,
            expected=f"at least {tokens} tokens",
            found=f"{dataset.tokens} tokens",
            next_step="lower the number of calibration tokens, or raise the data set's token budget",
        )
    if packing == "best_fit":
        first = np.arange(int(np.searchsorted(np.cumsum(dataset.lengths), tokens)) + 1)
        packed = PackedDocuments(first, dataset.lengths[first], row_tokens=sequence_length)
        rows = [filled_row(dataset, packed.row(row), sequence_length=sequence_length) for row in range(len(packed))]
    else:
        stream = SlicedStream(dataset, packing, sequence_length=sequence_length, seed=None)
        starts = range(0, tokens, sequence_length)
        rows = [stream.window(start, min(sequence_length, tokens - start)) for start in starts]
    return [_collate([row]) for row in rows]


def _collate(rows: list[_Array]) -> Batch:
    ids, labels, mask, span, documents = torch.from_numpy(np.stack(rows, axis=1)).unbind(0)
    return Batch(ids, labels, mask.to(torch.float32), span, documents)
