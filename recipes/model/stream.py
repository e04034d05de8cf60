"""What travels beside the residual stream: positions, document bounds, rotary tables, first-layer values, statistics.

Place in the path: recipe -> **model**. `Student.start` makes one for a batch; every layer reads it, layer 1 writes its
values into it, MoE layers leave their routing statistics when `collect` is on. It is explicit, so that surgery can run
one layer alone.

Invariants: a document is a maximal run of equal ids inside a row; positions restart at each; a token sees only its own
run. A negative id is padding: a run like any other, of which routers keep no count. Score biases hold 0 or the ALiBi
term where a key is visible and -inf where it is not, in at least float32.

Shapes: B batch, T tokens, K KV heads, G query heads a KV head, S keys, D head dimension.

Example:
    >>> Stream.of(torch.tensor([[7, 7, 9, 9, 9]])).positions_BT
    tensor([[0, 1, 0, 1, 2]])
"""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.model.cache import Cache
from recipes.model.flex import Masks
from recipes.model.grape import RotaryTables
from recipes.model.routing import Routing


class Stream:
    """State of one forward pass; the batch dimension of what does not depend on the row is 1.

    A plain class: libraries that look through arguments for tensors copy dataclasses, and layers write into this one.
    """

    def __init__(
        self,
        positions_BT: Tensor,
        run_BT: Tensor | None = None,
        kept_BT: Tensor | None = None,
        *,
        collect: bool = False,
        cache: Cache | None = None,
    ) -> None:
        self.positions_BT = positions_BT  # int64, within the document
        self.run_BT = run_BT  # int64, number of the document within its row; None: one document a row
        self.kept_BT = kept_BT  # bool, False at padding; None: there is none
        self.rotary: RotaryTables | None = None
        self.v1_BTKD: Tensor | None = None  # layer 1's values, before attention
        self.collect = collect
        self.routing: dict[int, Routing] = {}  # by layer number
        self.masks: Masks | None = None  # of FlexAttention, in training on a GPU; None: attention goes by tiles
        self.is_grouped = False  # experts go by grouped products
        self.cache = cache  # of the tokens before, where rows grow
        self.shared: dict[tuple[object, ...], Tensor] = {}  # score biases, reused across layers

    @classmethod
    def of(
        cls,
        documents_BT: Tensor,
        *,
        device: torch.device | None = None,
        collect: bool = False,
        marks_padding: bool = False,
    ) -> Stream:
        """State of a batch whose rows hold several documents each, and padding if an id is negative.

        Args:    documents_BT: best on the CPU, where what it holds can be asked without waiting for a GPU.
                 device: where the state lies; that of the documents if none is named. marks_padding: have `kept_BT`
                 also where there is no padding, so that all batches look alike.
        """
        where = device or documents_BT.device
        run_BT, kept_BT = document_runs(documents_BT), documents_BT >= 0
        marks_padding = marks_padding or not bool(kept_BT.all())
        return cls(
            sent(positions_within(run_BT), where),
            sent(run_BT, where),
            sent(kept_BT, where) if marks_padding else None,
            collect=collect,
        )

    @classmethod
    def of_rows(cls, tokens: int, *, device: torch.device, collect: bool = False, cache: Cache | None = None) -> Stream:
        """State of a batch where each row is one document; of its next token alone, if the cache has been filled."""
        if cache is not None and cache.is_filled:
            return cls(cache.lengths_B[:, None], cache=cache)
        return cls(torch.arange(tokens, device=device)[None], collect=collect, cache=cache)

    def note(self, number: int, routing: Routing | None) -> None:
        """Keep what layer `number` did, if it routes and the statistics are wanted."""
        if routing is not None:
            self.routing[number] = routing

    def bias(self, key: tuple[object, ...], rows_T: Tensor, keys_S: Tensor, slopes_KG: Tensor | None) -> Tensor:
        """Score bias of query indices `rows_T` over key indices `keys_S`, made once for each `key`.

        Args:    key: ends with the window, or None for no window.
        Returns: [B or 1, K or 1, G or 1, T, S].
        """
        if key not in self.shared:
            window = key[-1]
            visible = visible_keys(rows_T, keys_S, window=window if isinstance(window, int) else None)[None]
            if self.run_BT is not None:
                visible = visible & (self.run_BT[:, rows_T, None] == self.run_BT[:, None, keys_S])
            self.shared[key] = score_bias(visible, rows_T[:, None] - keys_S, slopes_KG)
        return self.shared[key]


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on a device; to a GPU from pinned memory, so that the host need not wait until the GPU comes to it."""
    is_far = device.type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if is_far else x.to(device)


def document_runs(documents_BT: Tensor) -> Tensor:
    """Number of the maximal run of equal ids that each token is in, from 0 in each row."""
    changed = torch.zeros_like(documents_BT, dtype=torch.int64)
    changed[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return changed.cumsum(-1)


def positions_within(run_BT: Tensor) -> Tensor:
    """Position of each token inside its run, from 0."""
    index_T = torch.arange(run_BT.shape[-1], device=run_BT.device)
    first = torch.ones_like(run_BT, dtype=torch.bool)
    first[:, 1:] = run_BT[:, 1:] != run_BT[:, :-1]
    starts_BT = torch.where(first, index_T, 0).cummax(-1).values
    return index_T - starts_BT


def visible_keys(rows_T: Tensor, keys_S: Tensor, *, window: int | None) -> Tensor:
    """Which keys a query may see by distance: not later, and with a window (which counts the query itself) near enough.

    Args:    rows_T, keys_S: indices in the row; both may have the same leading dimensions.
    Returns: bool [..., T, S]. Negative key indices are padding and never visible.
    """
    distance_TS = rows_T[..., :, None] - keys_S[..., None, :]
    visible_TS = (distance_TS >= 0) & (keys_S[..., None, :] >= 0)
    return visible_TS if window is None else visible_TS & (distance_TS < window)


def score_bias(visible_BTS: Tensor, distance_TS: Tensor, slopes_KG: Tensor | None) -> Tensor:
    """0, or -slope * distance, where visible; -inf elsewhere.

    Returns: [..., 1, 1, T, S], or [..., K, G, T, S] with slopes; float32.
    """
    hidden = torch.full((), float("-inf"), device=visible_BTS.device)
    seen = visible_BTS[..., None, None, :, :]
    if slopes_KG is None:
        return torch.where(seen, torch.zeros_like(hidden), hidden)
    return torch.where(seen, -slopes_KG[:, :, None, None] * distance_TS.clamp(min=0), hidden)
