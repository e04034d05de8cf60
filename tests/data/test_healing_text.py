from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes import healing_text
from recipes.data.batches import AlignedDataset
from recipes.data.conversation import HarmonyRenderer
from recipes.data.harmony import EOD, HarmonyTokenizer
from recipes.data.split import is_held_out
from recipes.data.synth_sample import sample_row
from recipes.params.healing_text import FrameParams, Params
from recipes.recipe import Context, InputArtifact, RunResult
from vpstore.errors import RecipeRefused

FRAME = FrameParams(
    model_identity="You are a test.",
    reasoning="High",
    date="2026-01-01",
    knowledge_cutoff="2024-06",
    instructions="Answer.",
)
SETTINGS: dict[str, Any] = {
    "train_tokens": 12_000,
    "valid_tokens": 3_000,
    "harmony_share": 0.25,
    "max_document_tokens": 400,
    "held_out_fraction": 0.3,
    "synth_held_out_fraction": 0.3,
    "nul_policy": "drop",
    "frame": FRAME,
}
BAD_PROSE = [
    {"doc_id": "p-0", "text": "a second one with the same name"},
    {"doc_id": "nul", "text": "a\0b"},
    {"doc_id": "blank", "text": " \n"},
    {"doc_id": "surrogate", "text": "\ud800"},
]
BAD_ROWS = [{**sample_row(0), "synth_id": "empty", "query": ""}, sample_row(1)]


def prose(number: int) -> dict[str, str]:
    return {"doc_id": f"p-{number}", "text": f"Document {number}. " + "Words and words, é中. " * (5 + number % 70)}


def sources(folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "prose/prose.jsonl": [*map(prose, range(120)), *BAD_PROSE],
        "synth/synth.jsonl": [*map(sample_row, range(150)), *BAD_ROWS],
    }
    for name, values in rows.items():
        path = folder / Path(name).name
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return {name: folder / Path(name).name for name in rows} | {"prose/NOTICE": folder / "prose.jsonl"}


def context(folder: Path, assets: Path, **changes: Any) -> Context:
    tokenizer = InputArtifact("tokenizer", "o200k-harmony@main", "blake3:00", assets)
    params = Params(**{**SETTINGS, **changes})
    return Context(params, {"tokenizer": tokenizer}, sources(folder / "sources"), folder / "scratch")


@pytest.fixture(scope="module")
def built(assets: Path, write, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Path]:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("healing")
    result = healing_text.run(context(folder, assets))
    return result, write(result.files, folder / "artifact")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_gates_counts_and_drops(built: tuple[RunResult, Path]) -> None:
    result, artifact = built
    assert {gate.verdict for gate in result.report.gates} == {"passed"}
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["dropped"] == {
        "prose": {"empty": 1, "nul": 1, "repeated_id": 1, "surrogate": 1},
        "harmony": {"empty_query": 1, "repeated_id": 1},
    }
    for split in ("train", "valid"):
        numbers = result.report.metrics[split]
        dataset = AlignedDataset(artifact, split)
        assert dataset.tokens == sum(numbers["tokens"].values()) <= SETTINGS[f"{split}_tokens"]
        assert len(dataset) == sum(numbers["documents"].values())
        used = sum(count for name, count in numbers["losses"].items() if name.endswith("beyond_budget"))
        assert used + len(dataset) == sum(
            is_held_out(f"p-{n}", fraction=0.3, digest="sha256") == (split == "valid") for n in range(120)
        ) + sum(
            is_held_out(f"vpstore-sample-{n:05d}", fraction=0.3, digest="blake2b") == (split == "valid")
            for n in range(150)
        )


