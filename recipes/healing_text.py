"""The healing data: prose and conversations as o200k ids, train and held-out.

Place in the path: sources `prose` and `synth`, input `tokenizer` -> **healing_text** -> every training, calibration and
evaluation of the chain.

Invariants: a document's split and place follow from its id alone, whatever the number of processes; any prefix of the
training documents holds about `harmony_share` of its tokens in conversations. Loss mask and span are shifted: index t
speaks of label t + 1. Everything that is dropped or cut is counted in manifest and report.

Files: `train/` and `valid/` with `text_tokens`, `text_lossmask`, `text_span` (.bin and .idx); `heldout.jsonl` and
`heldout_harmony.jsonl`, the rows behind `valid/` in its order; `manifest.json`.

Example: `vpstore build healing_text`
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recipes.data.assembly import Surroundings
from recipes.data.conversation import ANALYSIS, FINAL, Exchange, Frame, HarmonyRenderer, Rendered
from recipes.data.corpus_index import CorpusIndex, Entry, Split, index_prose, index_synth
from recipes.data.dataset_manifest import MANIFEST, described
from recipes.data.encodings import O200K_HARMONY
from recipes.data.harmony import EOD, HarmonyTokenizer
from recipes.data.megatron_dataset import IndexedDatasetWriter
from recipes.data.row_reader import Columns
from recipes.data.rows import ENDINGS, PROSE_COLUMNS, JsonLines, open_rows, row_format, seekable
from recipes.data.synth import SYNTH_COLUMNS, exchange_of
from recipes.data.text import clean_text
from recipes.data.workers import Workers
from recipes.params.healing_text import Params
from recipes.recipe import Context, Gate, Report, RunResult, copy_file, json_file
from vpstore.errors import RecipeRefused

Part = Literal["prose", "harmony"]
_Item = tuple[str, str | Exchange]  # where it stands, and the document
_ARRAYS = (("text_tokens", np.int32), ("text_lossmask", np.uint8), ("text_span", np.uint8))
_SPLITS: tuple[Split, ...] = ("train", "valid")


@dataclass
class _Tally:
    """What one split holds."""

    documents: Counter[str] = field(default_factory=Counter)  # by part
    tokens: Counter[str] = field(default_factory=Counter)  # by part
    labels: Counter[str] = field(default_factory=Counter)  # learned, analysis, final
    losses: Counter[str] = field(default_factory=Counter)  # cut, too long, beyond the budget

    def count(self, part: Part, rendered: Rendered) -> None:
        self.documents[part] += 1
        self.tokens[part] += rendered.tokens.size
        self.labels["learned"] += int(rendered.loss_mask.sum())
        for name, value in (("analysis", ANALYSIS), ("final", FINAL)):
            self.labels[name] += int((rendered.span == value).sum())

    def numbers(self) -> dict[str, Any]:
        return {name: dict(sorted(getattr(self, name).items())) for name in ("documents", "tokens", "labels", "losses")}


class Encoder:
    """Text or an exchange, with where it stands -> ids, loss mask and span."""

    def __init__(self, directory: Path, frame: Frame, max_tokens: int) -> None:
        self._tokenizer = HarmonyTokenizer.from_directory(directory)
        self._renderer = HarmonyRenderer(directory, frame)
        self._around = Surroundings.of(self._renderer, self._tokenizer).size
        self._max_tokens = max_tokens

    def __call__(self, item: _Item) -> tuple[Rendered | None, int]:
        """The arrays, and how many tokens were cut off; None for a conversation that is too long."""
        where, document = item
        if isinstance(document, Exchange):
            is_short = self._size(document) <= self._max_tokens
            return self._renderer.training(document, where=where) if is_short else None, 0
        ids = self._tokenizer.encode(document)
        kept = ids[: self._max_tokens - 1]
        mask = np.ones(len(kept) + 1, dtype=np.uint8)
        mask[-1] = 0  # nothing follows the end
        if len(kept) < len(ids):
            mask[-2] = 0  # the text goes on here: its end is not to be learned
        tokens = np.asarray([*kept, EOD], dtype=np.int32)
        return Rendered(tokens, mask, np.zeros_like(mask)), len(ids) - len(kept)

    def _size(self, exchange: Exchange) -> int:
        """Tokens when it is rendered: counted first, since the renderer's time grows with the square of a text."""
        texts = (exchange.user, exchange.analysis, exchange.final)
        return self._around + sum(len(self._tokenizer.encode(text)) for text in texts)


