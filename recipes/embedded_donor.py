"""Train the embedded donor: Qwen3's architecture and tokenizer, small, from nothing.

Place in the path: corpus files and Qwen's ranks -> **recipe** -> a donor directory like a real one. It stands outside
the chain, which imports the finished files; `tools/train_embedded_donor.py` runs it.

Legend: B rows, T tokens, N = B x T.

Invariants: documents that the split rule holds out are never trained on; bits per byte are measured on the weights as
they are written, rounded to bfloat16, in float32; the device is chosen, never detected; on a CPU the same params,
sources and thread count give the same bytes.

Example:
    result = run(Context(params, inputs={}, sources={"ranks/qwen.tiktoken": …, "corpus/prose.jsonl": …}, scratch=…))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from recipes import runtime
from recipes.checkpoint import donor_config_json
from recipes.data.bpe import json_bytes, load_ranks, tokenizer_json
from recipes.data.donor_text import EncodedDocument, evaluation_chunks, qwen_encoder, read_corpus, training_rows
from recipes.data.encodings import QWEN3
from recipes.model.donor import Donor
from recipes.params.embedded_donor import Optimizer, Params
from recipes.recipe import Context, PlannedFile, Report, RunResult, bytes_file, json_file
from recipes.train.head_loss import mean_cross_entropy
from recipes.train.schedule import factor
from vpstore.errors import RecipeRefused

RANKS = "ranks/qwen.tiktoken"
CORPUS = "corpus/"
_CURVE_POINTS = 200  # of the training loss, each the mean over its span of steps
_EVALUATED_TOKENS = 4096  # padded tokens a forward pass
_EVALUATED_ROWS = 256  # rows of float32 logits in memory at a time


def run(context: Context) -> RunResult:
    """Train, measure, and return the donor's files.

    Raises:  RecipeRefused: a source is missing, there is nothing to train on, or the loss is not finite.
    """
    params: Params = context.params
    files = {name: path for name, path in context.sources.items() if name.startswith(CORPUS)}
    corpus = read_corpus(
        files,
        qwen_encoder(_ranks(context)),
        evaluated=params.evaluated,
        held_out_fraction=params.held_out_fraction,
        copies=params.copies,
    )
    donor = new_donor(params).to(runtime.device())
    rows = training_rows(corpus, sequence_length=params.sequence_length, sequences=params.sequences, seed=params.seed)
    losses, curve = _train(donor, params, rows, corpus.held_out, context)
    donor.to(torch.bfloat16)
    metrics = {
        "held_out": held_out_figures(donor, corpus.held_out, params.sequence_length),
        "trained": {
            "tokens": params.steps * params.sequences * params.sequence_length,
            "tokens_an_epoch": sum(len(document.ids) + 1 for document in corpus.train),
            "distinct_tokens": sum(counts["train_tokens"] for counts in corpus.counts.values()),
        },
        "sources": {name: dict(counts) for name, counts in corpus.counts.items()},
    }
    weights = {name: weight.detach().cpu().contiguous() for name, weight in donor.state_dict().items()}
    return RunResult(
        weights, donor_files(params, _ranks(context)), Report(metrics, (), {"loss": losses, "held_out": curve})
    )


def donor_files(params: Params, ranks_path: Path) -> tuple[PlannedFile, ...]:
    """What stands beside the weights: the stock configuration and the exact tokenizer."""
    document = tokenizer_json(
        load_ranks(ranks_path),
        pattern=QWEN3.pattern,
        special=QWEN3.special,
        normalizer=QWEN3.normalizer,
        plain=QWEN3.plain,
    )
    return (
        json_file("config.json", donor_config_json(params.donor)),
        bytes_file("tokenizer.json", json_bytes(document), "application/json"),
    )


def _ranks(context: Context) -> Path:
    if RANKS not in context.sources:
        raise RecipeRefused("a source is missing", expected=RANKS, found=", ".join(sorted(context.sources)))
    return context.sources[RANKS]


def new_donor(params: Params) -> Donor:
    """A donor with drawn weights: normal matrices, those that write into the stream smaller by depth, gains of one."""
    donor = Donor(params.donor)
    generator = torch.Generator().manual_seed(params.seed)
    into_stream = params.matrix_std / math.sqrt(2 * params.donor.num_hidden_layers)
    with torch.no_grad():
        for name, weight in donor.named_parameters():
            if weight.ndim == 2:
                inner = into_stream if name.endswith(("o_proj.weight", "down_proj.weight")) else params.matrix_std
                weight.normal_(std=inner if ".layers." in name else params.embedding_std, generator=generator)
    return donor


def optimizers(donor: Donor, settings: Optimizer) -> list[torch.optim.Optimizer]:
    """Muon over the matrices of the layers; AdamW over embedding, head and gains."""
    named = list(donor.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim == 2 and ".layers." in name]
    tables = [weight for name, weight in named if weight.ndim == 2 and ".layers." not in name]
    gains = [weight for _, weight in named if weight.ndim == 1]
    groups = [
        {"params": tables, "lr": settings.embedding_rate, "weight_decay": settings.embedding_decay},
        {"params": gains, "lr": settings.gain_rate, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(
            matrices,
            lr=settings.matrix_rate,
            weight_decay=settings.matrix_decay,
            momentum=settings.momentum,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(groups, betas=settings.betas, fused=tables[0].is_cuda),
    ]


Curve = list[dict[str, float]]


def _train(
    donor: Donor,
    params: Params,
    rows: Iterator[tuple[Tensor, Tensor, Tensor]],
    held_out: Sequence[EncodedDocument],
    context: Context,
) -> tuple[Curve, Curve]:
    # Kernels are fused where that pays; a CPU runs op by op, so that its bytes do not depend on a compiler.
    hidden = torch.compile(donor.forward_hidden) if donor.head_weight.is_cuda else donor.forward_hidden
    steppers = optimizers(donor, params.optimizer)
    peaks = [[group["lr"] for group in stepper.param_groups] for stepper in steppers]
    span, period = -(-params.steps // _CURVE_POINTS), -(-params.steps // params.evaluations)
    losses: Curve = []
    curve: Curve = []
    recent: list[Tensor] = []
    for step, batch in enumerate(islice(rows, params.steps)):
        share = factor(step, total=params.steps, warmup=params.optimizer.warmup, shape="cosine", final=0.0)
        for stepper, rates in zip(steppers, peaks, strict=True):
            for group, peak in zip(stepper.param_groups, rates, strict=True):
                group["lr"] = peak * share
        recent.append(_step(donor, hidden, params, batch))
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        last = step + 1 == params.steps
        if last or (step + 1) % span == 0:
            losses.append({"step": step + 1, "loss": _finite(torch.stack(recent).mean().item(), step)})
            recent = []
        if last or (step + 1) % period == 0:
            figures = held_out_figures(donor, held_out, params.sequence_length)
            curve.append({"step": step + 1, "bits_per_byte": figures["bits_per_byte"]})
        context.progress("training", step + 1, params.steps)
    return losses, curve


def _step(
    donor: Donor, hidden: Callable[[Tensor, Tensor], Tensor], params: Params, batch: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Leave clipped gradients on the weights, and return the loss without waiting for it."""
    device = donor.head_weight.device
    ids_BT, labels_BT, documents_BT = (part.to(device, non_blocking=True) for part in batch)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden_NH = hidden(ids_BT, documents_BT).flatten(0, 1)
        loss = mean_cross_entropy(hidden_NH, donor.head_weight, labels_BT.flatten(), chunk=params.loss_chunk)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(donor.parameters(), params.optimizer.clip_norm)
    return loss.detach()


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise RecipeRefused(
            "the training loss is not finite",
            where=f"step {step + 1}",
            found=str(loss),
            next_step="lower the rates in configs/upcycle/embedded_donor.toml",
        )
    return loss


