"""Write the Stage 1 run that consumes vpMoE by its digest: as TOML, and as arguments for Megatron.

Place in the path: config -> **recipe**; a plan without tensors. The trainer of Stage 1 reads `stage1.toml` and refuses
to start if a digest in it is not that of what it has before it; `recipes/stage1_smoke.py` is such a trainer.

Invariants: figures of the architecture come from the checkpoint's config.json, never from here; both files are parsed
back and held against the params before they count as written; nothing in them depends on time, host or path.

Example:
    stage stage1@main, inputs checkpoint = vpMoE@smoke, data = synth_kd, tokenizer = o200k-harmony
"""

from __future__ import annotations

import math
import tomllib
from typing import Any

from blake3 import blake3

from recipes.checkpoint import parse_student_config
from recipes.data.batches import AlignedDataset
from recipes.data.dataset_manifest import MANIFEST, checked_manifest
from recipes.data.encodings import O200K_HARMONY
from recipes.data.packed_rows import PAD_ID, PackedRows, packed_rows
from recipes.data.packing import Packing
from recipes.model.config import MoeConfig, StudentConfig
from recipes.params.stage1_handoff import Params
from recipes.recipe import Context, Gate, InputArtifact, Plan, Report, bytes_file
from recipes.train.losses import VALID_VOCAB
from recipes.train.megatron_arguments import megatron_arguments, megatron_comments
from recipes.train.run_files import parse_arguments, to_toml, write_arguments
from vpstore.errors import RecipeRefused

TOML_FILE, ARGUMENTS_FILE = "stage1.toml", "megatron_args.txt"
FORMAT = 1
DATA_KIND = "synth_kd"
# What must be equal, by digest, for a run to start or to go on.
IDENTITY = ("checkpoint", "data", "data_manifest", "tokenizer", "config")

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
PROVENANCE_LOGS = ("git_sha", "config_digest", "tokenizer_digest", "data_manifest_digest", "checkpoint_digest")
STATE_PARTS = (
    "weights", "normuon_momentum", "normuon_second_moment", "adamw_mean", "adamw_square", "adamw_step", "expert_bias",
    "log_freq_float32", "random_generators", "epoch", "token_of_epoch", "consumed_samples", "shuffle_seed",
    "schedule_step", "evaluations",
)  # fmt: skip


def plan(context: Context) -> Plan:
    """The run's two files.

    Raises:  RecipeRefused: a checkpoint without experts, a batch that does not fit it, or a file that does not read
             back as what was meant.
    """
    params: Params = context.params
    config = parse_student_config(context.inputs["checkpoint"].json("config.json"))
    moe = _require_fit(config, params)
    run = run_config(context, config, moe)
    toml = to_toml(run)
    arguments = write_arguments(megatron_arguments(run), comments=megatron_comments(run))
    validate(toml, arguments, run)
    files = [
        bytes_file(TOML_FILE, toml.encode(), "application/toml"),
        bytes_file(ARGUMENTS_FILE, arguments.encode(), "text/plain"),
    ]
    metrics = {"stage1": {"steps": run["batch"]["steps"], "tokens": run["batch"]["tokens"]}}
    return Plan((), files, Report(metrics, (Gate("parses_back", 1.0, "==", 1.0),)))


def _require_fit(config: StudentConfig, params: Params) -> MoeConfig:
    if config.moe is None:
        raise _refusal("Stage 1 starts from a mixture of experts", "a checkpoint with experts", "a dense one")
    if params.batch.sequence_length > config.max_sequence:
        raise _refusal(
            "the sequences are longer than the model",
            f"at most {config.max_sequence} tokens",
            f"{params.batch.sequence_length} tokens",
        )
    return config.moe


def _refusal(what: str, expected: str, found: str) -> RecipeRefused:
    return RecipeRefused(
        what, where="stage1", expected=expected, found=found, next_step="mend the TOML of stage1, or its inputs"
    )


def _batch(params: Params, rows: PackedRows) -> dict[str, Any]:
    """The batch, and the steps that reach the token target; padding is not counted as tokens.

    Raises:  RecipeRefused: the warm-up takes all steps.
    """
    per_step = params.batch.sequence_length * params.batch.global_sequences * rows.fill
    steps = math.ceil(params.batch.target_tokens / per_step)
    if params.schedule.warmup_steps >= steps:
        raise _refusal("the warm-up is the whole run", f"below {steps}", str(params.schedule.warmup_steps))
    return {**params.batch.model_dump(mode="json"), "steps": steps, "tokens": round(steps * per_step)}


