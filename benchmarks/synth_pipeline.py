"""Time the SYNTH pipeline against raw tiktoken on the same three texts of each row, with as many processes.

The rows have SYNTH's size, about 850 tokens, and are put together from the embedded corpus. Raw tiktoken encodes text
that already lies in memory and throws the ids away; the pipeline reads the files, checks, encodes, cuts, masks,
splits, writes and digests. Both start their processes and load the ranks within the time. Wall time on a machine
that others use says little: the ratio of processor seconds is there too.

Use: python -m benchmarks.synth_pipeline [--rows 20000] [--processes 2] [--format jsonl|jsonl.zst|parquet]
Prints one JSON object. peak_mib is the highest memory of the process that leads; with one process it does all.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import tiktoken
import zstandard

from recipes import synth_kd
from recipes.config import Place, stage_params
from recipes.data.harmony import HarmonyTokenizer
from recipes.recipe import Context, InputArtifact

ROOT = Path(__file__).parents[1]
_TEXTS = ("query", "synthetic_reasoning", "synthetic_answer")


def rows(number: int) -> Iterator[dict[str, Any]]:
    """Rows of about 3,300 characters in all, from the embedded corpus, over and over."""
    lines = (ROOT / "assets/corpus/prose.jsonl").read_text(encoding="utf-8").splitlines()
    prose = "".join(json.loads(line)["text"] for line in lines)
    for serial in range(number):
        at = serial * 1009 % (len(prose) - 4000)
        texts = (prose[at : at + 160], prose[at + 160 : at + 2200], prose[at + 2200 : at + 3300])
        row = dict(zip(_TEXTS, (text.strip() + "." for text in texts), strict=True))
        yield {"synth_id": f"row-{serial}", "language": "en", "exercise": "memorization", **row, "words": 500}


def write(path: Path, found: list[dict[str, Any]]) -> None:
    """The rows in the format that the file's name says."""
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(found), path, row_group_size=5000)
        return
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found).encode()
    path.write_bytes(zstandard.ZstdCompressor().compress(data) if path.suffix == ".zst" else data)


def encode_raw(texts: list[str]) -> int:
    """Nothing but tiktoken."""
    encoding: tiktoken.Encoding = HarmonyTokenizer.from_directory(ROOT / "assets")._encoding
    return sum(len(encoding.encode_ordinary(text)) for text in texts)


def timed(work: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Wall and processor seconds of the work and its processes, and the highest memory of the leading one.

    In a process of its own, so that nothing that this one holds counts.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_timed_here, work, arguments).result()


def _timed_here(work: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, float]:
    started = time.perf_counter()
    work(*arguments)
    wall = time.perf_counter() - started
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "wall_seconds": round(wall, 2),
        "cpu_seconds": round(sum(one.ru_utime + one.ru_stime for one in used), 2),
        "peak_mib": _high_water_kib() >> 10,
    }


def _high_water_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def raw(found: list[dict[str, Any]], processes: int) -> None:
    """Tiktoken over all texts, in equal shares."""
    texts = [row[name] for row in found for name in _TEXTS]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(encode_raw, [texts[n::processes] for n in range(processes)]))


def pipeline(files: list[Path], scratch: Path, rows_per_shard: int) -> None:
    """The recipe, up to the files that a build would publish."""
    place = Place("synth_kd", "main", None, "recipes.synth_kd", ("configs/upcycle/synth_kd.toml",))
    profile = {"rows_per_shard": rows_per_shard, "held_out_fraction": 0.01, "compared_rows": 16}
    params = stage_params(ROOT, profile={"params": {"synth_kd": {"main": profile}}}, place=place)
    tokenizer = InputArtifact("tokenizer", "o200k-harmony@main", "blake3:00", ROOT / "assets")
    sources = {f"synth/{path.name}": path for path in files}
    synth_kd.run(Context(params, {"tokenizer": tokenizer}, sources, scratch))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--format", default="parquet", choices=("jsonl", "jsonl.zst", "jsonl.gz", "parquet"))
    options = parser.parse_args()
    os.environ["VPSTORE_WORKERS"] = str(options.processes)
    found = list(rows(options.rows))
    text_bytes = sum(len(row[name].encode()) for row in found for name in _TEXTS)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"synth_{n}.{options.format}" for n in range(options.processes)]
        for number, path in enumerate(files):
            write(path, found[number :: options.processes])
        shard = max(1, options.rows // options.processes // 4)
        ours = timed(pipeline, files, Path(folder) / "scratch", shard)
        raw_time = timed(raw, found, options.processes)
    print(json.dumps(_result(options, text_bytes, raw_time, ours), indent=2))


def _result(options: Any, text_bytes: int, raw_time: dict[str, float], ours: dict[str, float]) -> dict[str, Any]:
    return {
        "format": options.format,
        "processes": options.processes,
        "rows": options.rows,
        "text_megabytes": round(text_bytes / 1e6, 1),
        "raw_tiktoken": raw_time,
        "pipeline": ours,
        "share_of_raw_speed": {
            name: round(raw_time[f"{name}_seconds"] / ours[f"{name}_seconds"], 2) for name in ("wall", "cpu")
        },
    }


if __name__ == "__main__":
    main()
