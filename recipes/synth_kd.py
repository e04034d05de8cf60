"""The SYNTH data set: conversations as o200k ids with loss mask and span, in Megatron's format, train and held-out.

Place in the path: source `synth`, input `tokenizer` -> **synth_kd** -> Stage 1.

Invariants: a shard holds rows of one source file, in their order; the side of a row follows from its id alone; the
bytes depend neither on the number of processes nor on interruptions; every row that is dropped or cut is counted, by
shard and in all, and rows read = documents + dropped. Loss mask and span are shifted: index t speaks of label t + 1.
Rows are not compared with one another: two with one id fall on the same side.

Files: `train/` and `valid/` with `shard_NN_tokens`, `shard_NN_lossmask`, `shard_NN_span` (.bin and .idx; none where a
shard has no row on that side); `heldout.jsonl`, the rows behind `valid/` in its order; `manifest.json`.

Example: `VPSTORE_WORKERS=2 vpstore build synth_kd`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from recipes.data.assembly import Assembler, Surroundings, arrays_of
from recipes.data.conversation import Frame, HarmonyRenderer
from recipes.data.dataset_manifest import MANIFEST, described, digest_of
from recipes.data.encodings import O200K_HARMONY
from recipes.data.harmony import EOD, HarmonyTokenizer
from recipes.data.rows import ENDINGS, open_rows, row_format
from recipes.data.synth import SYNTH_COLUMNS, USED, exchange_of
from recipes.data.synth_shards import HELD_OUT, SPLITS, Settings, ShardMaker, Task, tasks_of
from recipes.data.truncation import Limits
from recipes.data.workers import Workers
from recipes.params.synth_kd import Params
from recipes.recipe import Context, Gate, PlannedFile, Report, RunResult, copy_file, json_file
from vpstore.errors import RecipeRefused

_Record = dict[str, Any]


def run(context: Context) -> RunResult:
    """Read, render, cut, split and write.

    Raises:  RecipeRefused: a source that is missing or malformed, another renderer than stated, an empty split.
    """
    params: Params = context.params
    _require_renderer(params)
    sources = _sources(context.sources)
    tokenizer = HarmonyTokenizer.from_directory(context.inputs["tokenizer"].path)
    renderer = HarmonyRenderer(context.inputs["tokenizer"].path, Frame(**params.frame.model_dump()))
    settings = _settings(context, Surroundings.of(renderer, tokenizer))
    differing = _Comparison(renderer, Assembler(tokenizer, settings.around, settings.limits), params)
    tasks, files = [], []
    for number, (name, path) in enumerate(sources):
        context.progress("sources", number, len(sources))
        found = described(path)
        with open_rows(path, SYNTH_COLUMNS, name=name) as reader:
            differing.count(reader.rows(limit=params.compared_rows), name=name)
            tasks += tasks_of(number, reader, sha256=found["sha256"], rows=params.rows_per_shard)
        files.append({"name": name, **found})
    records = _made(settings, tasks, context)
    _require_both_splits(records)
    manifest = {**_manifest(context), "sources": files, **_numbers(records)}
    return RunResult(files=_files(settings.folder, records, manifest), report=_report(manifest, differing, params))


def _require_renderer(params: Params) -> None:
    found = metadata.version(params.renderer.name)
    if found != params.renderer.version:
        raise RecipeRefused(
            "another version of the renderer is installed than the config states",
            where=params.renderer.name,
            expected=params.renderer.version,
            found=found,
            next_step="install the stated version, or state the installed one in synth_kd.toml and build anew",
        )


def _sources(sources: Mapping[str, Path]) -> list[tuple[str, Path]]:
    found = [(name, sources[name]) for name in sorted(sources) if name.startswith("synth/") and row_format(name)]
    if not found:
        raise RecipeRefused(
            "the SYNTH data set has no source",
            where="source role synth",
            expected=f"at least one file that ends with one of {', '.join(ENDINGS)}",
            found=", ".join(sorted(sources)) or "no sources",
            next_step="name its provenance in the profile",
        )
    return found


def _settings(context: Context, around: Surroundings) -> Settings:
    params: Params = context.params
    decides = {"params": params.model_dump(mode="json"), "around": around.__dict__, "vocabulary": _vocabulary()}
    return Settings(
        tokenizer=context.inputs["tokenizer"].path,
        around=around,
        limits=Limits(**params.truncation.model_dump()),
        folder=context.scratch / "parts",
        rows=params.rows_per_shard,
        held_out_fraction=params.held_out_fraction,
        nul_policy=params.nul_policy,
        identity=digest_of(decides),
    )


class _Comparison:
    """Rows assembled here against the same rows rendered by openai-harmony, all three arrays.

    Only rows that fit without a cut: what is cut has no rendering to be held against, and the library's time grows with
    the square of a text's length, so that a single odd row could hold up a build for minutes.
    """

    def __init__(self, renderer: HarmonyRenderer, assembler: Assembler, params: Params) -> None:
        self._renderer, self._assembler, self._nul_policy = renderer, assembler, params.nul_policy
        self.rows = self.differing = 0

    def count(self, rows: Any, *, name: str) -> None:
        for number, row in rows:
            exchange = exchange_of(row, drops=Counter(), nul_policy=self._nul_policy)
            document = self._assembler.assemble(exchange) if exchange else None
            if exchange is None or document is None or document.is_cut:
                continue
            theirs = self._renderer.training(exchange, where=f"{name}, row {number + 1}")
            pairs = zip(arrays_of([document]).arrays, theirs.arrays, strict=True)
            self.rows += 1
            self.differing += not all(np.array_equal(ours, their) for ours, their in pairs)


def _made(settings: Settings, tasks: Sequence[Task], context: Context) -> list[_Record]:
    """The records of all shards, in the order of the rows."""
    total, done = sum(task.size_bytes for task in tasks), 0
    sizes = {(task.file, task.chunk): task.size_bytes for task in tasks}
    records: list[_Record] = []
    with Workers(ShardMaker, (settings,)) as work:
        for found in work.as_they_come(tasks):
            records += found
            done += sizes[found[0]["file"], found[0]["chunk"]]
            context.progress("bytes of the sources", done, total)
    return sorted(records, key=lambda record: (record["file"], record["chunk"]))


def _require_both_splits(records: Sequence[_Record]) -> None:
    for split in SPLITS:
        if not any(record["splits"][split] for record in records):
            raise RecipeRefused(
                "a split of the SYNTH data set is empty",
                where=split,
                expected="at least one document",
                found=f"{sum(record['rows'] for record in records)} rows read",
                next_step="change the held-out fraction, or give more rows",
            )


def _shard_names(number: int) -> list[str]:
    width = max(2, len(str(number - 1)))
    return [f"shard_{serial:0{width}d}" for serial in range(number)]


def _numbers(records: Sequence[_Record]) -> dict[str, Any]:
    """What is in the manifest of the shards, and in all."""
    shards: list[dict[str, Any]] = []
    files: dict[str, Any] = {}
    for name, record in zip(_shard_names(len(records)), records, strict=True):
        mine = {_final_name(name, part): found for part, found in record["files"].items() if part != HELD_OUT}
        files |= mine
        splits = {
            split: {**counts, "size_bytes": sum(f["size_bytes"] for n, f in mine.items() if n.startswith(f"{split}/"))}
            for split, counts in record["splits"].items()
            if counts
        }
        counted = {key: record[key] for key in ("rows", "dropped", "noted")}
        place = {"source": record["source"]["name"], "first_row": record["first_row"]}
        shards.append({"name": name, **place, **counted, **splits})
    totals = {"rows": sum(record["rows"] for record in records)}
    for key in ("dropped", "noted"):
        totals[key] = _summed(record[key] for record in records)
    for split in SPLITS:
        totals[split] = _summed(record["splits"][split] for record in records)
    return {"shards": shards, "totals": totals, "files": files}


def _summed(counts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))


def _final_name(shard: str, part: str) -> str:
    """train_tokens.bin of a part is train/shard_NN_tokens.bin of the artifact."""
    split, _, rest = part.partition("_")
    return f"{split}/{shard}_{rest}"


def _files(folder: Path, records: Sequence[_Record], manifest: dict[str, Any]) -> list[PlannedFile]:
    planned, held_out = [], []
    for name, record in zip(_shard_names(len(records)), records, strict=True):
        part = folder / f"{record['file']:05d}-{record['chunk']:06d}"
        planned += [copy_file(_final_name(name, each), part / each) for each in record["files"] if each != HELD_OUT]
        held_out.append(part / HELD_OUT)

    def write(out: BinaryIO) -> None:
        for path in held_out:
            with path.open("rb") as lines:
                while data := lines.read(1 << 20):
                    out.write(data)

    joined = folder / HELD_OUT
    with joined.open("wb") as out:
        write(out)
    manifest["files"][HELD_OUT] = described(joined)
    return [*planned, copy_file(HELD_OUT, joined, "application/jsonl"), json_file(MANIFEST, manifest)]


def _vocabulary() -> dict[str, Any]:
    return {"encoding": O200K_HARMONY.name, "sha256": O200K_HARMONY.ranks_sha256}


def _manifest(context: Context) -> dict[str, Any]:
    params: Params = context.params
    values = params.model_dump(mode="json")
    return {
        "format": 1,
        "kind": "synth_kd",
        "schema": {
            "columns": list(USED),
            "arrays": {"tokens": "int32", "lossmask": "uint8", "span": "uint8"},
            "loss_mask": "1 on every token of an assistant message, from its start to its end",
            "span": "1 analysis, 2 final, 0 else",
            "masks": "shifted: index t speaks of label t + 1",
        },
        "config": {"sha256": digest_of(values), "params": values},
        "renderer": params.renderer.model_dump(),
        "tokenizer": {**_vocabulary(), "content": context.inputs["tokenizer"].digest},
        "padded_vocab": O200K_HARMONY.n_vocab,
        "end_of_document": EOD,
        "split": {
            "digest": "blake2b(synth_id)",
            "rule": "held out if the first 8 bytes, big-endian, lie below fraction * 2**64",
            "fraction": params.held_out_fraction,
        },
        "truncation": "the answer whole or the row dropped; the reasoning cut from the left, then the question",
        "ignored_sources": [name for name in sorted(context.sources) if not row_format(name)],
    }


def _report(manifest: Mapping[str, Any], compared: _Comparison, params: Params) -> Report:
    totals = manifest["totals"]
    share = sum(totals["dropped"].values()) / totals["rows"]
    return Report(
        metrics={**totals, "shards": len(manifest["shards"]), "rows_compared_with_the_renderer": compared.rows},
        gates=[
            Gate("share of the rows that are dropped", share, "<=", params.max_dropped_share),
            Gate("rows that openai-harmony renders differently", compared.differing, "==", 0),
            Gate("rows compared with openai-harmony", compared.rows, ">=", 1),
        ],
    )
