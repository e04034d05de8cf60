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
from recipes.data.packed_rows import PackedRows, packed_rows
from recipes.model.config import MoeConfig, StudentConfig
from recipes.params.stage1_handoff import Params
from recipes.recipe import Context, Gate, InputArtifact, Plan, Report, bytes_file
from recipes.train.megatron_arguments import megatron_arguments, megatron_comments
from recipes.train.run_files import parse_arguments, to_toml, write_arguments
from recipes.train.stage1_tables import (
    END_OF_DOCUMENT,
    evaluation_table,
    logging_table,
    loss_table,
    optimizer_table,
    packing_table,
    router_table,
    schedule_table,
    teacher_table,
    tokenizer_table,
)
from vpstore.errors import RecipeRefused

TOML_FILE, ARGUMENTS_FILE = "stage1.toml", "megatron_args.txt"
FORMAT = 1
DATA_KIND = "synth_kd"
# What must be equal, by digest, for a run to start or to go on.
IDENTITY = ("checkpoint", "data", "data_manifest", "tokenizer", "config")
_HARMONY = (
    "every document's control tokens and spans were checked when it was written: the frame, a question, one analysis, "
    "one final with words; the first rows of each source were compared with openai-harmony token by token, if not cut"
)

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
        "identity": {
            "refuse_if_different": list(IDENTITY),
            "config": "the BLAKE3 of this file's bytes",
            "to_go_on": "the trainer's own code too: its digest is part of a saved state",
        },
        "inputs": {role: {"ref": found.ref, "digest": found.digest} for role, found in sorted(context.inputs.items())},
        "model": config.model_dump(mode="json"),
        "batch": batch,
        "loss": loss_table(params),
        "schedule": schedule_table(params),
        "tokenizer": tokenizer_table(),
        "optimizer": optimizer_table(params),
        "router": router_table(moe),
        "data": {
            **_arrays(data, train, valid),
            "epochs": batch["tokens"] / train.tokens,
            **packing_table(params.packing, rows),
            "end_of_document": END_OF_DOCUMENT,
            "mask_and_span": "index t speaks of label t + 1",
            "order": "by seed and epoch, independent of the number of processes",
            "harmony": _HARMONY,
        },
        "evaluation": evaluation_table(params, valid),
        "seeds": params.seeds.model_dump(mode="json"),
        "periods": params.periods.model_dump(mode="json"),
        "logging": logging_table(moe),
        "resume": {
            "state": list(STATE_PARTS),
            "test": "2n steps equal n steps, a kill, a load and n steps, bit for bit on a CPU or with fixed kernels",
        },
        "stop": params.stop.model_dump(mode="json"),
        "teacher": teacher_table(params),
        "smoke": params.smoke.model_dump(mode="json"),
        "later_stages": [stage.model_dump(mode="json") for stage in params.later_stages],
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
