"""Mixture of experts: sigmoid router with groups and a balancing bias, stacked experts, one shared expert.

Place in the path: recipe -> **model**; layers 2 and up of vpMoE. Output = shared(x) + sum_i p_i E_i(x), where p_i also
multiplies the expert's output bias; no token is dropped.

Invariants: the router computes in at least float32; experts are chosen on score + bias, gates use the score alone and
sum to `routed_scaling`; ties go to the lowest index; nothing is added up by atomics, so equal inputs give equal bits.
Zero fc2 and fc2 bias of all experts give a routed part of exactly 0.

Shapes: B batch, T tokens, N = B * T, H hidden, E experts, F expert width, J groups, k experts a token.

Example:
    >>> y_BTH = MixtureOfExperts(config, number=2)(x_BTH, state)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from recipes.model.config import MoeConfig, StudentConfig
from recipes.model.ffn import FeedForward, relu_squared
from recipes.model.grouped import Combine, Spread, dispatch, grouped_experts
from recipes.model.modules import INITIAL_STD, Projection
from recipes.model.precision import KeepsFloat32, wide
from recipes.model.routing import Routing, counts_of, routing_statistics, top_in_groups
from recipes.model.stream import Stream

# Experts of one padded product: on a GPU two hundred small products cost their launching. If all rows are one expert's,
# this many times their memory is taken.
_STACK = 32


class Router(Projection, KeepsFloat32):
    """Scores tokens, chooses experts, gives gates."""

    pinned: ClassVar[tuple[str, ...]] = ("expert_bias",)
    expert_bias: Tensor

    def __init__(self, hidden_size: int, moe: MoeConfig) -> None:
        super().__init__(hidden_size, moe.num_experts)
        self.moe = moe
        self.register_buffer("expert_bias", torch.zeros(moe.num_experts))

    def draw(self, generator: Generator | None = None) -> None:
        """Draw the weight, zero both biases."""
        super().draw(generator)
        if "expert_bias" in self._buffers:  # not yet there when torch's constructor draws
            self.expert_bias.zero_()

    def scores(self, x_NH: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and their sigmoids, [N, E], in at least float32."""
        logits_NE = F.linear(wide(x_NH), wide(self.weight), wide(self.bias))
        return logits_NE, torch.sigmoid(logits_NE)

    def choose(self, scores_NE: Tensor) -> Tensor:
        """Indices of each token's experts, best first, [N, k]; group-limited, on score + expert bias."""
        biased_NE = scores_NE.detach() + self.expert_bias
        return top_in_groups(biased_NE, groups=self.moe.num_groups, keep=self.moe.top_groups, k=self.moe.top_k)

    def gates(self, logits_NE: Tensor, expert_Nk: Tensor) -> Tensor:
        """routed_scaling * s_i / sum of the chosen s, [N, k].

        Computed as a softmax of log s, which is the same and cannot become 0 / 0 when all chosen scores underflow.
        """
        chosen_Nk = F.logsigmoid(logits_NE).gather(-1, expert_Nk)
        return self.moe.routed_scaling * torch.softmax(chosen_Nk, dim=-1)

    @torch.no_grad()
    def update_expert_bias(self, counts_E: Tensor) -> None:
        """One balancing step: e_i += rate * sign(mean load - load_i).

        Args:    counts_E: tokens per expert over the whole global batch of the optimizer step.
        """
        load_E = counts_E.to(self.expert_bias)
        self.expert_bias += self.moe.bias_update_rate * torch.sign(load_E.mean() - load_E)


class Experts(nn.Module):
    """All routed experts of a layer, stacked along the first dimension."""

    def __init__(self, hidden_size: int, moe: MoeConfig) -> None:
        super().__init__()
        count, width = moe.num_experts, moe.expert_hidden_size
        self.fc1_weight = nn.Parameter(torch.empty(count, width, hidden_size))
        self.fc1_bias = nn.Parameter(torch.empty(count, width))
        self.fc2_weight = nn.Parameter(torch.empty(count, hidden_size, width))
        self.fc2_bias = nn.Parameter(torch.empty(count, hidden_size))
        self.draw()

    def draw(self, generator: Generator | None = None) -> None:
        """Draw the weights, zero the biases."""
        if self.fc1_weight.is_meta:
            return
        for weight in (self.fc1_weight, self.fc2_weight):
            nn.init.normal_(weight, std=INITIAL_STD, generator=generator)
        for bias in (self.fc1_bias, self.fc2_bias):
            nn.init.zeros_(bias)

    @property
    def can_be_grouped(self) -> bool:
        """Whether both widths keep rows of two-byte numbers aligned to 16 bytes, as the grouped product wants them."""
        return all(width % 8 == 0 for width in self.fc1_weight.shape[1:])

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Stacks of both layers' weights and biases."""
        return self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias

    def forward(self, x_MH: Tensor, sizes: list[int]) -> Tensor:
        """Apply expert e to the e-th run of rows.

        Args:    x_MH: rows sorted by expert; sizes: rows of each expert, summing to M.
        Returns: [M, H].
        """
        # One unbind for all: indexing expert by expert would give each its own full-size gradient.
        parts = zip(torch.split(x_MH, sizes), *(stack.to(x_MH.dtype).unbind(0) for stack in self.weights), strict=True)
        outputs = [
            F.linear(relu_squared(F.linear(rows, w1_FH, b1_F)), w2_HF, b2_H)
            for rows, w1_FH, b1_F, w2_HF, b2_H in parts
            if rows.shape[0]
        ]
        return torch.cat(outputs)

    @torch.no_grad()
    def in_stacks(self, x_MH: Tensor, sizes: list[int]) -> Tensor:
        """As `forward`, some experts at a time, each one's rows padded to the most of them: few kernels, for a GPU."""
        outputs, start = [x_MH[:0]], 0
        for first in range(0, len(sizes), _STACK):
            counts = sizes[first : first + _STACK]
            w1_EFH, b1_EF, w2_EHF, b2_EH = (part[first : first + _STACK].to(x_MH.dtype) for part in self.weights)
            counts_E1 = torch.tensor(counts, device=x_MH.device)[:, None]
            is_row_ER = torch.arange(max(counts), device=x_MH.device) < counts_E1
            rows_ERH = x_MH.new_zeros(*is_row_ER.shape, x_MH.shape[-1])
            rows_ERH[is_row_ER] = x_MH[start : start + sum(counts)]
            inner_ERF = relu_squared(torch.baddbmm(b1_EF[:, None], rows_ERH, w1_EFH.mT))
            outputs.append(torch.baddbmm(b2_EH[:, None], inner_ERF, w2_EHF.mT)[is_row_ER])
            start += sum(counts)
        return torch.cat(outputs)


