"""Evaluation: bits per byte against a slow loop, the same bytes for every tokenizer, the first token counted."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_pico
from hypothesis import given
from hypothesis import strategies as st
from training_pico import ROOT, Workshop, checkpoint_context, pico_moe, pico_weights, write_checkpoint

from recipes import evaluate
from recipes.checkpoint import donor_config_json, load_student
from recipes.data.bpe import json_bytes, load_ranks, tokenizer_json
from recipes.data.encodings import QWEN3
from recipes.data.harmony import HarmonyTokenizer
from recipes.model.config import DonorConfig
from recipes.model.donor import Donor
from recipes.params.evaluate import Params
from recipes.tensors import TensorReader, write_safetensors
from recipes.train.losses import VALID_VOCAB
from recipes.train.numeric import GOLDENS, SUMS, number_prompts, number_table
from recipes.train.scoring import Reader, score_answers, score_documents
from vpstore.errors import RecipeRefused

PARAMS = Params(total_bytes=400, max_bytes_per_document=150, three_digit_stride=500, chunk=64)
TEXTS = ["Ein längerer Satz über Zahlen: 12, 345 und 6.789." * 5, "kurz", "日本語のテキスト" * 30, "x = 1\n" * 20]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = Workshop.make(tmp_path_factory.mktemp("shop"), pico_moe())
    rows = [json.dumps({"doc_id": str(number), "text": text}) for number, text in enumerate(TEXTS)]
    (made.root / "data" / "heldout.jsonl").write_text("\n".join(rows) + "\n")
    return made


@pytest.fixture(scope="module")
def tokenizer() -> HarmonyTokenizer:
    return training_pico.tokenizer()


def test_bits_per_byte_equal_a_slow_loop_that_counts_the_first_token(
    shop: Workshop, tokenizer: HarmonyTokenizer
) -> None:
    report = evaluate.run(checkpoint_context(shop, PARAMS)).report
    model = load_student(TensorReader(shop.root / "parent"), pico_moe())
    texts = evaluate.held_out_texts(shop.root / "data" / "heldout.jsonl", PARAMS)
    nats, without_first, tokens = 0.0, 0.0, 0
    for text in texts:
        ids = tokenizer.encode(text)
        for place, label in enumerate(ids):  # one forward pass a token
            with torch.no_grad():
                logits = model(torch.tensor([[199999, *ids[:place]]]))[0, -1, :VALID_VOCAB].double()
            nll = float(torch.logsumexp(logits, 0) - logits[label])
            nats += nll
            without_first += nll if place else 0.0
        tokens += len(ids)
    size = sum(len(text.encode()) for text in texts)
    metrics = report.metrics
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert metrics["bits_per_byte"] != pytest.approx(without_first / math.log(2) / size, rel=1e-5)
    assert metrics["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert (metrics["bytes"], metrics["tokens"], metrics["documents"]) == (size, tokens, len(texts))
    assert metrics["finite"] is True
    assert [row["layer"] for row in report.plots["router"]] == [2, 3, 4]
    assert metrics["router_max_load_percent"] > 0
    assert {row["family"] for row in report.plots["numeric"]} == {"copy", "three_digits", "sum"}


def test_documents_that_share_passes_score_as_they_do_alone(
    shop: Workshop, tokenizer: HarmonyTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, in rows so short that some documents share one and one has none to fit into."""
    monkeypatch.setattr("recipes.train.scoring._PACKED_ROW", 90)
    monkeypatch.setattr("recipes.train.scoring._PACKED_ROWS", 2)
    model = load_student(TensorReader(shop.root / "parent"), pico_moe())
    documents = [tokenizer.encode(text) for text in (*TEXTS, "a", *TEXTS[1:])]
    found = {}
    for is_packed in (False, True):
        listener = evaluate.RoutingListener(model)
        reader = Reader(listener, VALID_VOCAB, 64)
        scores = list(score_documents(reader, documents, separator=199999, is_packed=is_packed))
        assert [len(nll_N) for nll_N in scores] == [len(ids) for ids in documents]
        found[is_packed] = (torch.cat(scores), [row["entropy"] for row in listener.rows()])
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-5, atol=1e-5)
    assert found[True][1] == pytest.approx(found[False][1])  # padding is counted by no router


def test_texts_are_chosen_by_bytes(shop: Workshop) -> None:
    texts = evaluate.held_out_texts(shop.root / "data" / "heldout.jsonl", PARAMS)
    sizes = [len(text.encode()) for text in texts]
    assert all(size <= 150 for size in sizes)
    assert sum(sizes) <= 400
    assert sum(sizes) > 400 - 4
    for text, whole in zip(texts, TEXTS, strict=False):
        assert whole.startswith(text)


@given(st.text(), st.integers(0, 40))
def test_a_cut_ends_between_two_characters_and_is_as_long_as_can_be(text: str, limit: int) -> None:
    kept = evaluate.cut_bytes(text, limit)
    assert text.startswith(kept)
    assert len(kept.encode()) <= limit
    if kept != text:
        assert len(text[: len(kept) + 1].encode()) > limit


