"""The tables of `stage1.toml` that follow from the params, the model and the data, each as plain values.

Place in the path: params, config, datasets -> **stage1_tables** -> stage1_handoff. Pure.

Invariants: figures of the architecture come from the config, those of the data from the data; a sentence says what is
so, for whoever writes another trainer, and where it depends on a param it differs with it.

Example:
    >>> tokenizer_table()["end_of_document"]
    199999
"""

from __future__ import annotations

import math
from typing import Any

from recipes.data.batches import AlignedDataset
from recipes.data.encodings import O200K_HARMONY
from recipes.data.packed_rows import PAD_ID, PackedRows
from recipes.data.packing import Packing
from recipes.model.config import MoeConfig
from recipes.params.stage1_handoff import Params
from recipes.train.losses import VALID_VOCAB

STEP_LOGS = (
    "loss_total", "cross_entropy", "cross_entropy_reasoning", "cross_entropy_final", "tokens_plain", "tokens_reasoning",
    "tokens_final", "learning_rate_by_group", "gradient_norm", "tokens_per_second", "consumed_samples",
    "consumed_tokens", "tokens", "fill",
)  # fmt: skip
ROUTER_LOGS = (
    "sequence_auxiliary_loss", "cv_percent", "entropy", "score_entropy", "max_load_percent", "active_experts",
    "dead_experts", "expert_bias_min", "expert_bias_max",
)  # fmt: skip
EVALUATION_LOGS = ("held_out_cross_entropy_reasoning", "held_out_cross_entropy_final", "format_validity")
PROVENANCE_LOGS = (
    "git_sha", "config_digest", "tokenizer_digest", "data_manifest_digest", "checkpoint_digest", "code_digest",
)  # fmt: skip
END_OF_DOCUMENT = O200K_HARMONY.special["<|endoftext|>"]
_TRUNCATION = "rendered with the final message whole; analysis is cut from the left under its header, then the question"


def schedule_table(params: Params) -> dict[str, Any]:
    """Warm-up and decay, from step 0."""
    return {
        **params.schedule.model_dump(mode="json"),
        "restart": True,
        "restart_means": "step 0, a fresh warm-up and fresh optimizer state, whatever trained the checkpoint",
    }


def tokenizer_table() -> dict[str, Any]:
    """Which ids the data and the model speak."""
    return {
        "encoding": O200K_HARMONY.name,
        "ranks_sha256": O200K_HARMONY.ranks_sha256,
        "padded_vocab": O200K_HARMONY.n_vocab,
        "valid_vocab": VALID_VOCAB,
        "end_of_document": END_OF_DOCUMENT,
    }


def evaluation_table(params: Params, valid: AlignedDataset) -> dict[str, Any]:
    """What is measured on held-out documents: never more of them than there are."""
    wanted = params.evaluation
    tokens = min(wanted.held_out_tokens, valid.tokens)
    return {
        "held_out_tokens": tokens,
        "batches": math.ceil(tokens / (params.batch.sequence_length * params.batch.global_sequences)),
        "control_rows": min(wanted.control_rows, len(valid)),
        "prompts": min(wanted.prompts, len(valid)),
        "max_new_tokens": wanted.max_new_tokens,
        "decoding": wanted.decoding,
        "ties": "to the lowest id",
        "order": "the first held-out documents in their own order, the same ones each time; packed as in training",
        "prompt": "a held-out conversation up to where the assistant speaks, and the opening of its message",
        "valid_answer": "analysis once or more, then one final with words and <|return|>, within max_new_tokens",
    }


def teacher_table(params: Params) -> dict[str, Any]:
    """The teacher of the later stages."""
    return {
        "model": params.teacher,
        "used_in": [stage.name for stage in params.later_stages],
        "stage_1": "no teacher: labels are the data's own",
        "vocabulary": "the teacher speaks the same ids: scores are compared id by id, below valid_vocab",
        "later_stages_keep": "identity, masks and spans, global means, logs, exact resume and stop rules of this run",
    }


def loss_table(params: Params) -> dict[str, Any]:
    """The objective, and where its means are taken."""
    return {
        "formula": "reasoning * mean(loss of span 1) + final * mean(loss of span 2)",
        "normalisation": "sums and counts are reduced over the global batch before they are divided",
        "valid_vocab": VALID_VOCAB,
        "mask_ids_from": VALID_VOCAB,
        "padded_vocab": O200K_HARMONY.n_vocab,
        "weights": params.loss_weights.model_dump(mode="json"),
    }


def optimizer_table(params: Params) -> dict[str, Any]:
    """Rates and decays, and which weight has which."""
    return {
        **params.optimizer.model_dump(mode="json"),
        "matrices": "NorMuon: all 2-d weights but embedding and head; each expert of a stack is a matrix of its own",
        "others": "AdamW: embedding, head, biases, norms, softmax offsets, log_freq, value_residual",
        "no_decay": ["biases", "norms", "softmax_offset", "log_freq", "value_residual"],
        "float32": ["log_freq", "expert_bias", "value_residual", "softmax_offset"],
    }


def router_table(moe: MoeConfig) -> dict[str, Any]:
    """How experts are chosen and kept in balance."""
    return {
        "score": "sigmoid",
        "precision": "float32",
        "gates": "from the scores without the expert bias; they sum to routed_scaling",
        "expert_bias_update": "after every step: bias += bias_update_rate * sign(mean load - load), global batch",
        "group_score": "sum of the best top_k / top_groups of the group",
        "balance_loss": "per sequence, plain top_k of normalised scores",
        "token_dropping": False,
        "z_loss": 0.0,
        **moe.model_dump(mode="json"),
    }


def packing_table(packing: Packing, rows: PackedRows) -> dict[str, Any]:
    """What a row holds and what attention stops at; `documents_cut` only where rows hold whole documents."""
    is_bounded, is_whole = packing != "whole_row", packing == "best_fit"
    cut = rows.documents_cut
    kept = "a row keeps its documents whole" + (f", but for the {cut} that are longer than one" if cut else "")
    padding = {
        "id": PAD_ID,
        "label": PAD_ID,
        "loss_mask": 0,
        "span": 0,
        "attention": "a document of its own",
        "counts": "left out of token counts, router loads, balance loss and fill",
    }
    return {
        "packing": packing,
        "rows": "whole documents, then padding; a document longer than a row is cut into rows"
        if is_whole
        else "slices of the stream of documents; a row may begin and end inside one",
        "attention": "inside a document" if is_bounded else "through the whole row",
        "positions": "restart at each document" if is_bounded else "run through the row",
        "truncation": f"{_TRUNCATION}; {kept if is_whole else 'a row may still begin or end inside a message'}",
        "fill": rows.fill,  # share of the places that hold tokens
        **({"documents_cut": rows.documents_cut, "padding": padding} if is_whole else {}),
    }


def logging_table(moe: MoeConfig) -> dict[str, Any]:
    """Every name that is logged."""
    return {
        "every_step": list(STEP_LOGS),
        "router": list(ROUTER_LOGS),  # every periods.router_log steps
        "evaluation": list(EVALUATION_LOGS),
        "once": list(PROVENANCE_LOGS),
        "router_scope": "each layer, and over all layers",
        "uniform_max_load_percent": 100.0 / moe.num_experts,
        "uniform_entropy": math.log(moe.num_experts),
        "losses": "nats per token; cross_entropy is the plain mean over all counted tokens",
        "form": "JSON lines; the first one is the provenance",
        "experts": moe.num_experts,
    }
