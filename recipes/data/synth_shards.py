"""Shards of the SYNTH data set: each made from a run of rows of one source file, on its own, once.

Place in the path: rows, synth, assembly -> **synth_shards** -> the recipe synth_kd, which numbers and publishes them.

Invariants: a shard's bytes follow from its rows and the settings alone; its record is written last, under its name at
once, and names every file by SHA-256, so that after a kill at any moment a shard is either found whole or made again;
rows read = documents + dropped, in each shard; every document was found to be a conversation before it is written.

In the folder of the parts:
    <file>-<chunk>/{train,valid}_{tokens,lossmask,span}.{bin,idx}, heldout.jsonl, record.json

Example:
    records = ShardMaker(settings)(tasks_of(0, reader, rows=100_000)[0])
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recipes.data.assembly import Assembled, Assembler, Surroundings, arrays_of
from recipes.data.dataset_manifest import described
from recipes.data.harmony import HarmonyTokenizer
from recipes.data.megatron_dataset import IndexedDatasetWriter, bin_path, idx_path
from recipes.data.row_reader import Mark, RowReader
from recipes.data.rows import open_rows
from recipes.data.split import is_held_out
from recipes.data.structure import Structure
from recipes.data.synth import SYNTH_COLUMNS, exchange_of, has_control_text
from recipes.data.text import NulPolicy
from recipes.data.truncation import Limits

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")
ARRAYS = (("tokens", np.int32), ("lossmask", np.uint8), ("span", np.uint8))
HELD_OUT, RECORD = "heldout.jsonl", "record.json"
_BATCH = 256  # documents that are turned into arrays at once


@dataclass(frozen=True)
class Settings:
    """What every shard is made with. identity: a digest of all that decides bytes but the source and its rows."""

    tokenizer: Path
    around: Surroundings
    limits: Limits
    folder: Path
    rows: int  # of a shard at most
    held_out_fraction: float
    nul_policy: NulPolicy
    identity: str


@dataclass(frozen=True)
class Task:
    """Rows of one file for one process: one shard, or all of a file that can only be read from its beginning."""

    file: int
    name: str
    path: Path
    sha256: str
    start: Mark
    chunk: int
    is_open_ended: bool
    size_bytes: int  # its share of the file, for the progress


def tasks_of(file: int, reader: RowReader, *, sha256: str, rows: int) -> list[Task]:
    """The work that a file makes: one task for each `rows` rows, or one in all if it cannot be entered elsewhere.

    Args:    file: number of the file among the sources. sha256: of the file.
    """
    marks = reader.marks(rows)
    size = reader.path.stat().st_size // max(1, len(marks))
    return [
        Task(file, reader.name, reader.path, sha256, mark, chunk, not reader.is_seekable, size)
        for chunk, mark in enumerate(marks)
    ]


class ShardMaker:
    """Makes the shards of a task, or finds them finished."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        tokenizer = HarmonyTokenizer.from_directory(settings.tokenizer)
        self._assembler = Assembler(tokenizer, settings.around, settings.limits)

    def __call__(self, task: Task) -> list[dict[str, Any]]:
        """The records of the task's shards, in the order of their rows.

        Raises:  RecipeRefused: a source that is malformed, or NUL under the policy `refuse`.
        """
        known = [record for record in self._finished(task) if record]
        if known and (known[-1]["is_last"] or not task.is_open_ended):
            return known
        rows = self._settings.rows
        start = Mark(task.start.row + len(known) * rows, task.start.place)
        with open_rows(task.path, SYNTH_COLUMNS, name=task.name) as reader:
            stream = reader.rows(start, None if task.is_open_ended else rows)
            following = next(stream, None)
            for chunk in count(task.chunk + len(known)):
                if following is None and known:
                    return known
                shard = _Shard(self._settings, self._folder(task, chunk), task.name)
                group = islice(chain([following], stream), rows) if following else iter(())
                numbers = shard.write(group, self._assembler)
                following = next(stream, None)
                known.append(shard.finish(self._stated(task, chunk), numbers, is_last=following is None))
        raise AssertionError("count never ends")

    def _finished(self, task: Task) -> Iterator[dict[str, Any]]:
        """Records of shards that are there and whole, from the first of the task on, up to the first that is not."""
        for chunk in count(task.chunk):
            record = finished(self._folder(task, chunk), self._stated(task, chunk))
            if record is None:
                return
            yield record
            if record["is_last"] or not task.is_open_ended:
                return

    def _folder(self, task: Task, chunk: int) -> Path:
        return self._settings.folder / f"{task.file:05d}-{chunk:06d}"

    def _stated(self, task: Task, chunk: int) -> dict[str, Any]:
        source = {"name": task.name, "sha256": task.sha256}
        first_row = chunk * self._settings.rows + 1
        identity = self._settings.identity
        return {"identity": identity, "source": source, "file": task.file, "chunk": chunk, "first_row": first_row}


