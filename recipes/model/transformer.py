"""The student: embedding, layers, final norm, untied head; compat and real mode, dense and MoE, by its config alone.

Place in the path: recipe -> **model**. `start` makes the stream and its state, each layer adds to the stream, `norm`
ends it; surgery walks these steps one by one, training calls `forward_hidden`.

Invariants: state_dict keys are the names in the checkpoint; x <- x + attention(norm(x)), x <- x + mlp(norm(x)), so a
block with zero o_proj and fc2 leaves the stream bitwise as it was.

Shapes: B batch, T tokens, H hidden, V vocabulary.

Example:
    >>> student = Student(StudentConfig(hidden_size=64, num_layers=4, ffn_hidden_size=32, attention="tpa"))
    >>> x_BTH, state = student.start(ids_BT)
    >>> for layer in student.layers:
    ...     x_BTH = layer(x_BTH, state)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import cast

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from recipes.model.attention import Attention, GroupedQueryAttention
from recipes.model.compiled import compiled
from recipes.model.config import StudentConfig
from recipes.model.ffn import FeedForward
from recipes.model.flex import block_masks
from recipes.model.grape import GrapeM, RotaryTables, rope_frequencies, rotary_tables
from recipes.model.modules import Drawable, Embedding, Projection, RmsNorm
from recipes.model.moe import MixtureOfExperts
from recipes.model.precision import REFERENCE, Numerics, is_narrow, wide_dtype
from recipes.model.routing import Routing
from recipes.model.stream import Stream
from recipes.model.tpa import TensorProductAttention
from vpstore.errors import ShapeMismatch


class Layer(nn.Module):
    """One block: attention, then feed-forward or experts, each behind its norm and added to the stream."""

    def __init__(self, config: StudentConfig, *, number: int) -> None:
        super().__init__()
        self.number = number
        self.input_layernorm = RmsNorm(config.hidden_size, eps=config.norm_eps)
        kind = TensorProductAttention if config.uses_tpa(number) else GroupedQueryAttention
        self.self_attn: Attention = kind(config, number=number)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp: FeedForward | MixtureOfExperts
        if config.moe is not None and config.is_moe(number):
            self.mlp = MixtureOfExperts(config, config.moe, number=number)
        else:
            self.mlp = FeedForward(config.hidden_size, config.ffn_hidden_size)

    def feed_forward(self, x_BTH: Tensor, state: Stream) -> Tensor:
        """What `mlp` makes of an already normalised input."""
        y_BTH: Tensor = self.mlp(x_BTH, state) if isinstance(self.mlp, MixtureOfExperts) else self.mlp(x_BTH)
        return y_BTH

    def forward(self, x_BTH: Tensor, state: Stream) -> Tensor:
        """The stream after this layer."""
        step = Layer.step if state.masks is None else compiled_step()
        x_BTH, routing = step(self, x_BTH, state)
        state.note(self.number, routing)
        return x_BTH

    def step(self, x_BTH: Tensor, state: Stream) -> tuple[Tensor, Routing | None]:
        """The stream after this layer, and its routing; nothing here tells one layer of a kind from the next."""
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), state)
        normed_BTH = self.post_attention_layernorm(x_BTH)
        if isinstance(self.mlp, MixtureOfExperts):
            y_BTH, routing = self.mlp.mixture(normed_BTH, state)
            return x_BTH + y_BTH, routing
        return x_BTH + self.mlp(normed_BTH), None


@cache
def compiled_step() -> Callable[[Layer, Tensor, Stream], tuple[Tensor, Routing | None]]:
    """`Layer.step`, compiled once for each kind of layer: first, local, global, dense or with experts."""
    return compiled(Layer.step)


class Body(nn.Module):
    """Everything below the head."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, number=number) for number in range(1, config.num_layers + 1))
        self.norm = RmsNorm(config.hidden_size, eps=config.norm_eps)
        self.grape = GrapeM(config.head_dim, base=config.rope_base) if config.attention == "tpa" else None


