"""Write the Stage 1 run that consumes vpMoE by its digest: as TOML, and as arguments for Megatron.

Place in the path: config -> **recipe**; a plan without tensors. The trainer of Stage 1 reads `stage1.toml` and refuses
to start if a digest in it is not that of what it has before it.

Invariants: figures of the architecture come from the checkpoint's config.json, never from here; both files are parsed
back and held against the params before they count as written; nothing in them depends on time, host or path.

Example:
    stage stage1@main, inputs checkpoint = vpMoE@smoke, data = healing_text, tokenizer = o200k-harmony
"""

from __future__ import annotations

import tomllib
from typing import Any

from recipes.checkpoint import parse_student_config
from recipes.data.encodings import O200K_HARMONY
from recipes.model.config import MoeConfig, StudentConfig
from recipes.params.stage1_handoff import Params
from recipes.recipe import Context, Gate, Plan, Report, bytes_file
from recipes.train.losses import VALID_VOCAB
from recipes.train.run_files import parse_arguments, to_toml, write_arguments
from vpstore.errors import RecipeRefused

TOML_FILE, ARGUMENTS_FILE = "stage1.toml", "megatron_args.txt"
FORMAT = 1
# What must be equal, by digest, for a run to start or to go on.
IDENTITY = ("checkpoint", "data", "tokenizer", "config")

