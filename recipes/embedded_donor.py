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

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recipes import runtime
from recipes.checkpoint import donor_config_json
from recipes.data.bpe import json_bytes, load_ranks, tokenizer_json
from recipes.data.donor_text import (
    Corpus,
    CorpusDocuments,
    EncodedDocument,
    evaluation_chunks,
    qwen_encoder,
    read_corpus,
)
from recipes.data.encodings import QWEN3
from recipes.model.donor import Donor
from recipes.params.embedded_donor import Params
from recipes.params.training import TrainingParams
from recipes.recipe import Context, PlannedFile, Report, RunResult, bytes_file, json_file
from recipes.train.donor_optimizer import DonorOptimizer
from recipes.train.loop import Scratch, Trainer
from recipes.train.state import Identity
from recipes.train.step_figures import Row, StepFigures
from vpstore.errors import RecipeRefused

RANKS = "ranks/qwen.tiktoken"
CORPUS = "corpus/"
_STATES = 8  # saved on the way
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
    losses, curve = _train(donor, params, corpus, context)
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


def trainer_of(donor: Donor, params: Params, corpus: Corpus, scratch: Scratch) -> Trainer:
    """The loop that every training of the chain goes through, with the donor's own optimizers."""
    train = TrainingParams.model_validate_json(json.dumps(_training_table(params)))
    documents = CorpusDocuments(corpus, where=params.evaluated)
    return Trainer(donor, train, documents, scratch, optimizer=DonorOptimizer(donor, params.optimizer))


def _training_table(params: Params) -> dict[str, Any]:
    own = params.optimizer
    rates = {"matrix_rate": own.matrix_rate, "embedding_rate": own.embedding_rate, "head_rate": own.embedding_rate}
    others = dict.fromkeys(("vector_rate", "frequency_rate", "residual_rate"), own.gain_rate)
    decays = {"matrix_decay": own.matrix_decay, "table_decay": own.embedding_decay}
    return {
        "steps": params.steps,
        "sequence_length": params.sequence_length,
        "sequences": params.sequences,
        "micro_sequences": params.sequences,
        "seed": params.seed,
        "save_every_steps": max(1, params.steps // _STATES),
        "precision": params.precision,
        "schedule": {"warmup_steps": own.warmup, "shape": "cosine", "final": 0.0},
        "optimizer": {**rates, **others, **decays, "clip_norm": own.clip_norm},
        "loss": {"kind": "plain", "chunk": params.loss_chunk},
        "spikes": {"window": 8, "factor": 2.0},  # marks in the rows; nothing here depends on them
    }


Curve = list[dict[str, float]]


def _train(donor: Donor, params: Params, corpus: Corpus, context: Context) -> tuple[Curve, Curve]:
    """Train to the end, from the beginning or from the state that an interrupted run left.

    Returns: the loss, each point the mean over its span of steps, and held-out bits per byte.
    """
    trainer = trainer_of(donor, params, corpus, Scratch(context.scratch / "training", Identity.of(context)))
    period = -(-params.steps // params.evaluations)
    if not trainer.resume():
        trainer.record["curve"] = []

    def measure(row: Row, figures: StepFigures) -> bool:
        if trainer.step == params.steps or trainer.step % period == 0:
            found = held_out_figures(donor, corpus.held_out, params.sequence_length)
            trainer.record["curve"].append({"step": trainer.step, "bits_per_byte": found["bits_per_byte"]})
        return False

    trainer.on_step = measure
    trainer.run(context.progress)
    if not trainer.is_finite:
        stopped = trainer.record["stopped"]
        raise RecipeRefused(
            "the training loss is not finite",
            where=f"step {stopped['step']}",
            found=f"loss {stopped['loss']}, norm of the gradients {stopped['gradient_norm']}",
            next_step="lower the rates in configs/upcycle/embedded_donor.toml",
        )
    return _spans([row["loss"] for row in trainer.rows], span=-(-params.steps // _CURVE_POINTS)), trainer.record[
        "curve"
    ]


def _spans(losses: list[float], *, span: int) -> Curve:
    parts = [losses[start : start + span] for start in range(0, len(losses), span)]
    ends = [min(start + span, len(losses)) for start in range(0, len(losses), span)]
    return [{"step": end, "loss": math.fsum(part) / len(part)} for end, part in zip(ends, parts, strict=True)]


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
