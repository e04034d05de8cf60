"""Healing data out of every format of source: FineWeb-Edu's layout, compressed lines, several files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from recipes import healing_text
from recipes.data.dataset_manifest import checked_manifest
from recipes.data.synth_sample import sample_row
from recipes.params.frame import FrameParams
from recipes.params.healing_text import Params
from recipes.recipe import Context, InputArtifact
from vpstore.errors import RecipeRefused

PARAMS = Params(
    train_tokens=6_000,
    valid_tokens=2_000,
    harmony_share=0.2,
    max_document_tokens=300,
    held_out_fraction=0.3,
    synth_held_out_fraction=0.3,
    nul_policy="drop",
    frame=FrameParams(
        model_identity="You are a test.",
        reasoning="High",
        date="2026-01-01",
        knowledge_cutoff="2024-06",
        instructions="Answer.",
    ),
)
PROSE = [{"id": f"<urn:uuid:{n}>", "text": f"{n}. " + "Words, é中. " * (5 + n % 40), "score": 3.1} for n in range(80)]
PROSE += [{"id": "none", "text": None, "score": 0.0}, {"id": "nul", "text": "a\0b", "score": 0.0}]
SYNTH = [sample_row(number) for number in range(60)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=17)
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(data))
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def build(folder: Path, assets: Path, ending: str) -> Context:
    """Prose in two files, conversations in one."""
    folder.mkdir()
    made = {
        f"prose/a{ending}": write_rows(folder / f"a{ending}", PROSE[:50]),
        f"prose/b{ending}": write_rows(folder / f"b{ending}", PROSE[50:]),
        f"synth/s{ending}": write_rows(folder / f"s{ending}", SYNTH),
        "prose/NOTICE": folder,
    }
    tokenizer = InputArtifact("tokenizer", "o200k-harmony@main", "blake3:00", assets)
    return Context(PARAMS, {"tokenizer": tokenizer}, made, folder / "scratch")


@pytest.mark.slow
def test_every_format_gives_the_same_bytes(assets: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    found = []
    for number, ending in enumerate((".jsonl", ".parquet", ".jsonl.zst", ".jsonl.gz")):
        here = build(tmp_path / str(number), assets, ending)
        artifact = write(healing_text.run(here).files, tmp_path / f"artifact-{number}")
        manifest = checked_manifest(artifact, kind="healing_text")
        assert manifest["dropped"] == {"harmony": {}, "prose": {"empty": 1, "nul": 1}}
        assert manifest["ignored_sources"] == ["prose/NOTICE"]
        digests = {name: sha256(path.read_bytes()).hexdigest() for name, path in here.sources.items() if path.is_file()}
        assert {name: one["sha256"] for name, one in manifest["sources"].items()} == digests
        files = {str(path.relative_to(artifact)): path.read_bytes() for path in artifact.rglob("*") if path.is_file()}
        assert len(files) == 15
        del files["manifest.json"]
        found.append(files)
    assert all(files == found[0] for files in found)


@pytest.mark.parametrize("ending", [".parquet", ".jsonl.zst", ".jsonl.gz"])
def test_a_truncated_source_is_refused(assets: Path, tmp_path: Path, ending: str) -> None:
    here = build(tmp_path / "x", assets, ending)
    path = here.sources[f"prose/b{ending}"]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(RecipeRefused, match="damaged") as caught:
        healing_text.run(here)
    assert caught.value.where == f"prose/b{ending}"


def test_a_source_that_changes_while_it_is_read_is_noticed(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = build(tmp_path / "x", assets, ".jsonl")
    right = healing_text._indices

    def changing(*arguments: Any) -> Any:
        indices = right(*arguments)
        for name in ("prose/a.jsonl", "prose/b.jsonl"):
            path = here.sources[name]
            path.write_bytes(path.read_bytes().replace(b"Words", b"\\ud800"))
        return indices

    monkeypatch.setattr(healing_text, "_indices", changing)
    with pytest.raises(RecipeRefused, match=r"changed while it was read|malformed"):
        healing_text.run(here)
