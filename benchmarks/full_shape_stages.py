"""Carry single surgery steps and evaluations out at full size, with the profile's amounts, on random parents.

Place: beside `full_shape_chain`, which carries the whole chain out with small amounts. Here each step gets a parent of
the real shapes with random weights, so that nothing has to be built before it, and the amounts of the profile
`upcycle`: 65,536 tokens of calibration, 4 MB of text. Thresholds that ask for sense are lifted; gates of exactness
stay. Beside the upcycle stands what a durable copy of its shards takes on that disk, and their hashing.

Use: python -m benchmarks.full_shape_stages FOLDER [--stages REF …] [--trace] [--report FILE]
Prints a row a step: seconds of the recipe, peak memory of its process, of the GPU, and what the recipe said it needs.
VPSTORE_DEVICE=cuda; without a GPU the walks take hours. About 20 GB of disk for the upcycle.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import math
import os
import pstats
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from blake3 import blake3

from benchmarks.full_shape_chain import Place
from benchmarks.projects import REPOSITORY
from benchmarks.sides import Command

MOE = "vpMoE@upcycle"
LIFTED: dict[str, dict[str, Any]] = {
    "vpDense0-5_28@convert": {"max_loss_over_unigram": 1e9},
    "vpDense0-5_28@real-morph": {"max_loss_increase": 1e9, "max_flipped_share": 1.0},
    MOE: {"min_router_entropy": 0.0, "max_expert_load": 1.0},
}
PARENTS = {  # step -> role and folder of its parent
    "vpDense0-5_28@convert": ("parent", "donor"),
    "vpDense0-5_28@real-morph": ("parent", "compat"),
    "vpDense@expand": ("parent", "real"),
    MOE: ("parent", "dense"),
    "reports@vpDense-wake-up": ("checkpoint", "dense"),
    "reports@vpMoE-upcycle": ("checkpoint", "moe"),
}
_STUDENTS = {"compat": (28, "gqa"), "real": (28, "tpa"), "dense": (80, "tpa")}
_TEXT_BYTES = 4_000_000


def make_student(folder: Path, layers: int, attention: str) -> None:
    """A student's directory: weights of standard deviation 1/sqrt(fan in), offsets and residuals like trained ones."""
    import torch

    from recipes.checkpoint import expected_tensors, student_config_json
    from recipes.model.config import StudentConfig
    from recipes.names import INDEX_FILE, shard_of
    from recipes.tensors import TORCH_DTYPES, write_safetensors

    sizes = {"hidden_size": 1024, "ffn_hidden_size": 512, "query_rank": 4, "kv_rank": 2}
    config = StudentConfig.model_validate({**sizes, "num_layers": layers, "attention": attention})
    generator = torch.Generator().manual_seed(layers)
    shards: dict[str, dict[str, Any]] = {}
    fixed = {"norm.weight": 1.0, "softmax_offset": -4.0, "value_residual": 2.0}
    for name, (dtype, shape) in expected_tensors(config).items():
        value = next((torch.full(shape, number) for end, number in fixed.items() if name.endswith(end)), None)
        if value is None and name.endswith("log_freq"):
            value = torch.linspace(0.0, -math.log(1e6), shape[0])
        if value is None:
            value = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.05)
        shards.setdefault(shard_of(name), {})[name] = value.to(TORCH_DTYPES[dtype])
    folder.mkdir(parents=True)
    for shard, tensors in shards.items():
        write_safetensors(folder / shard, tensors)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(student_config_json(config)))


def make_transplanted(folder: Path) -> None:
    """A donor under the o200k vocabulary."""
    from benchmarks.full_shape_donors import make_donor
    from recipes.model.config import PADDED_VOCAB, DonorConfig

    sizes = {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "vocab_size": PADDED_VOCAB}
    make_donor(folder, DonorConfig.model_validate({**sizes, "tie_word_embeddings": False}), seed=7)


class Shop:
    """The folder with parents, texts and the tokenizer."""

    def __init__(self, root: Path) -> None:
        self.root, self.place = root, Place(root)

    def prepare(self, stages: list[str]) -> None:
        """Make what these steps read, unless it is there."""
        wanted = {PARENTS[ref][1] for ref in stages} | ({"dense"} if MOE in stages else set())
        for name in wanted & _STUDENTS.keys():
            if not (self.root / name).exists():
                make_student(self.root / name, *_STUDENTS[name])
        if "donor" in wanted and not (self.root / "donor").exists():
            make_transplanted(self.root / "donor")
        if not (self.root / "data").exists():
            self._texts()

    def _texts(self) -> None:
        ignored = shutil.ignore_patterns(".git", ".venv", ".vpstore", "weights", "runs", "__pycache__")
        shutil.copytree(REPOSITORY, self.place.project, ignore=ignored, dirs_exist_ok=True)
        tiny = {**self.place.environment, "VPSTORE_PROFILE": "tiny", "VPSTORE_DEVICE": "cpu"}
        for folder, ref in (("tokenizer", "o200k-harmony@main"), ("data", "healing_text@main")):
            self.place.vpstore("build", ref, environment=tiny)
            shutil.copytree(self.place.vpstore("resolve", ref, environment=tiny).strip(), self.root / folder)
        rows = [json.loads(line)["text"] for line in (REPOSITORY / "assets/corpus/prose.jsonl").open(encoding="utf-8")]
        held_out = self.root / "data/heldout.jsonl"
        held_out.unlink()
        times = 1 + _TEXT_BYTES // sum(len(text.encode()[:8000]) for text in rows)
        with held_out.open("w", encoding="utf-8") as out:
            for number, text in enumerate(rows * times):
                out.write(json.dumps({"doc_id": str(number), "text": text}) + "\n")

    def inputs(self, ref: str) -> dict[str, Path]:
        """Role -> directory."""
        role, name = PARENTS[ref]
        folder = self.root / name
        if name == "moe" and not folder.exists():
            self._gather(folder)
        return {role: folder, "tokenizer": self.root / "tokenizer", "data": self.root / "data"}

    def _gather(self, folder: Path) -> None:
        """The staged result of the upcycle, as a directory."""
        folder.mkdir()
        for part in ("shards", "files"):
            for path in (self.scratch(MOE) / part).iterdir():
                (folder / path.name).symlink_to(path)

    def scratch(self, ref: str) -> Path:
        """Where a step works."""
        return self.root / "scratch" / ref.replace("@", "-")