def finished(folder: Path, stated: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a shard, if it is there, says what is `stated` and every file has its digest."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        is_whole = all(described(folder / name) == found for name, found in record["files"].items())
        is_same = all(record.get(key) == value for key, value in stated.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return record if is_same and is_whole else None


class _Shard:
    """One shard while it is written."""

    def __init__(self, settings: Settings, folder: Path, name: str) -> None:
        self._settings, self._folder, self._name = settings, folder, name
        self._structure = Structure(settings.around)
        self._dropped: Counter[str] = Counter()
        self._noted: Counter[str] = Counter()
        self._splits: dict[Split, Counter[str]] = {split: Counter() for split in SPLITS}

    def write(self, rows: Iterable[tuple[int, Mapping[str, str]]], assembler: Assembler) -> dict[str, Any]:
        """Write all rows; returns what is counted."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        read = 0
        with ExitStack() as stack:
            writers = {split: self._writers(split, stack) for split in SPLITS}
            lines = stack.enter_context((self._folder / HELD_OUT).open("wb"))
            waiting: dict[Split, list[Assembled]] = {split: [] for split in SPLITS}
            for number, row in rows:
                read += 1
                document = self._document(row, assembler, number)
                if document is None:
                    continue
                split = self._side(row)
                waiting[split].append(document)
                if split == "valid":
                    lines.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                if len(waiting[split]) == _BATCH:
                    self._flush(split, waiting[split], writers[split])
            for split in SPLITS:
                self._flush(split, waiting[split], writers[split])
        if removed := self._dropped.pop(
            "nul_characters_removed", 0
        ):  # of rows that are kept, or dropped for another reason
            self._noted["nul_characters_removed"] += removed
        return {"rows": read, "dropped": _sorted(self._dropped), "noted": _sorted(self._noted)}

    def finish(self, stated: Mapping[str, Any], numbers: Mapping[str, Any], *, is_last: bool) -> dict[str, Any]:
        """Write the record, last of all; a split without documents leaves no files."""
        for split in SPLITS:
            if not self._splits[split]["documents"]:
                for name, _ in ARRAYS:
                    bin_path(self._folder / f"{split}_{name}").unlink()
                    idx_path(self._folder / f"{split}_{name}").unlink()
        files = {path.name: described(path) for path in sorted(self._folder.iterdir())}
        splits = {split: _sorted(self._splits[split]) for split in SPLITS}
        record = {**stated, **numbers, "is_last": is_last, "splits": splits, "files": files}
        draft = self._folder / f"{RECORD}.tmp"
        draft.write_text(json.dumps(record), encoding="utf-8")
        os.replace(draft, self._folder / RECORD)
        return record

    def _writers(self, split: Split, stack: ExitStack) -> list[IndexedDatasetWriter]:
        prefixes = [(self._folder / f"{split}_{name}", dtype) for name, dtype in ARRAYS]
        return [stack.enter_context(IndexedDatasetWriter(prefix, dtype)) for prefix, dtype in prefixes]

    def _document(self, row: Mapping[str, str], assembler: Assembler, number: int) -> Assembled | None:
        where = f"{self._name}, row {number + 1}"
        exchange = exchange_of(row, drops=self._dropped, nul_policy=self._settings.nul_policy, where=where)
        if exchange is None:
            return None
        document = assembler.assemble(exchange)
        if document is None:
            self._dropped["final_too_long"] += 1
            return None
        if has_control_text(exchange):
            self._noted["rows_that_spell_a_control_token"] += 1
        for part, cut in (("analysis", document.analysis_cut), ("user", document.user_cut)):
            if cut:
                self._noted[f"{part}_rows_cut"] += 1
                self._noted[f"{part}_tokens_cut"] += cut
        return document

    def _side(self, row: Mapping[str, str]) -> Split:
        fraction = self._settings.held_out_fraction
        return "valid" if is_held_out(row["synth_id"], fraction=fraction, digest="blake2b") else "train"

    def _flush(self, split: Split, documents: list[Assembled], writers: Sequence[IndexedDatasetWriter]) -> None:
        if not documents:
            return
        rendered = arrays_of(documents)
        lengths = [len(one.tokens) for one in documents]
        self._structure.require(rendered, lengths, where=f"{self._name}, {split}")
        for writer, values in zip(writers, rendered.arrays, strict=True):
            writer.add_documents(values, lengths)
        counts = self._splits[split]
        counts["documents"] += len(documents)
        counts["tokens"] += rendered.tokens.size
        counts["analysis_labels"] += sum(one.analysis for one in documents)
        counts["final_labels"] += sum(one.final for one in documents)
        documents.clear()


def _sorted(counts: Counter[str]) -> dict[str, int]:
    """In the order of the names."""
    return dict(sorted(counts.items()))
