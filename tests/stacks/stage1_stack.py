"""The first steps of Stage 1 in stock Megatron-Core with the plugin, in a process of its own, on a CPU.

Use:  python stage1_stack.py EXPORT DATA OUT --until N

It starts from EXPORT, or goes on from what it saved in OUT, and saves there when it stops. Rows are Megatron's own
GPTDataset over DATA/train/shard_00_tokens, with documents that end at 199999; spans are read by the same reader from
the array beside. The optimizer is torch's AdamW, since Megatron's own wants a GPU; its state is kept by Megatron's own
functions. Prints JSON: loss, balance loss and gradient norm of every step. OUT/rows.pt has the rows of every step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from core_stack import COMMON, VOCABULARY, divided, model_of, start

EOD, LENGTH, ROWS, STEPS = 199999, 192, 2, 5
# Stage 1's rate of AdamW and its other figures, with the warm-up cut to the length of this run.
RATE, BETAS, EPSILON, DECAY, CLIP, WARM_UP, SEED = 3e-4, (0.9, 0.999), 1e-8, 0.01, 1.0, 5, 20260102


class Tokenizer:
    """What GPTDataset asks of a tokenizer."""

    eod = EOD
    pad = EOD
    vocab_size = VOCABULARY
    unique_identifiers = {"class": "fixed", "eod": EOD}  # noqa: RUF012 - never changed


def dataset(prefix: Path, cache: Path) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=LENGTH,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=Tokenizer(),
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [STEPS * ROWS, 0, 0], lambda: True, config).build()[0]


def rows_of(data: Path, cache: Path) -> list[dict[str, torch.Tensor]]:
    """Every step's ids, labels, spans, positions and masks."""
    tokens, spans = (dataset(data / "train" / f"shard_00_{name}", cache / name) for name in ("tokens", "span"))
    steps = []
    for first in range(0, STEPS * ROWS, ROWS):
        rows = [tokens[first + row] for row in range(ROWS)]
        step = {name: torch.stack([row[name] for row in rows]) for name in ("tokens", "labels", "position_ids")}
        step["hidden"] = torch.stack([row["attention_mask"] for row in rows])
        # Index t of a span speaks of label t, as the arrays of the data set are kept.
        step["span"] = torch.stack([spans[first + row]["tokens"] for row in range(ROWS)])
        steps.append(step)
    return steps


def loss_of(logits: torch.Tensor, labels: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """Mean of the reasoning's losses, and of the final answer's, as Stage 1 adds them."""
    losses = torch.logsumexp(logits, -1) - logits.gather(-1, labels[..., None])[..., 0]
    means = [losses[span == one].mean() for one in (1, 2) if bool((span == one).any())]
    return torch.stack(means).sum()


def optimizer_of(model: Any) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    for parameter in model.parameters():
        zeros = torch.zeros_like(parameter)
        optimizer.state[parameter] = {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    return optimizer


def state_of(model: Any, optimizer: torch.optim.AdamW, step: int) -> dict[str, Any]:
    """Weights and optimizer as Megatron keeps them, each tensor under its own key."""
    from megatron.core.dist_checkpointing.optimizer import (
        get_param_id_to_sharded_param_map,
        optim_state_to_sharding_state,
    )

    sharded = model.sharded_state_dict()
    optimizer_state = optimizer.state_dict()
    names = get_param_id_to_sharded_param_map(sharded, model.parameters())
    optim_state_to_sharding_state(optimizer_state, names, exclude_keys=("step",))
    return {**sharded, "optimizer": optimizer_state, "iteration": step}


def restored(model: Any, optimizer: torch.optim.AdamW, folder: Path) -> int:
    from megatron.core import dist_checkpointing

    found = dist_checkpointing.load(state_of(model, optimizer, 0), str(folder), strict="raise_all")
    step, state = int(found.pop("iteration")), found.pop("optimizer")
    model.load_state_dict({key: value for key, value in found.items() if key not in COMMON}, strict=True)
    for one in state["state"].values():
        one["step"] = torch.tensor(float(step))
    optimizer.load_state_dict(state)
    return step


def train(model: Any, optimizer: torch.optim.AdamW, step: int, row: dict[str, torch.Tensor]) -> dict[str, float]:
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    optimizer.zero_grad()
    loss = loss_of(model(row["tokens"], row["position_ids"], row["hidden"]), row["labels"], row["span"])
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for group in optimizer.param_groups:
        group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP)
    optimizer.step()
    _update_router_expert_bias([model], model.config)
    for module in model.modules():
        if hasattr(module, "local_tokens_per_expert"):
            module.local_tokens_per_expert.zero_()
    return {"loss": loss.item(), "norm": norm.item()}


def main() -> None:
    from megatron.core import dist_checkpointing

    parser = argparse.ArgumentParser()
    for name in ("export", "data", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--until", type=int, default=STEPS)
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True, warn_only=True)
    start(0, 1, tempfile.mktemp())
    divided()
    options.out.mkdir(exist_ok=True)
    rows = rows_of(options.data, options.out / "cache")
    torch.save(rows, options.out / "rows.pt")
    model, saved = model_of(options.export), options.out / "saved"
    optimizer, first = optimizer_of(model), 0
    folder = saved if saved.is_dir() else options.export / "release"
    if folder == saved:
        first = restored(model, optimizer, folder)
    else:
        found = dist_checkpointing.load(model.sharded_state_dict(), str(folder), strict="raise_all")
        model.load_state_dict({key: value for key, value in found.items() if key not in COMMON}, strict=True)
    figures = [train(model, optimizer, step, rows[step]) for step in range(first, options.until)]
    shutil.rmtree(saved, ignore_errors=True)
    saved.mkdir()
    dist_checkpointing.save(state_of(model, optimizer, options.until), str(saved))
    print(json.dumps({"first": first, "steps": figures}))


if __name__ == "__main__":
    main()
