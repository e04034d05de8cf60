"""Greedy continuation of prompts: the prompts in one pass, then one token a row and pass over what a cache keeps.

Place in the path: model + prompts -> **generation** -> ids. On a GPU the pass of one token is captured as a CUDA graph,
as its kernels take less time than launching them.

Invariants: of equal scores the lowest id wins; a row ends with the first of `stops`; rows do not see each other, and
those that have ended are let go when they are half of the batch. In float32 the ids are those of whole passes over ever
longer rows, but for scores that are equal to the last bits.

Shapes: B batch, T tokens, H hidden, V vocabulary.

Example:
    [answer] = generate(model, [[200006, 1428]], Limits(max_new_tokens=64, stops=(200002, 200012)))
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.model.cache import Cache
from recipes.model.precision import REFERENCE, Numerics
from recipes.model.stream import Stream
from recipes.model.transformer import Student

# Rows that share a pass; on a GPU a pass costs about the same for few and for many.
_ROWS = {"cpu": 16}
_ROWS_ELSEWHERE = 64
# Passes between two looks at what they gave: to look is to wait for the device.
_PASSES = {"cpu": 1}
_PASSES_ELSEWHERE = 16


class Limits(NamedTuple):
    """Where an answer ends, and what it may hold."""

    max_new_tokens: int
    stops: Collection[int] = ()  # an answer ends with the first of them
    valid_vocab: int | None = None  # ids from here on are padding and never said


@torch.no_grad()
def generate(
    model: Student, prompts: Sequence[Sequence[int]], limits: Limits, *, numerics: Numerics = REFERENCE
) -> list[list[int]]:
    """What the model says to each prompt, up to and including the first stop.

    Args:    prompts: ids; an empty one gets no answer.
             numerics: with `is_grouped` a model with experts can be captured, too; fused passes are for training.
    """
    rows_at_once = _ROWS.get(model.head_weight.device.type, _ROWS_ELSEWHERE)
    asked = [number for number, prompt in enumerate(prompts) if len(prompt)]
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(asked) if limits.max_new_tokens else 0, rows_at_once):
        part = asked[start : start + rows_at_once]
        batch = _Batch(model, [prompts[number] for number in part], limits, numerics)
        for number, answer in zip(part, batch.answers(), strict=True):
            answers[number] = answer
    return answers


class _Batch:
    """Rows that are continued together."""

    def __init__(self, model: Student, prompts: Sequence[Sequence[int]], limits: Limits, numerics: Numerics) -> None:
        self.model, self.limits, self.numerics = model, limits, numerics
        self.device = model.head_weight.device
        asks_host = model.config.moe is not None and not numerics.is_grouped  # how many rows each expert has
        self.can_be_captured = self.device.type == "cuda" and not asks_host
        head_VH = model.head_weight[: limits.valid_vocab]
        self.head_VH = head_VH.to(numerics.dtype or model.model.embed_tokens.weight.dtype)
        lengths = [len(prompt) for prompt in prompts]
        self.cache = Cache(torch.tensor(lengths, device=self.device), places=max(lengths) + limits.max_new_tokens)
        ids_BT = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in zip(ids_BT, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        hidden_BTH = self._hidden(ids_BT.to(self.device))
        self.cache.is_filled = True
        rows_B = torch.arange(len(prompts), device=self.device)
        self.last_B = self._best(hidden_BTH[rows_B, self.cache.lengths_B - 1])  # the newest id of each row
        self._graph: torch.cuda.CUDAGraph | None = None

    def answers(self) -> list[list[int]]:
        """The continuations, in the order of the prompts."""
        found: list[list[int]] = [[] for _ in range(len(self.last_B))]
        rows = list(range(len(found)))  # of the prompts, that are still in the batch
        ended: set[int] = set()
        passes = _PASSES.get(self.device.type, _PASSES_ELSEWHERE)
        said = [self.last_B.clone()]
        while True:
            for ids in torch.stack(said).tolist():
                for row, token in zip(rows, ids, strict=True):
                    if row not in ended:
                        found[row].append(token)
                        if token in self.limits.stops or len(found[row]) == self.limits.max_new_tokens:
                            ended.add(row)
            if len(ended) == len(found):
                return found
            kept = [place for place, row in enumerate(rows) if row not in ended]
            if 2 * len(kept) <= len(rows):
                self._keep(torch.tensor(kept, device=self.device))
                rows = [rows[place] for place in kept]
            left = self.limits.max_new_tokens - max(len(found[row]) for row in rows)
            with _places_apart():
                said = [self._next() for _ in range(min(passes, left))]

    def _next(self) -> Tensor:
        """One token more in each row: [B]."""
        if not self.can_be_captured:
            self._step()
        else:
            if self._graph is None:
                self._graph = self._captured()
            self._graph.replay()
        return self.last_B.clone()

    def _step(self) -> None:
        hidden_B1H = self._hidden(self.last_B[:, None])
        self.cache.advance()
        self.last_B.copy_(self._best(hidden_B1H[:, 0]))

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The pass of one token; what it does on the way to being captured is undone."""
        last_B, lengths_B = self.last_B.clone(), self.cache.lengths_B.clone()
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # once as it stands: libraries make their workspaces ready
            self._step()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.last_B.copy_(last_B)
        self.cache.lengths_B.copy_(lengths_B)
        return graph

    def _keep(self, rows_R: Tensor) -> None:
        self.cache.keep(rows_R)
        self.last_B, self._graph = self.last_B[rows_R], None

    def _hidden(self, ids_BT: Tensor) -> Tensor:
        state = Stream.of_rows(ids_BT.shape[1], device=self.device, cache=self.cache)
        return self.model.hidden_of(ids_BT, state, self.numerics)

    def _best(self, hidden_BH: Tensor) -> Tensor:
        return F.linear(hidden_BH.to(self.head_VH.dtype), self.head_VH).argmax(-1)


@contextmanager
def _places_apart() -> Iterator[None]:
    """Plain kernels for writing into the cache: all places differ, so the order of writing decides nothing."""
    is_asked = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_asked)