class Student(nn.Module):
    """The vp architecture."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = Projection(config.hidden_size, config.vocab_size, bias=False)
        # Compute the layers' activations again in the backward pass instead of keeping them.
        self.recompute = False
        self._fixed: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # RoPE's frequencies, once for each place

    @property
    def layers(self) -> list[Layer]:
        """The blocks in order; `layers[i].number` is i + 1."""
        return cast(list[Layer], list(self.model.layers))

    @property
    def head_weight(self) -> Tensor:
        """[V, H]."""
        return self.lm_head.weight

    @property
    def max_sequence(self) -> int:
        """Tokens of the longest row that the model is made for."""
        return self.config.max_sequence

    def kept_numbers(self, *, recompute: bool) -> int:
        """Numbers of the stream's size that a training pass keeps, a token; an upper estimate."""
        layers = [_kept_by_layer(self.config, number) for number in range(1, self.config.num_layers + 1)]
        if recompute:  # each layer's input, and all of one layer twice: what it keeps, and the gradients of that
            return self.config.num_layers * self.config.hidden_size + 2 * max(layers)
        return sum(layers) + max(layers)

    def can_be_fused(self, dtype: torch.dtype) -> bool:
        """Whether every layer has its fused form in a dtype: experts are grouped in narrow ones alone."""
        mixtures = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MixtureOfExperts)]
        return not mixtures or (is_narrow(dtype) and all(mixture.experts.can_be_grouped for mixture in mixtures))

    def draw(self, generator: Generator | None = None) -> None:
        """Draw all weights afresh, in the order of the modules."""
        for module in self.modules():
            if module is not self and isinstance(module, Drawable):
                module.draw(generator)

    def start(
        self,
        ids_BT: Tensor,
        documents_BT: Tensor | None = None,
        *,
        collect: bool = False,
        numerics: Numerics = REFERENCE,
    ) -> tuple[Tensor, Stream]:
        """The embedded tokens and the state that the layers need.

        Args:    documents_BT: a token sees only its own run of equal numbers, positions restart at each; None: a row is
                 one document. collect: MoE layers leave statistics in `state.routing`, by layer number.
        Raises:  ShapeMismatch: ids not [B, T], or documents of another shape.
        """
        documents = ids_BT if documents_BT is None else documents_BT
        if ids_BT.dim() != 2 or documents.shape != ids_BT.shape:
            raise ShapeMismatch(
                "ids and documents must be two equal tables of tokens",
                expected="ids [B, T], documents [B, T] or none",
                found=f"ids {list(ids_BT.shape)}, documents {list(documents.shape)}",
            )
        if documents_BT is None:
            state = Stream.of_rows(ids_BT.shape[1], device=ids_BT.device, collect=collect)
        else:
            state = Stream.of(documents_BT, device=ids_BT.device, collect=collect)
        return self._embedded(ids_BT, state, numerics), state

    def hidden_of(self, ids_BT: Tensor, state: Stream, numerics: Numerics = REFERENCE) -> Tensor:
        """Hidden states after the final norm, [B, T, H], of a fresh state that `Stream.of` made for these ids."""
        normed_BTH: Tensor = self.model.norm(self.run_layers(self._embedded(ids_BT, state, numerics), state))
        return normed_BTH

    def _embedded(self, ids_BT: Tensor, state: Stream, numerics: Numerics) -> Tensor:
        """The embedded tokens; completes the state by what depends on weights and device."""
        x_BTH: Tensor = self.model.embed_tokens(ids_BT)
        x_BTH = x_BTH.to(numerics.dtype or x_BTH.dtype)
        state.rotary = self._rotary(state.positions_BT, x_BTH.dtype)
        state.is_grouped = numerics.is_fused or numerics.is_grouped
        if numerics.is_fused:
            rows, tokens = ids_BT.shape
            window = self.config.window if self.config.attention == "tpa" else None
            state.masks = block_masks(state.run_BT, rows=rows, tokens=tokens, window=window, device=ids_BT.device)
        return x_BTH

    def run_layers(self, x_BTH: Tensor, state: Stream) -> Tensor:
        """The stream after the last layer, before the final norm."""
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                # Nothing is drawn on the way, so no generator's state is worth keeping.
                x_BTH = checkpoint(layer, x_BTH, state, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTH = layer(x_BTH, state)
        return x_BTH

    def hidden_and_state(
        self,
        ids_BT: Tensor,
        documents_BT: Tensor | None = None,
        *,
        collect: bool = False,
        numerics: Numerics = REFERENCE,
    ) -> tuple[Tensor, Stream]:
        """Hidden states after the final norm, and the state with the routing statistics of this pass."""
        x_BTH, state = self.start(ids_BT, documents_BT, collect=collect, numerics=numerics)
        return self.model.norm(self.run_layers(x_BTH, state)), state

    def forward_hidden(self, ids_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, [B, T, H]."""
        return self.hidden_and_state(ids_BT, documents_BT)[0]

    def forward(self, ids_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Logits of every position, [B, T, V]."""
        logits_BTV: Tensor = self.lm_head(self.forward_hidden(ids_BT, documents_BT))
        return logits_BTV

    def update_expert_bias(self, counts: Mapping[int, Tensor]) -> None:
        """One balancing step in each MoE layer.

        Args:    counts: by layer number, tokens per expert over the global batch of the optimizer step.
        """
        for layer in self.layers:
            if isinstance(layer.mlp, MixtureOfExperts):
                layer.mlp.router.update_expert_bias(counts[layer.number])

    def _rotary(self, positions_BT: Tensor, dtype: torch.dtype) -> RotaryTables:
        """Tables from the learned frequencies, or from RoPE's in compat mode."""
        config = self.config
        if self.model.grape is not None:
            return rotary_tables(positions_BT, self.model.grape.frequencies())
        place = (positions_BT.device, wide_dtype(dtype))
        if place not in self._fixed:
            fixed = rope_frequencies(config.head_dim, base=config.rope_base, dtype=place[1])
            self._fixed[place] = fixed.to(positions_BT.device)
        return rotary_tables(positions_BT, self._fixed[place])


def _kept_by_layer(config: StudentConfig, number: int) -> int:
    # The stream twice, both norms' outputs; fused projection before and after its norms; mixed heads.
    attention = 4 * config.hidden_size + 2 * config.qkv_rows + 2 * config.num_query_heads * config.head_dim
    if config.moe is None or not config.is_moe(number):
        return attention + 2 * config.ffn_hidden_size
    moe = config.moe
    # Rows behind the dispatch, and the router's tables, which are float32.
    routed = moe.top_k * (2 * config.hidden_size + 2 * moe.expert_hidden_size) + 30 * moe.num_experts
    return attention + 2 * moe.shared_hidden_size + routed
