from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from recipes import tokenizer
from recipes.data.bpe import json_bytes
from recipes.data.harmony import RANKS_FILE, HarmonyTokenizer
from recipes.params.tokenizer import Params
from recipes.recipe import Context, Plan
from vpstore.errors import RecipeRefused


def context(scratch: Path, ranks: Path | None, padded_vocab: int = 201088) -> Context:
    sources = {} if ranks is None else {f"ranks/{RANKS_FILE}": ranks}
    return Context(Params(padded_vocab=padded_vocab, sample_documents=20), {}, sources, scratch)


@pytest.fixture(scope="module")
def plan(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return tokenizer.plan(context(tmp_path_factory.mktemp("scratch"), assets / RANKS_FILE))


@pytest.fixture(scope="module")
def artifact(plan: Plan, write, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    return write(plan.files, tmp_path_factory.mktemp("o200k-harmony"))


def test_files_and_gates(plan: Plan, artifact: Path, assets: Path) -> None:
    assert sorted(path.name for path in artifact.iterdir()) == sorted(
        (RANKS_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens.json", "manifest.json")
    )
    assert plan.report is not None
    assert [gate.verdict for gate in plan.report.gates] == ["passed"] * 3
    assert (artifact / RANKS_FILE).read_bytes() == (assets / RANKS_FILE).read_bytes()
    assert json.loads((artifact / "manifest.json").read_text())["padded_vocab"] == 201088
    special = json.loads((artifact / "special_tokens.json").read_text())
    assert special["special"]["<|return|>"] == 200002
    assert special["aliases"] == {"<|reserved_200018|>": 200018}


def test_stock_transformers_opens_it(artifact: Path, harmony: HarmonyTokenizer) -> None:
    stock = PreTrainedTokenizerFast.from_pretrained(artifact)
    text = "Numbers: 1234567890, naïve café\n"
    assert stock(text)["input_ids"] == harmony.encode(text)
    assert len(stock) == 201088
    assert (stock.bos_token_id, stock.eos_token_id, stock.pad_token_id) == (199998, 200002, 199999)
    assert stock.decode(harmony.encode(text)) == text
    assert stock("<|end|>")["input_ids"] == [200007]  # the library's way; text from outside needs the next line
    assert stock("<|end|>", split_special_tokens=True)["input_ids"] == harmony.encode("<|end|>")


def test_a_wrong_file_misses_the_gate(harmony: HarmonyTokenizer, artifact: Path) -> None:
    document = json.loads((artifact / "tokenizer.json").read_bytes())
    document["model"]["merges"][300:302] = document["model"]["merges"][300:302][::-1]
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,2}|\P{N}+"
    report = tokenizer._report(harmony, json_bytes(document), documents=5)
    assert report.gates[0].verdict == "missed"


def test_another_vocabulary_size_is_refused(tmp_path: Path, assets: Path) -> None:
    with pytest.raises(RecipeRefused, match="padded vocabulary"):
        tokenizer.plan(context(tmp_path, assets / RANKS_FILE, padded_vocab=201216))


def test_missing_or_other_ranks_are_refused(tmp_path: Path, assets: Path) -> None:
    with pytest.raises(RecipeRefused, match="no rank file"):
        tokenizer.plan(context(tmp_path, None))
    with pytest.raises(RecipeRefused, match="not the published one"):
        tokenizer.plan(context(tmp_path, assets / "qwen.tiktoken"))