def carry_out(shop: Shop, ref: str, *, is_traced: bool) -> dict[str, Any]:
    """One step in this process."""
    from recipes import run
    from vpstore.checkout import Checkout
    from vpstore.runner import ResolvedInput
    from vpstore.schema.digest import Digest

    object_name, stage = ref.split("@")
    prepared = run.prepare(Checkout.find(REPOSITORY, profile="upcycle"), object_name, stage)
    prepared = type(prepared)(**{**vars(prepared), "params": {**prepared.params, **LIFTED.get(ref, {})}})
    nothing = Digest.of(b"")
    inputs = {role: ResolvedInput(role, role, nothing, path) for role, path in shop.inputs(ref).items()}
    shutil.rmtree(shop.scratch(ref), ignore_errors=True)
    shop.scratch(ref).mkdir(parents=True)
    needs = run.needs(prepared, inputs, shop.scratch(ref))
    trace = cProfile.Profile()
    began = time.perf_counter()
    if is_traced:
        trace.enable()
    made = run.produce(prepared, inputs, shop.scratch(ref), lambda label, done, total: None)
    trace.disable()
    seconds = time.perf_counter() - began
    if is_traced:
        pstats.Stats(trace, stream=sys.stderr).sort_stats("cumulative").print_stats(50)
    import torch

    shards, copies = shop.scratch(ref) / "shards", shop.root / "copies"
    copy = copied(shards, copies) if ref == MOE else None
    [report] = [file.source for file in made.files if file.path == "reports/metrics.json"]
    return {
        "ref": ref,
        "recipe_seconds": round(seconds, 1),
        "gpu_gib": round(torch.cuda.max_memory_allocated() / (1 << 30), 1),
        "host_gib_of_its_own": round(_own_memory() / (1 << 30), 2),
        "copy_and_hash_seconds": copy,
        "said": None if needs is None else [needs.disk_bytes, needs.memory_bytes],
        "metrics": json.loads(report.read_text()),
    }


def _own_memory() -> int:
    """Bytes of this process that are no file's: libraries and mapped weights are left out."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [line] = [line for line in status if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def copied(shards: Path, target: Path) -> tuple[float, float]:
    """Seconds of a plain copy made durable, and of hashing it by all cores."""
    target.mkdir(exist_ok=True)
    began = time.perf_counter()
    for path in sorted(shards.iterdir()):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as copy:
            os.fsync(copy.fileno())
    between = time.perf_counter()
    for path in sorted(target.iterdir()):
        blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
    ended = time.perf_counter()
    shutil.rmtree(target)
    return round(between - began, 1), round(ended - between, 1)


def main() -> None:
    """Carry the steps out one after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", nargs="+", default=list(PARENTS), choices=list(PARENTS), metavar="REF")
    parser.add_argument("--trace", action="store_true", help="print where each step spends its time, to stderr")
    parser.add_argument("--report", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--here", action="store_true", help="in this process: what each step's process is told")
    given = parser.parse_args()
    shop = Shop(given.folder.resolve())
    if given.here:
        print(json.dumps(carry_out(shop, given.stages[0], is_traced=given.trace)))
        return
    shop.prepare(given.stages)
    rows = []
    for ref in given.stages:
        words = ["-m", "benchmarks.full_shape_stages", str(shop.root), "--here", "--stages", ref]
        words += ["--trace"] if given.trace else []
        done = Command([sys.executable, *words], REPOSITORY, dict(os.environ)).run()
        *trace, row = done.output.splitlines()
        print("\n".join(trace), end="", file=sys.stderr)
        found = {
            **json.loads(row),
            "seconds": round(done.seconds, 1),
            "peak_gib": round(done.peak_bytes / (1 << 30), 2),
        }
        rows.append(found)
        print(json.dumps({key: value for key, value in found.items() if key != "metrics"}), flush=True)
        if given.report:
            given.report.write_text(json.dumps({"schema": 1, "stages": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