def run(context: Context) -> RunResult:
    """Read, split, encode and write.

    Raises:  RecipeRefused: a source that is missing or malformed, or a split without prose or conversations.
    """
    folder = context.scratch / "dataset"
    with ExitStack() as stack:
        indices = _indices(context, stack)
        params: Params = context.params
        arguments = (context.inputs["tokenizer"].path, Frame(**params.frame.model_dump()), params.max_document_tokens)
        encode = stack.enter_context(Workers(Encoder, arguments))
        tallies = {split: _write_split(_Job(split, folder, indices, context), encode) for split in _SPLITS}
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    numbers: dict[str, Any] = {split: tally.numbers() for split, tally in tallies.items()}
    numbers["dropped"] = {part: dict(sorted(index.drops.items())) for part, index in indices.items()}
    files = [copy_file(name, path, _media_type(name)) for name, path in paths.items()]
    files.append(json_file(MANIFEST, {**_manifest(context, paths), **numbers}))
    return RunResult(files=files, report=_report(tallies, numbers))


def _indices(context: Context, stack: ExitStack) -> dict[Part, CorpusIndex]:
    """Both parts; their files stay open until the stack is closed."""
    params: Params = context.params

    def opened(role: str, columns: Columns) -> list[JsonLines]:
        readers = []
        for number, (name, path) in enumerate(_files(context.sources, role)):
            unpacked = context.scratch / "unpacked" / role / f"{number}.jsonl"
            plain = seekable(open_rows(path, columns, name=name), unpacked)
            readers.append(stack.enter_context(plain))
        return readers

    nul_policy = params.nul_policy
    return {
        "prose": index_prose(opened("prose", PROSE_COLUMNS), fraction=params.held_out_fraction, nul_policy=nul_policy),
        "harmony": index_synth(
            opened("synth", SYNTH_COLUMNS), fraction=params.synth_held_out_fraction, nul_policy=nul_policy
        ),
    }


def _files(sources: Mapping[str, Path], role: str) -> list[tuple[str, Path]]:
    found = [(name, sources[name]) for name in sorted(sources) if name.startswith(f"{role}/") and row_format(name)]
    if not found:
        raise RecipeRefused(
            "the healing data has no source",
            where=f"source role {role}",
            expected=f"at least one file that ends with one of {', '.join(ENDINGS)}",
            found=", ".join(sorted(sources)) or "no sources",
            next_step="name its provenance in objects.toml",
        )
    return found


@dataclass(frozen=True)
class _Job:
    """One split to be written."""

    split: Split
    folder: Path
    indices: Mapping[Part, CorpusIndex]
    context: Context

    @property
    def params(self) -> Params:
        """Of the recipe."""
        params: Params = self.context.params
        return params

    @property
    def total(self) -> int:
        """How many tokens the split may hold."""
        return self.params.train_tokens if self.split == "train" else self.params.valid_tokens

    def budget(self, part: Part) -> int:
        harmony = round(self.total * self.params.harmony_share)
        return harmony if part == "harmony" else self.total - harmony

    def documents(self, part: Part) -> Iterator[_Item]:
        index = self.indices[part]
        for entry in index.entries[self.split]:
            where = f"{index.files[entry.file].name}, byte {entry.offset}"
            yield where, _document(part, index.row(entry), self.params)


def _document(part: Part, row: Mapping[str, str], params: Params) -> str | Exchange:
    if part == "harmony":
        document: str | Exchange | None = exchange_of(row, drops=Counter(), nul_policy=params.nul_policy)
    else:
        document = clean_text(row["text"], nul_policy=params.nul_policy, drops=Counter())
    if document is None:  # it was accepted a moment ago: the file was changed under our hands
        raise RecipeRefused("a source changed while it was read", where=part, next_step="build again")
    return document