def held_out_figures(donor: Donor, held_out: Sequence[EncodedDocument], sequence_length: int) -> dict[str, float]:
    """Bits per byte and nats per token of the held-out texts, each document by itself, every token predicted once.

    Weights of any dtype are used as float32. See `evaluation_chunks` for the first token and for long texts.
    """
    model = donor if donor.head_weight.dtype == torch.float32 else _widened(donor)
    chunks = sorted(
        (chunk for document in held_out for chunk in evaluation_chunks(document, sequence_length)),
        key=lambda chunk: len(chunk[0]),
    )
    nats, tokens = 0.0, sum(len(document.ids) for document in held_out)
    with torch.no_grad():
        for batch in _batches(chunks):
            nats += _nats(model, *batch)
    bits = nats / math.log(2)
    return {
        "bits_per_byte": bits / sum(document.size_bytes for document in held_out),
        "nats_per_token": nats / tokens,
        "documents": len(held_out),
        "tokens": tokens,
    }


def _widened(donor: Donor) -> Donor:
    wide = Donor(donor.config).to(donor.head_weight.device)
    wide.load_state_dict({name: weight.float() for name, weight in donor.state_dict().items()})
    return wide


def _batches(chunks: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of growing length, padded at the end to the longest of their batch; a padded label is -1."""
    at = 0
    while at < len(chunks):
        end = at + 1
        while end < len(chunks) and len(chunks[end][0]) * (end + 1 - at) <= _EVALUATED_TOKENS:
            end += 1
        width = len(chunks[end - 1][0])
        ids, labels = np.zeros((end - at, width), np.int64), np.full((end - at, width), -1, np.int64)
        for row, (inputs, targets) in enumerate(chunks[at:end]):
            ids[row, : len(inputs)], labels[row, : len(targets)] = inputs, targets
        yield torch.from_numpy(ids), torch.from_numpy(labels)
        at = end


def _nats(donor: Donor, ids_BT: Tensor, labels_BT: Tensor) -> float:
    device = donor.head_weight.device
    hidden_NH = donor.forward_hidden(ids_BT.to(device)).flatten(0, 1)
    labels_N = labels_BT.flatten().to(device)
    hidden_NH, labels_N = hidden_NH[labels_N >= 0], labels_N[labels_N >= 0]
    total = 0.0
    for rows, labels in zip(
        torch.split(hidden_NH, _EVALUATED_ROWS), torch.split(labels_N, _EVALUATED_ROWS), strict=True
    ):
        total += nn.functional.cross_entropy(rows @ donor.head_weight.T, labels, reduction="sum").item()
    return total
