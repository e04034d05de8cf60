"""The Stage 1 run as Megatron's command-line arguments, and as comments what upstream has no flag for.

Place in the path: stage1_handoff -> **megatron_arguments** -> run_files. Pure: the run's document in, flags out.

Invariants: every figure comes from the document; nothing is said in a flag that the document does not say.

Example:
    text = write_arguments(megatron_arguments(run), comments=megatron_comments(run))

Source: `megatron/training/arguments.py` of Megatron-LM.
"""

from __future__ import annotations

from typing import Any

# NullTokenizer counts its own end of document besides, so that the padded vocabulary is one more than is said here.
_TOKENIZER = "NullTokenizer"


def megatron_arguments(run: dict[str, Any]) -> dict[str, str | None]:
    """The run as Megatron's flags; what upstream has no flag for stands in `megatron_comments`."""
    batch, schedule, optimizer, periods = run["batch"], run["schedule"], run["optimizer"], run["periods"]
    return {
        **_switches(batch["precision"], run["data"]["packing"]),
        **model_arguments(run["model"]),
        "eod-id": str(run["tokenizer"]["end_of_document"]),
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
        "eval-iters": str(run["evaluation"]["batches"]),
        "log-interval": "1",
        "dist-ckpt-strictness": "raise_all",
    }


def model_arguments(model: dict[str, Any]) -> dict[str, str | None]:
    """The architecture as flags that stock Megatron knows, and those of the plugin for what it does not know.

    Args:    model: the fields of a student's config.
    """
    switches = ["group-query-attention", "untie-embeddings-and-output-weights", "qk-layernorm", "squared-relu"]
    # Squared ReLU has no fused kernel, nor have learnable frequencies; the other three want packages of their own.
    switches += ["no-bias-gelu-fusion", "no-rope-fusion", "no-persist-layer-norm", "no-gradient-accumulation-fusion"]
    switches += ["no-bias-dropout-fusion"]
    return {
        **dict.fromkeys(switches),
        "transformer-impl": "local",
        "num-layers": str(model["num_layers"]),
        "hidden-size": str(model["hidden_size"]),
        "ffn-hidden-size": str(model["ffn_hidden_size"]),
        "num-attention-heads": str(model["num_query_heads"]),
        "num-query-groups": str(model["num_kv_heads"]),
        "kv-channels": str(model["head_dim"]),
        "tokenizer-type": _TOKENIZER,
        "vocab-size": str(model["vocab_size"] - 1),
        "make-vocab-size-divisible-by": "1",
        "max-position-embeddings": str(model["max_sequence"]),
        "normalization": "RMSNorm",
        "norm-epsilon": repr(model["norm_eps"]),
        "attention-dropout": "0.0",
        "hidden-dropout": "0.0",
        "position-embedding-type": "rope",
        "softmax-type": "learnable",
        "rotary-base": str(int(model["rope_base"])),
        **(_real_arguments(model) if model["attention"] == "tpa" else {}),
        "value-residual": None,
        **(_moe_arguments(model["num_layers"], model["moe"]) if model["moe"] else {}),
    }


def _real_arguments(model: dict[str, Any]) -> dict[str, str | None]:
    """Windowed layers with TPA and rotary positions that learn, global ones with ALiBi instead."""
    return {
        # Two numbers: keys before the query and after it; the window counts the query itself. Global layers have none.
        "window-size": f"{model['window'] - 1},0",
        "window-attn-skip-freq": str(model["global_every"]),
        "no-rope-freq": str(model["global_every"]),
        "use-tpa": None,
        "tpa-q-rank": str(model["query_rank"]),
        "tpa-rank": str(model["kv_rank"]),
        "grape-m": None,
        "grape-a": None,
    }


