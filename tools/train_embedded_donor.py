"""Train the embedded donor and write its folder.

    python -m tools.train_embedded_donor --corpus DIR --ranks assets/qwen.tiktoken --out DIR [--set main.steps=100]

DIR of --corpus holds the JSON-lines files that `tools/build_corpus.py` makes, and `prose.jsonl`, the shipped sample
that the donor is measured on. Written: config.json, model.safetensors, tokenizer.json, and training.json: params,
digests of all sources, figures, curves and the machine. It runs on the CPU unless VPSTORE_DEVICE=cuda asks for a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import tomllib
from hashlib import sha256
from pathlib import Path
from typing import Any

from recipes.params.embedded_donor import Params

DONOR_FILES = ("config.json", "model.safetensors", "tokenizer.json")
CONFIG = Path(__file__).parent.parent / "configs/upcycle/embedded_donor.toml"


def read_params(path: Path, overrides: list[str]) -> Params:
    """The typed params of the TOML, with `table.key=value` overrides, values in JSON."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    for each in overrides:
        name, _, value = each.partition("=")
        *place, key = name.split(".")
        at = table
        for part in place:
            at = at[part]
        at[key] = json.loads(value)
    return Params.model_validate_json(json.dumps({**table["main"], "donor": table["donor"]}))


def file_entry(path: Path, /, **naming: str) -> dict[str, Any]:
    """Digest and size of one file, under the key and name that are given."""
    data = path.read_bytes()
    return {**naming, "sha256": sha256(data).hexdigest(), "size_bytes": len(data)}


def show(label: str, done: int, total: int) -> None:
    """Progress on stderr, at every hundredth of the way."""
    if done * 100 // total != (done - 1) * 100 // total:
        print(f"\r{label} {done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)


def train(params: Params, sources: dict[str, Path], out: Path) -> dict[str, Any]:
    """Run the recipe, write the folder, return the log."""
    import safetensors
    import torch
    from safetensors.torch import save_file

    from recipes import embedded_donor, runtime
    from recipes.recipe import Context

    started = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        result = embedded_donor.run(Context(params, {}, sources, Path(scratch), show))
    out.mkdir(parents=True, exist_ok=True)
    save_file(dict(result.tensors), out / "model.safetensors", metadata={"format": "pt"})
    for file in result.files:
        with (out / file.name).open("wb") as handle:
            file.write(handle)
    log = {
        "params": params.model_dump(mode="json"),
        "sources": [file_entry(path, name=name) for name, path in sorted(sources.items())],
        "files": [file_entry(out / name, path=name) for name in DONOR_FILES],
        "metrics": dict(result.report.metrics),
        "curves": {name: list(rows) for name, rows in result.report.plots.items()},
        "machine": {
            "device": torch.cuda.get_device_name() if runtime.device() == "cuda" else "CPU",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "seconds": round(time.time() - started, 1),
        },
    }
    (out / "training.json").write_text(json.dumps(log, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return log


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--ranks", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=JSON")
    options = parser.parse_args()
    sources = {f"corpus/{path.name}": path for path in sorted(options.corpus.glob("*.jsonl"))}
    sources["ranks/qwen.tiktoken"] = options.ranks
    log = train(read_params(options.config, options.set), sources, options.out)
    print(json.dumps({"metrics": log["metrics"], "machine": log["machine"]}, indent=1))


if __name__ == "__main__":
    main()