class MixtureOfExperts(nn.Module):
    """Router, routed experts and the shared expert of one layer."""

    def __init__(self, config: StudentConfig, moe: MoeConfig, *, number: int) -> None:
        super().__init__()
        self.moe, self.number = moe, number
        self.router = Router(config.hidden_size, moe)
        self.experts = Experts(config.hidden_size, moe)
        self.shared_expert = FeedForward(config.hidden_size, moe.shared_hidden_size)

    def forward(self, x_BTH: Tensor, state: Stream) -> Tensor:
        """shared(x) + routed(x); leaves a `Routing` in the state if it collects."""
        y_BTH, routing = self.mixture(x_BTH, state)
        state.note(self.number, routing)
        return y_BTH

    def mixture(self, x_BTH: Tensor, state: Stream) -> tuple[Tensor, Routing | None]:
        """shared(x) + routed(x), and the routing's statistics if the state collects them; leaves nothing there."""
        shared_BTH: Tensor = self.shared_expert(x_BTH)
        routed_BTH, routing = self.routed(x_BTH, state)
        return shared_BTH + routed_BTH, routing

    def routed(self, x_BTH: Tensor, state: Stream) -> tuple[Tensor, Routing | None]:
        """sum_i p_i E_i(x), summed in at least float32 in the order of choice; and the statistics."""
        x_NH = x_BTH.flatten(0, -2)
        logits_NE, scores_NE = self.router.scores(x_NH)
        expert_Nk = self.router.choose(scores_NE)
        gates_Nk = self.router.gates(logits_NE, expert_Nk)
        routing = self._statistics(scores_NE, expert_Nk, state, shape=x_BTH.shape[:-1]) if state.collect else None
        if state.is_grouped:
            return self._by_groups(x_NH, expert_Nk, gates_Nk).view_as(x_BTH), routing
        sizes = counts_of(expert_Nk, self.moe.num_experts).tolist()
        outputs_NkH = self._dispatch(x_NH, expert_Nk, sizes)
        return (wide(outputs_NkH) * gates_Nk[..., None]).sum(1).to(x_BTH.dtype).view_as(x_BTH), routing

    def _statistics(self, scores_NE: Tensor, expert_Nk: Tensor, state: Stream, *, shape: torch.Size) -> Routing:
        kept_N = None if state.kept_BT is None else state.kept_BT.flatten()
        counts_E = counts_of(expert_Nk, self.moe.num_experts, kept_N)
        scores_BTE = torch.unflatten(scores_NE, 0, shape)
        return routing_statistics(scores_BTE, counts_E, self.moe, kept_BT=state.kept_BT)

    def _by_groups(self, x_NH: Tensor, expert_Nk: Tensor, gates_Nk: Tensor) -> Tensor:
        """As `_dispatch` and the sum behind it, without asking the host for the sizes."""
        where = dispatch(expert_Nk, self.moe.num_experts)
        rows_MH: Tensor = Spread.apply(x_NH, where.order_M, where.back_M)  # type: ignore[no-untyped-call]
        y_MH = grouped_experts(rows_MH, self.experts.weights, where)
        mixed_NH: Tensor = Combine.apply(y_MH, gates_Nk, where.order_M, where.back_M)  # type: ignore[no-untyped-call]
        return mixed_NH

    def _dispatch(self, x_NH: Tensor, expert_Nk: Tensor, sizes: list[int]) -> Tensor:
        """Sort the tokens' copies by expert, apply, put them back: [N, k, H]."""
        order_M = torch.argsort(expert_Nk.flatten(), stable=True)
        back_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
        copies_MH = x_NH[:, None].expand(-1, expert_Nk.shape[-1], -1).flatten(0, 1)
        sorted_MH: Tensor = _Permute.apply(copies_MH, order_M, back_M)  # type: ignore[no-untyped-call]
        is_measured = x_NH.device.type != "cpu" and not torch.is_grad_enabled()
        mixed_MH = self.experts.in_stacks(sorted_MH, sizes) if is_measured else self.experts(sorted_MH, sizes)
        outputs_MH: Tensor = _Permute.apply(mixed_MH, back_M, order_M)  # type: ignore[no-untyped-call]
        return torch.unflatten(outputs_MH, 0, expert_Nk.shape)


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient goes back by the inverse order, so that nothing is accumulated atomically."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