def run_config(context: Context, config: StudentConfig, moe: MoeConfig) -> dict[str, Any]:
    """The whole run as one document of plain values."""
    params: Params = context.params
    data = context.inputs["data"]
    checked_manifest(data.path, kind=DATA_KIND)
    train, valid = (AlignedDataset(data.path, split) for split in ("train", "valid"))
    length, seed = params.batch.sequence_length, params.seeds.data_order
    rows = packed_rows(train, params.packing, sequence_length=length, seed=seed)
    batch = _batch(params, rows)
    return {
        "format": FORMAT,
        "object": "vpMoE",
        "identity": {"refuse_if_different": list(IDENTITY), "config": "the BLAKE3 of this file's bytes"},
        "inputs": {role: {"ref": found.ref, "digest": found.digest} for role, found in sorted(context.inputs.items())},
        "model": config.model_dump(mode="json"),
        "batch": batch,
        "loss": _loss(params),
        "schedule": _schedule(params),
        "tokenizer": _tokenizer(),
        "optimizer": _optimizer(params),
        "router": _router(moe),
        "data": {
            **_arrays(data, train, valid),
            "epochs": batch["tokens"] / train.tokens,
            **_packing(params.packing, rows),
            "truncation": "structured: the final message is kept whole, analysis is cut from the left under its header",
            "mask_and_span": "index t speaks of label t + 1",
            "order": "by seed and epoch, independent of the number of processes",
            "harmony": "strict: every row parses before it is trained on",
        },
        "seeds": params.seeds.model_dump(mode="json"),
        "periods": params.periods.model_dump(mode="json"),
        "logging": _logging(moe),
        "resume": {
            "state": list(STATE_PARTS),
            "test": "2n steps equal n steps, a kill, a load and n steps, bit for bit on a CPU or with fixed kernels",
        },
        "stop": params.stop.model_dump(mode="json"),
        "teacher": _teacher(params),
        "smoke": params.smoke.model_dump(mode="json"),
        "later_stages": [stage.model_dump(mode="json") for stage in params.later_stages],
    }


def _schedule(params: Params) -> dict[str, Any]:
    return {
        **params.schedule.model_dump(mode="json"),
        "restart": True,
        "restart_means": "step 0, a fresh warm-up and fresh optimizer state, whatever trained the checkpoint",
    }


def _tokenizer() -> dict[str, Any]:
    return {
        "encoding": O200K_HARMONY.name,
        "ranks_sha256": O200K_HARMONY.ranks_sha256,
        "padded_vocab": O200K_HARMONY.n_vocab,
        "valid_vocab": VALID_VOCAB,
    }


def _teacher(params: Params) -> dict[str, Any]:
    return {
        "model": params.teacher,
        "used_in": [stage.name for stage in params.later_stages],
        "stage_1": "no teacher: labels are the data's own",
        "vocabulary": "the teacher speaks the same ids: scores are compared id by id, below valid_vocab",
        "later_stages_keep": "identity, masks and spans, global means, logs, exact resume and stop rules of this run",
    }


def _loss(params: Params) -> dict[str, Any]:
    return {
        "formula": "reasoning * mean(loss of span 1) + final * mean(loss of span 2)",
        "normalisation": "sums and counts are reduced over the global batch before they are divided",
        "valid_vocab": VALID_VOCAB,
        "mask_ids_from": VALID_VOCAB,
        "padded_vocab": O200K_HARMONY.n_vocab,
        "weights": params.loss_weights.model_dump(mode="json"),
    }


def _optimizer(params: Params) -> dict[str, Any]:
    return {
        **params.optimizer.model_dump(mode="json"),
        "matrices": "NorMuon: all 2-d weights but embedding and head; each expert of a stack is a matrix of its own",
        "others": "AdamW: embedding, head, biases, norms, softmax offsets, log_freq, value_residual",
        "no_decay": ["biases", "norms", "softmax_offset", "log_freq", "value_residual"],
        "float32": ["log_freq", "expert_bias", "value_residual", "softmax_offset"],
    }


def _router(moe: MoeConfig) -> dict[str, Any]:
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


def _arrays(data: InputArtifact, train: AlignedDataset, valid: AlignedDataset) -> dict[str, Any]:
    return {
        "kind": DATA_KIND,
        "manifest": {"path": MANIFEST, "digest": f"blake3:{blake3((data.path / MANIFEST).read_bytes()).hexdigest()}"},
        "train": train.prefixes,
        "valid": valid.prefixes,
        "arrays": ["tokens", "lossmask", "span"],
        "train_tokens": train.tokens,
        "valid_tokens": valid.tokens,
    }


def _packing(packing: Packing, rows: PackedRows) -> dict[str, Any]:
    """What a row holds and what attention stops at; `documents_cut` only where rows hold whole documents."""
    is_bounded, is_whole = packing != "whole_row", packing == "best_fit"
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
        "fill": rows.fill,  # share of the places that hold tokens
        **({"documents_cut": rows.documents_cut, "padding": padding} if is_whole else {}),
    }


def _logging(moe: MoeConfig) -> dict[str, Any]:
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


def validate(toml: str, arguments: str, run: dict[str, Any]) -> None:
    """Hold both files, as a reader sees them, against the run that they were written from.

    Raises:  RecipeRefused: the first part that differs.
    """
    pairs: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        (TOML_FILE, run, tomllib.loads(toml)),
        (ARGUMENTS_FILE, megatron_arguments(run), parse_arguments(arguments)),
    ]
    for name, meant, found in pairs:
        for key in (*meant, *found):
            if key not in meant or key not in found or meant[key] != found[key]:
                raise RecipeRefused(
                    "a file does not read back as what was meant",
                    where=f"{name}: {key}",
                    expected=repr(meant.get(key))[:200],
                    found=repr(found.get(key))[:200],
                    next_step="mend the writer in recipes/train/run_files.py",
                )