def _write_split(job: _Job, encode: Workers) -> _Tally:
    tally = _Tally()
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedDatasetWriter(job.folder / job.split / name, dtype)) for name, dtype in _ARRAYS
        ]
        lines = _Lines(job, stack) if job.split == "valid" else None
        for part, entry, rendered in _mixed(job, encode, tally):
            for writer, array in zip(writers, rendered.arrays, strict=True):
                writer.add_document(array)
            tally.count(part, rendered)
            job.context.progress(f"tokens of {job.split}", tally.tokens.total(), job.total)
            if lines is not None:
                lines.write(part, entry)
    for part in ("prose", "harmony"):
        if not tally.documents[part]:
            raise RecipeRefused(
                "a split of the healing data is empty",
                where=f"{job.split}: {part}",
                expected="at least one document",
                found=f"{len(job.indices[part].entries[job.split])} before the budget of {job.budget(part)} tokens",
                next_step="raise the tokens of the split, or change the held-out fraction",
            )
    return tally


def _mixed(job: _Job, encode: Workers, tally: _Tally) -> Iterator[tuple[Part, Entry, Rendered]]:
    """Documents of both parts, each time from the part that is further behind its share; prose on a tie."""
    parts: tuple[Part, ...] = ("prose", "harmony")
    streams = {part: _within_budget(job, part, encode=encode, tally=tally) for part in parts}
    while streams:
        part = min(streams, key=lambda name: (tally.tokens[name] / job.budget(name), parts.index(name)))
        following = next(streams[part], None)
        if following is None:
            del streams[part]
        else:
            yield part, *following


def _within_budget(job: _Job, part: Part, *, encode: Workers, tally: _Tally) -> Iterator[tuple[Entry, Rendered]]:
    """Documents of one part until the next one would not fit; `tally.tokens` grows as its reader counts."""
    entries = job.indices[part].entries[job.split]
    for number, (rendered, cut) in enumerate(encode(job.documents(part))):
        if rendered is None:
            tally.losses[f"{part}_too_long"] += 1
            continue
        if tally.tokens[part] + rendered.tokens.size > job.budget(part):
            tally.losses[f"{part}_beyond_budget"] += len(entries) - number
            return
        if cut:
            tally.losses[f"{part}_documents_cut"] += 1
            tally.losses[f"{part}_tokens_cut"] += cut
        yield entries[number], rendered


class _Lines:
    """The rows behind the held-out documents."""

    def __init__(self, job: _Job, stack: ExitStack) -> None:
        self._job = job
        names: dict[Part, str] = {"prose": "heldout.jsonl", "harmony": "heldout_harmony.jsonl"}
        self._out = {part: stack.enter_context((job.folder / name).open("wb")) for part, name in names.items()}

    def write(self, part: Part, entry: Entry) -> None:
        row: dict[str, Any] = self._job.indices[part].row(entry)
        if part == "prose":
            row["text"] = _document(part, row, self._job.params)
        self._out[part].write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _media_type(name: str) -> str:
    return "application/jsonl" if name.endswith(".jsonl") else "application/octet-stream"


def _manifest(context: Context, files: Mapping[str, Path]) -> dict[str, Any]:
    return {
        "format": 1,
        "kind": "healing_text",
        "sources": {name: described(path) for name, path in sorted(context.sources.items()) if row_format(name)},
        "ignored_sources": [name for name in sorted(context.sources) if not row_format(name)],
        "tokenizer": {
            "encoding": O200K_HARMONY.name,
            "sha256": O200K_HARMONY.ranks_sha256,
            "content": context.inputs["tokenizer"].digest,
        },
        "padded_vocab": O200K_HARMONY.n_vocab,
        "end_of_document": EOD,
        "masks": "shifted: index t speaks of label t + 1",
        "split": {
            "prose": "sha256(doc_id)",
            "harmony": "blake2b(synth_id)",
            "rule": "held out if the first 8 bytes, big-endian, lie below fraction * 2**64",
        },
        "params": context.params.model_dump(mode="json"),
        "files": {name: described(path) for name, path in files.items()},
    }


def _report(tallies: Mapping[Split, _Tally], metrics: Mapping[str, Any]) -> Report:
    gates = []
    for split, tally in tallies.items():
        share, what = tally.tokens["harmony"] / tally.tokens.total(), f"Harmony share of the tokens of {split}"
        gates += [Gate(f"{what}, at least", share, ">=", 0.10), Gate(f"{what}, at most", share, "<=", 0.30)]
    return Report(metrics=metrics, gates=gates)
