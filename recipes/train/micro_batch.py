"""One micro-batch as the device wants it: what the host can know is decided on the host.

Place in the path: batches -> **micro_batch** -> loop. Which tokens count, and whether their labels are ids at all, is
found on the CPU, where the batch lies; the device gets indices, and is never asked.

Legend: B rows, T tokens, N counted tokens, M tokens in all.

Invariants: selecting rows is an index selection, its gradient a copy to places that are all different, so nothing is
added up by atomics.

Example:
    part = MicroBatch.of(batch, device)
    rows_NH = part.counted(hidden_BTH)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Full, Queue
from typing import Any, TypeVar

import torch
from torch import Tensor

from recipes.data.batches import Batch
from recipes.model.stream import sent
from recipes.train.losses import VALID_VOCAB, require_labels

_T = TypeVar("_T")
_PATIENCE_SECONDS = 0.2  # between two looks at whether the reader is still there


@dataclass(frozen=True)
class MicroBatch:
    """Ids on the device, documents on the CPU, and the counted tokens' labels and spans on the device."""

    ids_BT: Tensor
    documents_BT: Tensor
    kept_N: Tensor | None  # int64 places of the counted tokens; None: all of them count
    labels_N: Tensor
    span_N: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device, *, valid_vocab: int = VALID_VOCAB) -> MicroBatch:
        """Hold the labels that count against the tokenizer's ids, and send what is needed.

        Raises:  RecipeRefused: a label outside of the valid ids.
        """
        kept_M = (batch.loss_mask_BT > 0).flatten()
        kept_N = None if bool(kept_M.all()) else kept_M.nonzero()[:, 0]
        labels_N, span_N = (_selected(x.flatten(), kept_N) for x in (batch.labels_BT, batch.span_BT))
        require_labels(labels_N, valid_vocab)
        return cls(
            sent(batch.ids_BT, device),
            batch.documents_BT,
            None if kept_N is None else sent(kept_N, device),
            sent(labels_N, device),
            sent(span_N, device),
        )

    def counted(self, hidden_BTH: Tensor) -> Tensor:
        """The hidden states whose label counts, [N, H]."""
        rows_MH = hidden_BTH.flatten(0, 1)
        if self.kept_N is None:
            return rows_MH
        chosen: Tensor = _Chosen.apply(rows_MH, self.kept_N)  # type: ignore[no-untyped-call]
        return chosen


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MH: Tensor, kept_N: Tensor) -> Tensor:
        ctx.save_for_backward(kept_N)
        ctx.shape = rows_MH.shape
        return rows_MH.index_select(0, kept_N)

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None]:
        (kept_N,) = ctx.saved_tensors
        return grad_NH.new_zeros(ctx.shape).index_copy_(0, kept_N, grad_NH), None


def _selected(x_M: Tensor, kept_N: Tensor | None) -> Tensor:
    return x_M if kept_N is None else x_M[kept_N]


def read_ahead(items: Iterator[_T], *, depth: int = 2) -> Iterator[_T]:
    """The same items in the same order, up to `depth` of them made by a thread before they are asked for.

    What making one raises is raised in its place; the thread ends with the reader.
    """
    queue: Queue[tuple[bool, Any]] = Queue(depth)
    is_over = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not is_over.is_set():
            try:
                queue.put(entry, timeout=_PATIENCE_SECONDS)
            except Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:  # the reader raises it
            put((False, error))

    maker = threading.Thread(target=make, name="read-ahead", daemon=True)
    maker.start()
    try:
        while True:
            is_item, value = queue.get()
            if is_item:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        is_over.set()
        maker.join()
