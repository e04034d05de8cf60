"""Export a vpMoE of the real shapes to Megatron and load it once: time and memory beside a plain copy that is hashed.

The weights are random, 6.02 billion of them, 12 GB; shapes, dtypes and files are the real ones. Nothing is asked of a
store: the artifact is a folder, as a view shows it.

Use: python -m benchmarks.megatron_full_shape FOLDER [--layers N] [--load]
Needs four times the artifact's size on the disk of FOLDER. `--load` builds the plugin's model in bfloat16 on
VPSTORE_DEVICE, loads the export strictly, and computes one row: 12 GB of that device's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.projects import REPOSITORY

_SECONDS_BETWEEN = 0.05
_BLOCK = 1 << 24


def main() -> None:
    """Make the artifact, then measure each part in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--part", choices=sorted(PARTS))
    options = parser.parse_args()
    if options.part:
        print(json.dumps(_measured(PARTS[options.part], options)))
        return
    parts = ["make", "copy", "export", *(["load"] if options.load else [])]
    found: dict[str, Any] = {part: _apart(part, options) for part in parts}
    found["export_to_copy"] = found["export"]["seconds_written"] / found["copy"]["seconds"]
    print(json.dumps(found, indent=2))


def _apart(part: str, options: argparse.Namespace) -> Any:
    command = [sys.executable, "-m", "benchmarks.megatron_full_shape", str(options.folder), "--part", part]
    command += ["--layers", str(options.layers)]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measured(part: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The part's own figures, its seconds, and the most memory that was its own (mapped files are not)."""
    most, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(_SECONDS_BETWEEN):
            status = Path("/proc/self/status").read_text()
            most[0] = max(most[0], int(status.split("RssAnon:")[1].split()[0]) * 1024)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begun = time.perf_counter()
    figures = part(options)
    seconds = time.perf_counter() - begun
    is_over.set()
    watcher.join()
    return {"seconds": round(seconds, 1), "own_memory_gib": round(most[0] / 2**30, 2), **figures}


def make(options: argparse.Namespace) -> dict[str, Any]:
    """A random artifact of the real shapes, once."""
    import torch

    from recipes.checkpoint import TOKENIZER_FILES, expected_tensors, student_config_json
    from recipes.model.config import MoeConfig, StudentConfig
    from recipes.names import INDEX_FILE
    from recipes.shards import ShardWriter
    from recipes.tensors import TORCH_DTYPES, planned

    artifact = options.folder / "artifact"
    if (artifact / "config.json").is_file():
        return {"size_bytes": _size(artifact)}
    config = StudentConfig(
        hidden_size=1024, num_layers=options.layers, ffn_hidden_size=512, attention="tpa", moe=MoeConfig()
    )
    block = 0.02 * torch.randn(_BLOCK, generator=torch.Generator().manual_seed(1))

    def drawn(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        count = max(1, torch.Size(shape).numel())
        return block.repeat(-(-count // _BLOCK))[:count].reshape(shape).to(TORCH_DTYPES[dtype])

    specs = expected_tensors(config)
    tensors = [planned(n, shape, dtype, lambda s=shape, d=dtype: drawn(s, d)) for n, (dtype, shape) in specs.items()]
    writer = ShardWriter(artifact, tensors)
    writer.prepare()
    for tensor in tensors:
        writer.write(tensor.name, tensor.compute())
    (artifact / INDEX_FILE).write_text(json.dumps(writer.index()))
    for name in TOKENIZER_FILES:
        (artifact / name).write_text("{}")
    (artifact / "config.json").write_text(json.dumps(student_config_json(config)))
    return {"size_bytes": _size(artifact)}


def copy(options: argparse.Namespace) -> dict[str, Any]:
    """A plain copy of every file, hashed on the way and synced."""
    from blake3 import blake3

    target = options.folder / "copy"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in sorted((options.folder / "artifact").iterdir()):
        digest = blake3()
        with path.open("rb") as source, (target / path.name).open("wb") as out:
            while piece := source.read(1 << 22):
                digest.update(piece)
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
    shutil.rmtree(target)
    return {}


def export(options: argparse.Namespace) -> dict[str, Any]:
    """The export, with the time at which the checkpoint was written and the numeric check began."""
    from recipes.megatron import export as exporting
    from recipes.recipe import InputArtifact

    target = options.folder / "export"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    source = InputArtifact("source", "vpMoE@random", "blake3:" + "0" * 64, options.folder / "artifact")
    begun, written, compare = time.perf_counter(), [0.0], exporting.agreement

    def timed(*arguments: Any) -> Any:
        written[0] = time.perf_counter() - begun
        return compare(*arguments)

    exporting.agreement = timed
    exporting.export("megatron-plugin", source, target, lambda *_: None)
    check = json.loads((target / "PROVENANCE.json").read_text())["check"]
    return {"seconds_written": round(written[0], 1), "size_bytes": _size(target), "relative": check["relative"]}


def load(options: argparse.Namespace) -> dict[str, Any]:
    """A strict load into the plugin's model, and one row of logits."""
    sys.path[:0] = [str(REPOSITORY / "megatron_plugin"), str(REPOSITORY / "tests" / "stacks")]
    import torch

    from recipes import runtime

    device = runtime.device()
    current, synchronize = torch.cuda.current_device, torch.cuda.synchronize
    from core_stack import COMMON, VOCABULARY, config_of, divided, start

    if device == "cuda":  # core_stack has put everything on the CPU
        torch.cuda.current_device, torch.cuda.synchronize = current, synchronize
    from megatron.core import dist_checkpointing
    from vp_megatron import VpModel

    start(0, 1, str(options.folder / f"meeting-{os.getpid()}"))
    divided()
    case = options.folder / "export"
    config = config_of((case / "arguments-stock.txt").read_text(), bf16=True, params_dtype=torch.bfloat16)
    model = VpModel(config, vocab_size=VOCABULARY, max_sequence_length=2048).bfloat16().to(device)
    begun = time.perf_counter()
    found = dist_checkpointing.load(model.sharded_state_dict(), str(case / "release"), strict="raise_all")
    model.load_state_dict({key: value for key, value in found.items() if key not in COMMON}, strict=True)
    seconds = time.perf_counter() - begun
    ids = torch.arange(256, device=device)[None]
    with torch.no_grad():
        logits = model.eval()(ids, ids, None)
    is_finite = bool(torch.isfinite(logits).all())
    return {"seconds_loaded": round(seconds, 1), "device": device, "finite": is_finite}


PARTS = {"make": make, "copy": copy, "export": export, "load": load}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