def test_a_donor_is_read_with_its_own_tokenizer_on_the_same_bytes(shop: Workshop, tmp_path: Path) -> None:
    config = DonorConfig(
        hidden_size=16, num_hidden_layers=1, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1
    )
    torch.manual_seed(0)
    donor = Donor(config)
    folder = tmp_path / "donor"
    folder.mkdir()
    write_safetensors(
        folder / "model.safetensors", {name: (t / 50).bfloat16() for name, t in donor.state_dict().items()}
    )
    (folder / "config.json").write_text(json.dumps(donor_config_json(config)))
    document = tokenizer_json(
        {token: rank for token, rank in load_ranks(ROOT / "assets/qwen.tiktoken").items() if rank < 2000},
        pattern=QWEN3.pattern,
        special={name: 2000 + place for place, name in enumerate(QWEN3.special)},  # a short vocabulary: quick to build
        normalizer=QWEN3.normalizer,
        plain=QWEN3.plain,
    )
    (folder / "tokenizer.json").write_bytes(json_bytes(document))
    context = checkpoint_context(shop, PARAMS)
    inputs = {**context.inputs, "checkpoint": replace(context.inputs["checkpoint"], path=folder)}
    seen = evaluate._load(inputs["checkpoint"], inputs["tokenizer"])[1]
    assert (seen.separator, seen.valid_vocab) == (2000, 2026)
    assert seen.encode("a<|endoftext|>") != [64, 2000]  # special-looking text stays text
    metrics = evaluate.run(replace(context, inputs=inputs)).report.metrics
    student = evaluate.run(context).report.metrics
    assert metrics["bytes"] == student["bytes"]
    assert metrics["tokens"] != student["tokens"]
    assert metrics["nats_per_token"] == pytest.approx(math.log(2026), rel=0.1)  # untrained
    assert "router_max_load_percent" not in metrics


def test_weights_that_are_not_finite_miss_the_only_gate(shop: Workshop, tmp_path: Path) -> None:
    weights = pico_weights(pico_moe())
    weights["model.layers.3.self_attn.o_proj.bias"][0] = math.inf
    write_checkpoint(tmp_path / "parent", pico_moe(), weights)
    context = checkpoint_context(shop, PARAMS)
    bad = replace(context.inputs["checkpoint"], path=tmp_path / "parent")
    report = evaluate.run(replace(context, inputs={**context.inputs, "checkpoint": bad})).report
    assert [gate.verdict for gate in report.gates] == ["missed"]
    assert report.metrics["finite"] is False
    json.dumps([dict(report.metrics), dict(report.plots)], allow_nan=False)


def test_no_held_out_prose_is_refused(shop: Workshop, tmp_path: Path) -> None:
    shutil.copytree(shop.root / "data", tmp_path / "data")
    (tmp_path / "data" / "heldout.jsonl").write_text("")
    context = checkpoint_context(shop, PARAMS)
    empty = replace(context.inputs["data"], path=tmp_path / "data")
    with pytest.raises(RecipeRefused, match="no held-out prose"):
        evaluate.run(replace(context, inputs={**context.inputs, "data": empty}))


class Copycat:
    """A model that says the id at the place one whole answer earlier: with `Repeat` prompts it is always right."""

    def __init__(self, period: int, ids: int) -> None:
        self.period, self.head_weight = period, torch.eye(ids) * 30

    def forward_hidden(self, ids_BT: torch.Tensor, documents_BT: torch.Tensor | None = None) -> torch.Tensor:
        shifted = torch.roll(ids_BT, self.period - 1, dims=1)
        return self.head_weight[shifted]


def test_numbers_are_scored_answer_by_answer() -> None:
    """Every answer is one byte a token; a context ends with its number and a line break."""

    def encode(text: str) -> list[int]:
        return list(text.encode())

    prompts = number_prompts(stride=250)
    assert len(prompts) == len(GOLDENS) + 4 + len(SUMS)
    digits = [prompt for prompt in prompts if prompt.family == "three_digits"]
    assert [prompt.answer for prompt in digits] == ["000", "250", "500", "750"]
    reader = Reader(Copycat(period=4, ids=256), 256, 64)  # three digits and a line break before the answer
    right = score_answers(reader, [(encode(p.context), encode(p.answer)) for p in digits])
    wrong = score_answers(reader, [(encode(p.control or ""), encode(p.answer)) for p in digits])
    assert all(one.best_N.tolist() == encode(p.answer) for one, p in zip(right, digits, strict=True))
    assert all(one.best_N.tolist() != encode(p.answer) for one, p in zip(wrong, digits, strict=True))
    table = number_table(reader, encode, separator=0, stride=250)
    exact = {row["answer"] for row in table.rows if row["is_exact"]}
    assert {"000", "250", "500", "750"} <= exact
    assert table.accuracy == len([row for row in table.rows if row["is_exact"]]) / len(table.rows)
    assert 0 < table.token_accuracy < 1


def test_prompts_that_share_a_row_do_not_see_each_other(shop: Workshop, tokenizer: HarmonyTokenizer) -> None:
    model = load_student(TensorReader(shop.root / "parent"), pico_moe())
    reader = Reader(model, VALID_VOCAB, 64)
    prompts = [([199999, *tokenizer.encode(p.context)], tokenizer.encode(p.answer)) for p in number_prompts(stride=500)]
    together = score_answers(reader, prompts)
    for prompt, scores in zip(prompts, together, strict=True):
        alone = score_answers(reader, [prompt])[0]
        torch.testing.assert_close(alone.nll_N, scores.nll_N, rtol=1e-5, atol=1e-5)
