"""Stock Megatron-Core with the plugin, on a CPU, in a process of its own: loads exported folders and compares.

Use:  python core_stack.py single CASE...         every case: strict load, logits, loss, gradients, a folder of its own
      python core_stack.py ranks DENSE EXPERTS    one of two processes under gloo: layouts, logits in tensor parallel

It knows nothing of the project: `python` may be any that has torch and megatron-core. A case is an exported folder with
an `expected.pt` beside: ids, documents, a sample of logits, the loss, gradients by Megatron's key. Prints JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "megatron_plugin"))

import torch  # noqa: E402

# Megatron makes some tensors on "the current device" and waits for it, whatever the model's own is.
torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]

VOCABULARY, STRIDE = 201088, 997
COMMON = ("checkpoint_version", "iteration", "content_metadata")
# Flags whose field has another name, as core_transformer_config_from_args and the parser translate them.
RENAMED = {
    "norm-epsilon": "layernorm_epsilon", "num-experts": "num_moe_experts",
    "no-bias-gelu-fusion": "bias_activation_fusion", "no-rope-fusion": "apply_rope_fusion",
    "no-persist-layer-norm": "persist_layer_norm", "no-bias-dropout-fusion": "bias_dropout_fusion",
    "no-gradient-accumulation-fusion": "gradient_accumulation_fusion",
}  # fmt: skip
# Flags that say nothing to a TransformerConfig.
NO_FIELD = {
    "group-query-attention", "untie-embeddings-and-output-weights", "tokenizer-type", "vocab-size",
    "make-vocab-size-divisible-by", "max-position-embeddings", "position-embedding-type", "rotary-base",
    "eod-id", "ckpt-format", "no-load-optim", "no-load-rng", "dist-ckpt-strictness",
}  # fmt: skip


def flags_of(text: str) -> dict[str, str | None]:
    rows = [shlex.split(line, comments=True) for line in text.splitlines()]
    return {row[0].removeprefix("--"): row[1] if len(row) > 1 else None for row in rows if row}


def fields_of(flags: dict[str, str | None], names: set[str]) -> dict[str, Any]:
    """What the flags come to for a config that has fields of these names."""
    found: dict[str, Any] = {}
    for flag, text in flags.items():
        name = RENAMED.get(flag, flag.replace("-", "_"))
        if flag == "squared-relu":
            found["activation_func"] = squared_relu
        elif flag == "moe-layer-freq":
            dense, experts = (text or "").split("+")
            found[name] = json.loads(dense) + json.loads(experts.split("*")[0]) * int(experts.split("*")[1])
        elif flag == "window-size":
            found[name] = tuple(int(part) for part in (text or "").split(","))
        elif flag not in NO_FIELD:
            assert name in names, f"--{flag} is no field {name}"
            found[name] = (not flag.startswith("no-")) if text is None else _value(text)
    return found


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).square()


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def config_of(text: str, **changes: Any) -> Any:
    """A VpConfig from an argument file; on a CPU, without random weights."""
    from vp_megatron import VpConfig

    names = {field.name for field in dataclasses.fields(VpConfig)}
    fields = fields_of(flags_of(text), names)
    return VpConfig(**fields, use_cpu_initialization=True, perform_initialization=False, **changes)


def model_of(case: Path, **changes: Any) -> Any:
    from vp_megatron import VpModel

    config = config_of((case / "arguments-stock.txt").read_text(), **changes)
    return VpModel(config, vocab_size=VOCABULARY, max_sequence_length=2048)


def loaded(model: Any, folder: Path) -> Any:
    from megatron.core import dist_checkpointing

    found = dist_checkpointing.load(model.sharded_state_dict(), str(folder), strict="raise_all")
    model.load_state_dict({key: value for key, value in found.items() if key not in COMMON}, strict=True)
    return model


def inputs_of(expected: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, positions, and the mask that keeps documents apart, True where a token may not look."""
    ids, documents = expected["ids"], expected["documents"]
    index = torch.arange(ids.shape[1])
    hidden = (documents[:, None, :, None] != documents[:, None, None, :]) | (index[:, None] < index)
    return ids, index[None].expand_as(ids), hidden