def _switches(precision: str, packing: str) -> dict[str, str | None]:
    names = ["override-opt-param-scheduler"]
    # Upstream resets behind each <|endoftext|>: the end of every document, and every place of padding.
    names += ["reset-position-ids", "reset-attention-mask"] if packing != "whole_row" else []
    return dict.fromkeys(names + (["bf16"] if precision == "bf16" else []))


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
        "moe-router-enable-expert-bias": None,
        "moe-router-bias-update-rate": repr(moe["bias_update_rate"]),
        "moe-router-load-balancing-type": "seq_aux_loss",
        "moe-aux-loss-coeff": repr(moe["balance_loss_weight"]),
    }


_BEST_FIT = (
    "no upstream flag: rows of whole documents, packed by best fit; upstream slices, so the data loader must pack",
    "with that packing --reset-position-ids and --reset-attention-mask still apply: documents and padding end in EOD",
    "no upstream flag: padding is EOD with loss mask 0; it is left out of token counts, router loads and balance loss",
)


def _data_paths(data: dict[str, Any]) -> list[str]:
    """Prefixes below a directory that is not known here; mask and span have no flag."""
    parts = " and ".join(f"_{name}" for name in data["arrays"][1:])
    return [
        f"--{split}-data-path, each below the directory of the data: "
        + " ".join(f"{prefix}_{data['arrays'][0]}" for prefix in data[split])
        for split in ("train", "valid")
    ] + [f"no upstream flag: beside each of these prefixes lie those of loss mask and span, {parts}"]


def _end_of_document(token: int) -> list[str]:
    return [
        f"--reset-position-ids and --reset-attention-mask reset behind tokenizer.eod, so that must answer {token}",
        "no stock tokenizer does: HuggingFaceTokenizer on the one above answers 200002 (<|return|>), which comes",
        f"right before {token}: resets come one token early, and {token} opens the next document;",
        "NullTokenizer answers an id that is not in the data: attention runs through documents without a word;",
        f"the trainer must set its tokenizer's eod to {token} (<|endoftext|>): the plugin's --eod-id {token} does",
    ]


def megatron_comments(run: dict[str, Any]) -> list[str]:
    """What the flags cannot say: the inputs by digest, and what the model code and the data loader must bring."""
    optimizer = run["optimizer"]
    rates = ", ".join(f"{name} {optimizer[name]!r}" for name in sorted(optimizer) if name.endswith("_rate"))
    return [
        f"Stage 1 of {run['object']}; the whole contract is in the TOML beside this file",
        *(f"{role}: {one['ref']} {one['digest']}" for role, one in run["inputs"].items()),
        f"data manifest: {run['data']['manifest']['path']} {run['data']['manifest']['digest']}",
        f"tokenizer ranks: sha256 {run['tokenizer']['ranks_sha256']}",
        f"teacher of the later stages: {run['teacher']['model']}",
        "add on the first start: --finetune (no optimizer state, step 0); on every start: --load, --save, data paths",
        f"no upstream flag: the data's order has a seed of its own, {run['seeds']['data_order']}",
        f"no upstream flag: router figures every {run['periods']['router_log']} steps; logs and stop rules of the TOML",
        *_data_paths(run["data"]),
        *(_end_of_document(run["tokenizer"]["end_of_document"]) if run["data"]["packing"] != "whole_row" else ()),
        *(_BEST_FIT if run["data"]["packing"] == "best_fit" else ()),
        "of the plugin, megatron_plugin/: --use-tpa --tpa-q-rank --tpa-rank --grape-m --grape-a --value-residual",
        "GRAPE-M frequencies, softmax offsets and residual logits are float32; the shared expert has its output bias",
        f"no upstream flag: NorMuon for matrices, AdamW for the others; {rates}",
        "no upstream flag: NorMuon's second moment [rows, 1] is part of a saved state, and a load needs its shape",
        f"no upstream flag: ids from {run['loss']['mask_ids_from']} on are no part of the softmax",
        f"no upstream flag: {run['loss']['formula']}; {run['loss']['normalisation']}",
    ]
