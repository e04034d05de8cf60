"""Make donors of the real shapes with random weights, laid out as the real ones are.

The published weights cannot be shipped; their shapes can. What this writes goes through the same recipes as the real
donors under the profile `upcycle`, once a provenance file pins it: the published digests do not fit random weights, so
this also writes a provenance of its own and says where to name it.

Use: python -m benchmarks.full_shape_donors OUT [--hidden 1024] [--layers 28] [--reference-width 2880] [--seed 0]

Sizes at the defaults: 1.5 GB for the donor, 2.3 GB for the vocabulary reference, in bfloat16.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from recipes.checkpoint import donor_config_json
from recipes.model.config import PADDED_VOCAB, DonorConfig
from recipes.model.donor import Donor
from recipes.tensors import write_safetensors

ROOT = Path(__file__).resolve().parent.parent


def random_weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal weights of standard deviation 1/sqrt(fan in); vectors, which are norm gains, are ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()


def make_donor(folder: Path, config: DonorConfig, seed: int) -> None:
    """A directory like Qwen3-0.6B's: config.json, model.safetensors, tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Donor(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: random_weight(shape, generator) for name, shape in sorted(shapes.items())}
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(donor_config_json(config), indent=2) + "\n")
    shutil.copy(ROOT / "assets/embedded_donor/tokenizer.json", folder / "tokenizer.json")


def make_reference(folder: Path, width: int, tokenizer_json: Path, seed: int) -> None:
    """A directory like gpt-oss-20b's, reduced to what the chain reads: embedding and head in two shards, an index."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map = {}
    for number, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        shard = f"model-{number:05d}-of-00001.safetensors"
        write_safetensors(folder / shard, {name: random_weight((PADDED_VOCAB, width), generator)})
        weight_map[name] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shape = {"vocab_size": PADDED_VOCAB, "hidden_size": width, "tie_word_embeddings": False, "model_type": "gpt_oss"}
    (folder / "config.json").write_text(json.dumps(shape, indent=2) + "\n")
    shutil.copy(tokenizer_json, folder / "tokenizer.json")


def provenance(folder: Path, name: str) -> Mapping[str, object]:
    """A provenance document that pins what lies in `folder`."""
    files = []
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with path.open("rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        files.append({"path": path.name, "sha256": digest, "size_bytes": path.stat().st_size})
    return {
        "format": 1,
        "name": name,
        "origin": "benchmarks.full_shape_donors: random weights of the real shapes",
        "revision": "random",
        "license": "Apache-2.0",
        "root": str(folder),
        "files": files,
    }


def main() -> None:
    """Write both donors and their provenance files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--ffn", type=int, default=3072)
    parser.add_argument("--reference-width", type=int, default=2880)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--o200k-tokenizer", type=Path, required=True, help="tokenizer.json of `vpstore resolve o200k-harmony`"
    )
    args = parser.parse_args()
    config = DonorConfig(hidden_size=args.hidden, num_hidden_layers=args.layers, intermediate_size=args.ffn)
    out = args.out.resolve()
    make_donor(out / "qwen3-0_6B", config, args.seed)
    make_reference(out / "gpt-oss-20b", args.reference_width, args.o200k_tokenizer, args.seed + 1)
    for name in ("qwen3-0_6B", "gpt-oss-20b"):
        (out / f"{name}.provenance.json").write_text(json.dumps(provenance(out / name, name), indent=2) + "\n")
        print(out / f"{name}.provenance.json")


if __name__ == "__main__":
    main()
