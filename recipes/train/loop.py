"""The training loop: steps, logs, saved states; stops at the first figure that is not finite.

Place in the path: parent's weights + batches -> **loop** -> weights -> gates. Weights are float32; the batch of a step
follows from the seed and the step's number alone, so a resumed run continues as if it had never stopped.

Legend: B rows of the global batch, T tokens a row, N counted tokens.

Invariants: 2n steps give the same bits as n steps, a kill, a resume and n steps; the objective is a mean over the
global batch however it is cut into micro-batches; a step whose loss or gradient is not finite changes nothing; where
tokens are counted, padding is left out.

Example:
    trainer = Trainer(model, params.train, dataset, Scratch(context.scratch, Identity.of(context)))
    trainer.run(context.progress)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from recipes.data.batches import Batch, packed_batches
from recipes.data.packed_rows import Documents, packed_rows
from recipes.model.donor import Donor
from recipes.model.health import added_counts, router_health, worst_health
from recipes.model.precision import Numerics
from recipes.model.routing import Routing
from recipes.model.transformer import Student
from recipes.params.training import TrainingParams
from recipes.recipe import Progress
from recipes.train.head_loss import weighted_losses
from recipes.train.losses import VALID_VOCAB, token_weights, weighted_token_losses
from recipes.train.memory import memory_refused, require_can_train
from recipes.train.micro_batch import MicroBatch, read_ahead
from recipes.train.optimizer import Stepper, clip_gradients
from recipes.train.optimizer_gpu import optimizer_of
from recipes.train.passes import Passes
from recipes.train.ranks import Ranks, ranks_here
from recipes.train.schedule import factor
from recipes.train.sharding import Whole
from recipes.train.state import Identity, TrainingState, load_state, random_states, restore_random, save_state
from recipes.train.step_figures import Row, StepFigures
from vpstore.errors import RecipeRefused

# Told of each finished step before it is saved; what it puts into the record is saved too. True ends the run.
OnStep = Callable[[Row, StepFigures], bool]


@dataclass(frozen=True)
class Phase:
    """Steps from `first_step` on, in which only some weights are trained."""

    name: str
    first_step: int
    is_trained: Callable[[str], bool]  # by the weight's name
    warmup_steps: int = 0  # the rate rises from 0 when the phase begins, on top of the schedule


@dataclass(frozen=True)
class Scratch:
    """Where states are kept, and for which run."""

    folder: Path
    identity: Identity


ALL_WEIGHTS = Phase("all", 0, lambda name: True)


class Trainer:
    """One run over a student, or over the embedded donor; `record` survives in the saved states."""

    def __init__(
        self,
        model: Student | Donor,
        params: TrainingParams,
        dataset: Documents,
        scratch: Scratch,
        *,
        phases: Sequence[Phase] = (ALL_WEIGHTS,),
        optimizer: Stepper | None = None,
    ) -> None:
        self.model, self.params, self.dataset, self.scratch = model, params, dataset, scratch
        self.ranks = ranks_here()
        self.ranks.require_same("parent, data and params", repr(sorted(scratch.identity.facts().items())))
        self.packed = packed_rows(dataset, params.packing, sequence_length=params.sequence_length, seed=params.seed)
        self.phases = sorted(phases, key=lambda phase: phase.first_step)
        self.device = model.head_weight.device
        require_can_train(model, params, ranks=self.ranks.world)  # before the optimizer takes its memory
        self.sharding = _sharding(model, self.ranks)
        self.optimizer = optimizer or optimizer_of(self.sharding.weights, params.optimizer)
        self.valid_vocab = min(VALID_VOCAB, model.head_weight.shape[0])
        # On a GPU everything that has a kernel of its own goes through it; on a CPU the reference is what runs.
        dtype: torch.dtype = getattr(torch, params.precision)
        self.numerics = Numerics(dtype, is_fused=self.device.type == "cuda" and model.can_be_fused(dtype))
        model.recompute = params.recompute
        self.passes = Passes(model, self.numerics, can_capture=self.ranks.world == 1)
        self._phase: Phase | None = None
        self.step = 0
        self.record: dict[str, Any] = {"rows": [], "stopped": None}
        self.world = self.ranks.world  # that share a step's rows; in one process they take turns
        self.on_step: OnStep | None = None
        torch.manual_seed(params.seed)

    @property
    def rows(self) -> list[Row]:
        """One row a step."""
        return list(self.record["rows"])

    @property
    def is_finite(self) -> bool:
        """Whether no step had to be refused."""
        return self.record["stopped"] is None

    @property
    def position(self) -> dict[str, int]:
        """What the next step starts from: all of it follows from the step, the params and the size of the data."""
        samples = self.step * self.params.sequences
        epoch, token = divmod(self.packed.tokens_before(samples), self.dataset.tokens)
        return {
            "consumed_samples": samples,
            "epoch": epoch,
            "token_of_epoch": token,
            "shuffle_seed": self.params.seed,
            "schedule_step": self.step,
        }

    def resume(self) -> bool:
        """Take up the newest saved state of this run.

        Returns: whether there was one.
        Raises:  RecipeRefused: the state belongs to another run or is damaged, or the data it stood at is not here.
        """
        into = self.sharding.places(self.optimizer.saved()[0])
        state = load_state(self.scratch.folder, self.scratch.identity, into=into, ranks=self.ranks)
        if state is None:
            return False
        self.model.load_state_dict(state.weights, strict=True)
        self.optimizer.load(self.sharding.local(state.optimizer), state.optimizer_steps)
        restore_random(state.random)
        self.step, self.record = state.step, state.record
        if state.position != self.position:
            raise RecipeRefused(
                "a training state stands at another place of its data",
                where=self.dataset.where,
                expected=str(self.position),
                found=str(state.position),
                next_step="bring back the data that the state was made with, or delete the state",
            )
        return True

    def save(self) -> None:
        """Keep the state of this moment."""
        tensors, steps = self.optimizer.saved()
        weights, stored = self.model.state_dict(), self.sharding.stored(tensors)
        state = TrainingState(self.step, weights, stored, steps, random_states(), self.record, self.position)
        save_state(self.scratch.folder, state, self.scratch.identity, ranks=self.ranks)

    def run(self, progress: Progress) -> None:
        """Train to the last step, or to the first one that is not finite; both end with the state in memory only."""
        self.model.train()
        self.record["stopped"] = None  # a step that was refused is tried again
        self.ranks.note(self.record, self.step)
        try:
            self._steps(progress)
        finally:  # the gates that follow want the memory
            self.passes.release()
            self.optimizer.release()

    def _steps(self, progress: Progress) -> None:
        for batch in self.batches():
            progress("training", self.step, self.params.steps)
            with memory_refused(self.params):
                figures = self.train_step(batch)
            if figures is None:
                return
            self.step += 1
            if self.on_step is not None and self.on_step(self.record["rows"][-1], figures):
                return
            if self.step % self.params.save_every_steps == 0 and self.step < self.params.steps:
                self.save()
        progress("training", self.step, self.params.steps)

    def batches(self) -> Iterator[Batch]:
        """The batches of the steps that are left, made before they are asked for."""
        endless = packed_batches(self.packed, sequences=self.params.sequences, start_step=self.step)
        return read_ahead(islice(endless, self.params.steps - self.step))

    def train_step(self, batch: Batch) -> StepFigures | None:
        """One update, and its row in the record; None if it was refused, and then nothing has changed."""
        phase = self._enter_phase()
        self.passes.zero_gradients()
        figures = self._accumulate(batch)
        self.sharding.complete_gradients()
        norm_on_device = self.sharding.norm()
        self.optimizer.prepare(share := self._share_of_peak(phase))
        norm = float(norm_on_device)  # here, and in `settle`, the host waits for the device
        figures.settle(self.ranks)
        if not (math.isfinite(figures.loss) and math.isfinite(norm)):
            self.record["stopped"] = {"step": self.step + 1, "loss": str(figures.loss), "gradient_norm": str(norm)}
            return None
        clip_gradients(self.optimizer.weights, norm, self.params.optimizer.clip_norm)
        self.optimizer.step(share)
        router: Mapping[str, float] = {}
        if figures.expert_counts and isinstance(self.model, Student):
            self.model.update_expert_bias(figures.expert_counts)
            router = worst_health(router_health(self.model, figures.expert_counts))
        row = self._row(figures, phase, share, norm) | {f"router_{name}": value for name, value in router.items()}
        self.record["rows"].append(row)
        return figures

    def _enter_phase(self) -> Phase:
        phase = [one for one in self.phases if one.first_step <= self.step][-1]
        if phase is not self._phase:
            self.sharding.train(phase.is_trained)
            self._phase = phase
        return phase

    def _share_of_peak(self, phase: Phase) -> float:
        s, steps = self.params.schedule, self.params.steps
        share = factor(self.step, total=steps, warmup=s.warmup_steps, shape=s.shape, final=s.final)
        if phase.warmup_steps:
            share *= min(1.0, (self.step - phase.first_step + 1) / phase.warmup_steps)
        return share

    def _accumulate(self, batch: Batch) -> StepFigures:
        """Gradients of the global batch: each process's share, one micro-batch after the other."""
        shares = [batch.share(rank, self.world) for rank in range(self.world)]
        # The counts are reduced over all processes before the first loss is divided by one of them.
        figures = StepFigures.of(batch, shares)
        rows = batch.ids_BT.shape[0]
        routed = [
            self._micro_batch(part, figures, of_rows=rows)
            for share in (shares if self.ranks.world == 1 else [shares[self.ranks.rank]])
            for part in share.cut(self.params.micro_sequences)
        ]
        figures.expert_counts = added_counts(routed)
        return figures

    def _micro_batch(self, part: Batch, figures: StepFigures, *, of_rows: int) -> Mapping[int, Routing]:
        """Add one micro-batch's gradients and figures; what its layers with experts did."""
        sent = MicroBatch.of(part, self.device, valid_vocab=self.valid_vocab)
        hidden_BTH, balance, routing = self.passes(sent)
        # The blocks of `losses` are made for a CPU's cache, and for float32.
        is_blocked = self.device.type == "cpu" and hidden_BTH.dtype == torch.float32
        losses = weighted_token_losses if is_blocked else weighted_losses
        loss, nll_N = self.sharding.with_head(
            losses,
            sent.counted(hidden_BTH),
            sent.labels_N,
            self._weights(sent.span_N, figures.counts),
            valid_vocab=self.valid_vocab,
            chunk=self.params.loss.chunk,
        )
        share = part.ids_BT.shape[0] / of_rows
        balance = balance * share
        (loss + balance).backward()  # type: ignore[no-untyped-call]
        figures.add(loss, balance, nll_N, sent.span_N)
        figures.add_layers(routing, of_rows=share, of_tokens=part.tokens / figures.tokens)
        return routing

    def _weights(self, span_N: Tensor, counts: tuple[int, ...]) -> Tensor:
        return token_weights(span_N, counts, loss=self.params.loss.kind, span_weights=self.params.loss.span_weights)

    def _row(self, figures: StepFigures, phase: Phase, share: float, norm: float) -> Row:
        spikes = self.params.spikes
        recent = [row["loss"] for row in self.record["rows"][-spikes.window :]]
        consumed = (self.step + 1) * self.params.sequences
        tokens = self.packed.tokens_before(consumed)
        return {
            "step": self.step + 1,
            "phase": phase.name,
            "loss": figures.loss,
            "balance_loss": figures.balance,
            "is_spike": len(recent) == spikes.window and figures.loss > spikes.factor * median(recent),
            "gradient_norm": norm,
            "consumed_samples": consumed,
            "consumed_tokens": tokens,  # here and below: without padding
            "epoch": tokens // self.dataset.tokens,
            "tokens": figures.tokens,
            "fill": figures.tokens / figures.places,
            **figures.cross_entropies(),
            **{f"rate_{kind}": rate for kind, rate in self.optimizer.rates(share).items()},
        }


def _sharding(model: Student | Donor, ranks: Ranks) -> Whole:
    if ranks.world == 1:
        return Whole(model)
    from recipes.train.sharded import shared_out  # what it asks of torch takes seconds to load

    return shared_out(model, ranks)