def single(case: Path) -> dict[str, float]:
    from megatron.core import dist_checkpointing

    expected = torch.load(case / "expected.pt")
    model = loaded(model_of(case), case / "release").eval()  # in training Megatron adds the balance loss to gradients
    ids, positions, hidden = inputs_of(expected)
    if case.name == "plain-order":
        with torch.no_grad():
            return {"logits": apart(model(ids, positions, hidden)[..., ::STRIDE], expected["logits"])}
    logits = model(ids, positions, hidden)
    # Megatron's own cross entropy works in place, which breaks in backward; it is compared without gradients.
    with torch.no_grad():
        losses = model(ids, positions, hidden, labels=ids.roll(-1, dims=1))
    rows = logits[:, :-1]
    loss = (torch.logsumexp(rows, -1) - rows.gather(-1, ids[:, 1:, None])[..., 0]).mean()
    loss.backward()
    sample = logits[..., ::STRIDE].detach()
    found = {
        "logits": apart(sample, expected["logits"]),
        "loss": abs(loss.item() - expected["loss"]),
        "own_loss": abs(float(losses[:, :-1].mean()) - expected["loss"]),
        **gradients(model, expected["gradients"]),
    }
    saved = case / os.environ.get("SAVED", "saved")
    saved.mkdir()
    dist_checkpointing.save(model.sharded_state_dict(), str(saved))
    narrow = model.bfloat16()
    found["float32_after_cast"] = sum(p.dtype == torch.float32 for p in narrow.parameters())
    return found


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def gradients(model: Any, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    own = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    for name, grad in own.items():
        key = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        key = key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        if ".local_experts." in key:
            before, _, after = key.partition(".local_experts.")
            expert, _, part = after.partition(".")
            stack = found.setdefault(f"{before}.experts.{part}", torch.zeros(0, *grad.shape))
            assert stack.shape[0] == int(expert)
            found[f"{before}.experts.{part}"] = torch.cat((stack, grad[None]))
        else:
            found[key] = grad
    assert found.keys() == expected.keys()
    return {"gradient_tensors": len(own), "gradients": max(apart(found[key], expected[key]) for key in found)}


def faults(case: Path) -> dict[str, str]:
    """What the plugin says of configs that it has no code for; nothing if it takes them."""
    import vp_megatron

    text = (case / "arguments-stock.txt").read_text()
    bad = {
        "pipeline": {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32},
        "recompute": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        "context": {"context_parallel_size": 2},
        "tensor": {"tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 1},
        "experts": {"moe_shared_expert_overlap": True, "moe_token_dispatcher_type": "alltoall"},
        "version": {},
        "good": {},
    }
    found = {}
    for name, changes in bad.items():
        versions = vp_megatron.MEGATRON
        vp_megatron.MEGATRON = ((0, 1), (0, 2)) if name == "version" else versions
        try:
            config_of(text, **changes)
            found[name] = ""
        except vp_megatron.UnfitConfig as error:
            found[name] = str(error)
        vp_megatron.MEGATRON = versions
    return found


def tensor_parallel(case: Path) -> dict[str, float]:
    """Logits of this rank's half of the vocabulary."""
    from megatron.core import parallel_state

    divided(tensor_model_parallel_size=2)
    expected = torch.load(case / "expected.pt")
    model = loaded(model_of(case, tensor_model_parallel_size=2), case / "release")
    with torch.no_grad():
        logits = model(*inputs_of(expected))
    rank = parallel_state.get_tensor_model_parallel_rank()
    half = VOCABULARY // 2
    index = torch.arange(0, VOCABULARY, STRIDE)
    is_mine = (index // half) == rank
    sample = logits[..., index[is_mine] - rank * half]
    return {"logits": apart(sample, expected["logits"][..., is_mine])}


def expert_parallel(case: Path) -> dict[str, float]:
    """Whether this rank has its half of the experts."""
    from megatron.core import parallel_state

    divided(expert_model_parallel_size=2)
    whole = torch.load(case / "expected.pt")["experts"]
    model = loaded(model_of(case, expert_model_parallel_size=2), case / "release")
    rank = parallel_state.get_expert_model_parallel_rank()
    mine = model.decoder.layers[-1].mlp.experts.local_experts
    part = whole[rank * len(mine) : (rank + 1) * len(mine)]
    return {"experts": float(all(torch.equal(e.linear_fc1.weight, w) for e, w in zip(mine, part, strict=True)))}


def start(rank: int, world: int, file: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)


def divided(**sizes: int) -> None:
    """Give the ranks their parts."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)


def main() -> None:
    kind, cases = sys.argv[1], [Path(name) for name in sys.argv[2:]]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if kind == "single":
        start(0, 1, tempfile.mktemp())
        divided()
        print(json.dumps({"faults": faults(cases[-1]), **{case.name: single(case) for case in cases}}))
        return
    start(int(os.environ["RANK"]), 2, os.environ["MEETING"])
    print(json.dumps({**tensor_parallel(cases[0]), **expert_parallel(cases[1])}))


if __name__ == "__main__":
    main()