STEP_LOGS = (
    "loss_total", "cross_entropy", "cross_entropy_reasoning", "cross_entropy_final", "tokens_plain", "tokens_reasoning",
    "tokens_final", "learning_rate_by_group", "gradient_norm", "tokens_per_second", "consumed_samples",
)  # fmt: skip
ROUTER_LOGS = (
    "sequence_auxiliary_loss", "cv_percent", "entropy", "max_load_percent", "active_experts", "dead_experts",
    "expert_bias_min", "expert_bias_max",
)  # fmt: skip
EVALUATION_LOGS = ("held_out_cross_entropy_reasoning", "held_out_cross_entropy_final", "format_validity")
PROVENANCE_LOGS = ("git_sha", "config_digest", "tokenizer_digest", "data_manifest_digest", "checkpoint_digest")
STATE_PARTS = (
    "weights", "normuon_momentum", "normuon_second_moment", "adamw_mean", "adamw_square", "adamw_step", "expert_bias",
    "log_freq_float32", "random_generators", "epoch", "consumed_samples", "shuffle_seed", "schedule_step",
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
    if params.schedule.warmup_steps >= _steps(params):
        raise _refusal("the warm-up is the whole run", f"below {_steps(params)}", str(params.schedule.warmup_steps))
    return config.moe


def _refusal(what: str, expected: str, found: str) -> RecipeRefused:
    return RecipeRefused(
        what, where="stage1", expected=expected, found=found, next_step="mend the TOML of stage1, or its inputs"
    )


def _steps(params: Params) -> int:
    """Steps that reach the token target."""
    per_step = params.batch.sequence_length * params.batch.global_sequences
    return -(-params.batch.target_tokens // per_step)


def run_config(context: Context, config: StudentConfig, moe: MoeConfig) -> dict[str, Any]:
    """The whole run as one document of plain values."""
    params: Params = context.params
    steps = _steps(params)
    batch = params.batch.model_dump(mode="json")
    batch |= {"steps": steps, "tokens": steps * params.batch.sequence_length * params.batch.global_sequences}
    return {
        "format": FORMAT,
        "object": "vpMoE",
        "identity": {"refuse_if_different": list(IDENTITY)},
        "inputs": {role: {"ref": found.ref, "digest": found.digest} for role, found in sorted(context.inputs.items())},
        "model": config.model_dump(mode="json"),
        "batch": batch,
        "loss": _loss(params),
        "schedule": {**params.schedule.model_dump(mode="json"), "restart": True},
        "optimizer": _optimizer(params),
        "router": _router(moe),
        "data": _data(params, [role for role in sorted(context.inputs) if role not in ("checkpoint", "tokenizer")]),
        "seeds": params.seeds.model_dump(mode="json"),
        "periods": params.periods.model_dump(mode="json"),
        "logging": _logging(moe),
        "resume": {
            "state": list(STATE_PARTS),
            "test": "2n steps equal n steps, a kill, a load and n steps, bit for bit on a CPU or with fixed kernels",
        },
        "stop": params.stop.model_dump(mode="json"),
        "teacher": {"model": params.teacher, "used_in": [stage.name for stage in params.later_stages]},
        "later_stages": [stage.model_dump(mode="json") for stage in params.later_stages],
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


def _data(params: Params, roles: list[str]) -> dict[str, Any]:
    return {
        "roles": roles,
        "prefixes": ["tokens", "lossmask", "span"],
        "packing": params.packing,
        "attention": "inside a document; positions restart at each document",
        "truncation": "structured: the final message is kept whole, analysis is cut from the left under its header",
        "mask_and_span": "index t speaks of label t + 1",
        "order": "by seed and epoch, independent of the number of processes",
        "harmony": "strict: every row parses before it is trained on",
    }


def _logging(moe: MoeConfig) -> dict[str, Any]:
    return {
        "every_step": list(STEP_LOGS),
        "router": list(ROUTER_LOGS),
        "evaluation": list(EVALUATION_LOGS),
        "once": list(PROVENANCE_LOGS),
        "router_scope": "each layer, and over all layers",
        "uniform_max_load_percent": 100.0 / moe.num_experts,
        "experts": moe.num_experts,
    }


def megatron_arguments(run: dict[str, Any]) -> dict[str, str | None]:
    """The run as Megatron's flags; what upstream has no flag for stands in `megatron_comments`."""
    model, moe, batch = run["model"], run["model"]["moe"], run["batch"]
    schedule, optimizer, periods = run["schedule"], run["optimizer"], run["periods"]
    return {
        **_switches(batch["precision"]),
        "num-layers": str(model["num_layers"]),
        "hidden-size": str(model["hidden_size"]),
        "ffn-hidden-size": str(model["ffn_hidden_size"]),
        "num-attention-heads": str(model["num_query_heads"]),
        "num-query-groups": str(model["num_kv_heads"]),
        "kv-channels": str(model["head_dim"]),
        "vocab-size": str(model["vocab_size"]),
        "make-vocab-size-divisible-by": "1",
        "max-position-embeddings": str(model["max_sequence"]),
        "normalization": "RMSNorm",
        "norm-epsilon": repr(model["norm_eps"]),
        "attention-dropout": "0.0",
        "hidden-dropout": "0.0",
        # Two numbers: keys before the query and after it; the window counts the query itself.
        "window-size": f"{model['window'] - 1},0",
        "softmax-type": "learnable",
        "no-rope-freq": str(model["global_every"]),
        "rotary-base": str(int(model["rope_base"])),
        **_moe_arguments(model["num_layers"], moe),
        "seq-length": str(batch["sequence_length"]),
        "global-batch-size": str(batch["global_sequences"]),
        "micro-batch-size": str(batch["micro_sequences"]),
        "train-iters": str(batch["steps"]),
        "lr": repr(optimizer["matrix_rate"]),
        "min-lr": repr(optimizer["matrix_rate"] * schedule["final"]),
        "lr-decay-style": schedule["shape"],
        "lr-warmup-iters": str(schedule["warmup_steps"]),
        "lr-decay-iters": str(batch["steps"]),
        "weight-decay": repr(optimizer["matrix_decay"]),
        "clip-grad": repr(optimizer["clip_norm"]),
        "adam-beta1": repr(optimizer["adam_beta1"]),
        "adam-beta2": repr(optimizer["adam_beta2"]),
        "adam-eps": repr(optimizer["adam_epsilon"]),
        "seed": str(run["seeds"]["model"]),
        "save-interval": str(periods["save"]),
        "eval-interval": str(periods["evaluate"]),
        "log-interval": "1",
        "dist-ckpt-strictness": "raise_all",
    }


def _switches(precision: str) -> dict[str, str | None]:
    names = ["group-query-attention", "untie-embeddings-and-output-weights", "qk-layernorm", "squared-relu"]
    names += ["reset-position-ids", "reset-attention-mask", "override-opt-param-scheduler"]
    names += ["moe-router-enable-expert-bias"] + (["bf16"] if precision == "bf16" else [])
    return dict.fromkeys(names)


def _moe_arguments(layers: int, moe: dict[str, Any]) -> dict[str, str | None]:
    return {
        "num-experts": str(moe["num_experts"]),
        "moe-layer-freq": f"[0]+[1]*{layers - 1}",
        "moe-ffn-hidden-size": str(moe["expert_hidden_size"]),
        "moe-shared-expert-intermediate-size": str(moe["shared_hidden_size"]),
        "moe-router-topk": str(moe["top_k"]),
        "moe-router-num-groups": str(moe["num_groups"]),
        "moe-router-group-topk": str(moe["top_groups"]),
        "moe-router-topk-scaling-factor": repr(moe["routed_scaling"]),
        "moe-router-score-function": "sigmoid",
        "moe-router-dtype": "fp32",
        "moe-router-bias-update-rate": repr(moe["bias_update_rate"]),
        "moe-router-load-balancing-type": "seq_aux_loss",
        "moe-aux-loss-coeff": repr(moe["balance_loss_weight"]),
    }


def megatron_comments(run: dict[str, Any]) -> list[str]:
    """What the flags cannot say: the inputs by digest, and what the model code and the data loader must bring."""
    optimizer = run["optimizer"]
    rates = ", ".join(f"{name} {optimizer[name]!r}" for name in sorted(optimizer) if name.endswith("_rate"))
    return [
        f"Stage 1 of {run['object']}; the whole contract is in {TOML_FILE}",
        *(f"{role}: {one['ref']} {one['digest']}" for role, one in run["inputs"].items()),
        f"teacher of the later stages: {run['teacher']['model']}",
        "no upstream flag: TPA on local layers, GRAPE-M frequencies in float32, ALiBi on global layers, value residual",
        "no upstream flag: the shared expert's output bias is applied; linear biases everywhere",
        f"no upstream flag: NorMuon for matrices, AdamW for the others; {rates}",
        f"no upstream flag: ids from {run['loss']['mask_ids_from']} on are no part of the softmax",
        f"no upstream flag: {run['loss']['formula']}; {run['loss']['normalisation']}",
    ]


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