def test_odd_conversations_are_counted_and_never_rendered(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library breaks down on the first three and takes minutes for texts like the others."""
    endless = (" " * 1_000_000 + "\nmore", " \t" * 500_000 + "\n\n", "\n " * 500_000)
    long = ("x" + "\u3000" * 9_999, "\n" * 9_999 + "x", "word " * 400)
    odd = [{**sample_row(0), "synth_id": f"odd-{n}", "query": f"? {text}"} for n, text in enumerate(endless + long)]
    right, lengths = HarmonyRenderer.training, []

    def noted(self: Any, exchange: Any, **named: Any) -> Any:
        rendered = right(self, exchange, **named)
        lengths.append(rendered.tokens.size)
        return rendered

    monkeypatch.setattr(HarmonyRenderer, "training", noted)
    given = context(tmp_path, assets, train_tokens=200_000, valid_tokens=200_000)
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in odd))
    metrics = healing_text.run(replace(given, sources={**given.sources, "synth/odd.jsonl": path})).report.metrics
    assert metrics["dropped"]["harmony"]["long_blanks"] == len(endless)
    assert sum(metrics[split]["losses"].get("harmony_too_long", 0) for split in ("train", "valid")) == len(long)
    assert max(lengths) <= SETTINGS["max_document_tokens"]


def test_every_document_is_whole_and_on_its_side(built: tuple[RunResult, Path], harmony: HarmonyTokenizer) -> None:
    _, artifact = built
    known = {prose(number)["text"]: prose(number)["doc_id"] for number in range(120)}
    for split in ("train", "valid"):
        dataset = AlignedDataset(artifact, split)
        for number in range(len(dataset)):
            tokens, mask, span = dataset.document(number)
            assert tokens[-1] == EOD
            assert mask[-1] == span[-1] == 0
            text = harmony.decode(tokens[:-1].tolist())
            if text.startswith("<|start|>"):
                assert set(span.tolist()) == {0, 1, 2}
                continue
            assert not span.any()
            is_cut = tokens.size == SETTINGS["max_document_tokens"]
            assert mask[:-2].all()
            assert mask[-2] == (0 if is_cut else 1)
            names = [doc_id for whole, doc_id in known.items() if whole.startswith(text) and (is_cut or whole == text)]
            assert len(names) == 1
            assert is_held_out(names[0], fraction=0.3, digest="sha256") == (split == "valid")


def test_held_out_rows_stand_behind_the_held_out_documents(
    built: tuple[RunResult, Path], harmony: HarmonyTokenizer
) -> None:
    _, artifact = built
    dataset = AlignedDataset(artifact, "valid")
    texts = [harmony.decode(dataset.document(number)[0][:-1].tolist()) for number in range(len(dataset))]
    whole = [text for text in texts if not text.startswith("<|start|>")]
    rows = lines(artifact / "heldout.jsonl")
    assert [tuple(row) for row in rows] == [("doc_id", "text")] * len(whole)
    assert all(row["text"].startswith(text) for row, text in zip(rows, whole, strict=True))
    conversations = [text for text in texts if text.startswith("<|start|>")]
    harmony_rows = lines(artifact / "heldout_harmony.jsonl")
    assert all(
        row["query"] in text and row["synthetic_answer"] in text
        for row, text in zip(harmony_rows, conversations, strict=True)
    )


def test_every_prefix_holds_about_its_share(built: tuple[RunResult, Path]) -> None:
    _, artifact = built
    dataset = AlignedDataset(artifact, "train")
    total = conversations = 0
    for number in range(len(dataset)):
        tokens, _, span = dataset.document(number)
        total += tokens.size
        conversations += tokens.size if span.any() else 0
        if total > 4000:
            assert 0.15 < conversations / total < 0.35


def test_bytes_do_not_depend_on_the_number_of_processes(
    built: tuple[RunResult, Path],
    assets: Path,
    write,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VPSTORE_WORKERS", "2")
    again = write(healing_text.run(context(tmp_path, assets)).files, tmp_path / "artifact")
    first = built[1]
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert len(names) == 15
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_a_longer_corpus_moves_no_document(built: tuple[RunResult, Path], assets: Path, tmp_path: Path) -> None:
    here = context(tmp_path, assets, train_tokens=10**6, valid_tokens=10**6, max_document_tokens=10**5)
    with here.sources["prose/prose.jsonl"].open("a") as more:
        more.writelines(json.dumps(prose(number)) + "\n" for number in range(120, 150))
    healing_text.run(here)
    before = {row["doc_id"] for row in lines(built[1] / "heldout.jsonl")}
    after = {row["doc_id"] for row in lines(here.scratch / "dataset/heldout.jsonl")}
    assert before < after
    assert all(is_held_out(name, fraction=0.3, digest="sha256") for name in after)


def test_faults_of_the_sources_are_clear(assets: Path, tmp_path: Path) -> None:
    whole = context(tmp_path, assets)
    no_synth = {name: path for name, path in whole.sources.items() if name.startswith("prose")}
    with pytest.raises(RecipeRefused, match="no source") as caught:
        healing_text.run(Context(whole.params, whole.inputs, no_synth, tmp_path / "a"))
    assert "synth" in caught.value.where
    with pytest.raises(RecipeRefused, match="malformed"):
        healing_text.run(context(tmp_path, assets, nul_policy="refuse"))
    with pytest.raises(RecipeRefused, match="is empty"):
        healing_text.run(context(tmp_path, assets, valid_tokens=40))
