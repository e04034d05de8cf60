"""What ships in assets/: digests, licences, the held-out rule, stock transformers, and that the donor has learnt."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from recipes.checkpoint import load_donor, parse_donor_config
from recipes.data.donor_text import END_OF_TEXT, Corpus, qwen_encoder, read_corpus
from recipes.embedded_donor import held_out_figures
from recipes.model.donor import Donor
from recipes.tensors import TensorReader

ROOT = Path(__file__).parent.parent.parent
DONOR = ROOT / "assets/embedded_donor"
PROSE = ROOT / "assets/corpus/prose.jsonl"
PROVENANCE = sorted((ROOT / "configs/upcycle/provenance").glob("*.json"))
MINE = {"embedded_donor", "gpt-oss-20b", "healing_prose", "o200k_base", "qwen3-0_6B", "qwen_tiktoken"}
QWEN_IDS = 151669


@pytest.fixture(scope="module")
def log() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DONOR / "training.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def donor() -> Donor:
    config = parse_donor_config(json.loads((DONOR / "config.json").read_text(encoding="utf-8")))
    return load_donor(TensorReader(DONOR), config)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    encode = qwen_encoder(ROOT / "assets/qwen.tiktoken")
    return read_corpus({"prose": PROSE}, encode, evaluated="prose", held_out_fraction=0.1, copies={})


@pytest.mark.parametrize("path", PROVENANCE, ids=lambda path: path.stem)
def test_provenance_pins_what_is_there(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["format"] == 1
    assert document["name"] == path.stem
    assert all(document[key] for key in ("origin", "revision", "license", "root", "files"))
    for entry in document["files"]:
        assert re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        if document["root"].startswith("assets"):
            data = (ROOT / document["root"] / entry["path"]).read_bytes()
            assert (sha256(data).hexdigest(), len(data)) == (entry["sha256"], entry["size_bytes"])


def test_every_pinned_source_has_a_provenance() -> None:
    assert {path.stem for path in PROVENANCE} >= MINE


def test_licences_lie_beside_what_they_cover() -> None:
    assert "PSF LICENSE AGREEMENT" in (ROOT / "assets/corpus/LICENSE-Python.txt").read_text(encoding="utf-8")
    assert "PostgreSQL Global" in (ROOT / "assets/corpus/LICENSE-PostgreSQL.txt").read_text(encoding="utf-8")
    assert "MIT License" in (ROOT / "assets/licenses/MIT-tiktoken.txt").read_text(encoding="utf-8")
    assert "Apache License" in (ROOT / "assets/licenses/Apache-2.0.txt").read_text(encoding="utf-8")


def test_the_donor_is_small_and_the_corpus_is_as_promised() -> None:
    rows = [json.loads(line) for line in PROSE.read_text(encoding="utf-8").splitlines()]
    sizes = [len(row["text"].encode()) for row in rows]
    assert (DONOR / "model.safetensors").stat().st_size <= 25_000_000
    assert 1_000_000 <= sum(sizes) <= 4_000_000
    assert 1_000 <= min(sizes) <= max(sizes) <= 20_000
    assert [row["doc_id"] for row in rows] == sorted({row["doc_id"] for row in rows})
    assert {row["doc_id"].split(":")[0] for row in rows} == {"postgresql-doc-15", "python3.11-doc"}


def test_the_log_belongs_to_these_files_and_this_config(log: dict[str, Any]) -> None:
    provenance = json.loads((ROOT / "configs/upcycle/provenance/embedded_donor.json").read_text(encoding="utf-8"))
    assert log["files"] == provenance["files"]
    table = tomllib.loads((ROOT / "configs/upcycle/embedded_donor.toml").read_text(encoding="utf-8"))
    assert log["params"] == {**table["main"], "donor": table["donor"]}
    sources = {entry["name"]: entry["sha256"] for entry in log["sources"]}
    assert sources["corpus/prose.jsonl"] == sha256(PROSE.read_bytes()).hexdigest()
    assert sources["ranks/qwen.tiktoken"] == sha256((ROOT / "assets/qwen.tiktoken").read_bytes()).hexdigest()
    assert {name for name in sources if name.startswith("corpus/")} == set(log["metrics"]["sources"])


def test_held_out_documents_were_not_trained_on(log: dict[str, Any], corpus: Corpus) -> None:
    assert log["params"]["held_out_fraction"] == 0.1
    assert log["metrics"]["sources"]["corpus/prose.jsonl"] == dict(corpus.counts["prose"])
    assert log["metrics"]["held_out"]["documents"] == len(corpus.held_out)
    assert log["metrics"]["held_out"]["tokens"] == sum(len(each.ids) for each in corpus.held_out)
    for counts in log["metrics"]["sources"].values():
        share = counts["held_out"] / counts["documents"]
        assert share == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / counts["documents"]))


def test_stock_transformers_gives_the_same_logits(donor: Donor) -> None:
    theirs = Qwen3ForCausalLM.from_pretrained(DONOR, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(DONOR)("CREATE INDEX — define a new index", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(donor(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_donor_is_far_better_than_a_unigram_model(donor: Donor, corpus: Corpus) -> None:
    texts = sorted(corpus.held_out, key=lambda each: len(each.ids))[5:25:5]
    counts = Counter(token for each in corpus.train for token in [END_OF_TEXT, *each.ids.tolist()])
    total = sum(counts.values()) + QWEN_IDS
    bits = -sum(math.log2((counts[token] + 1) / total) for each in texts for token in each.ids.tolist())
    unigram = bits / sum(each.size_bytes for each in texts)
    figures = held_out_figures(donor, texts, 2048)
    assert unigram > 2.0
    assert figures["bits_per_byte"] < 0.65 * unigram


def test_the_donor_copies_numbers(donor: Donor) -> None:
    encode = qwen_encoder(ROOT / "assets/qwen.tiktoken")
    for number in ("1 2 3 4 5", "407", "2025-08-05", "1234567890"):
        context = [END_OF_TEXT, *encode(f"Repeat exactly: {number}\n").tolist()]
        answer = encode(number).tolist()
        with torch.no_grad():
            best = donor(torch.tensor([context + answer]))[0, len(context) - 1 : -1].argmax(-1)
        assert best.tolist() == answer
