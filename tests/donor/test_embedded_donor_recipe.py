"""The training recipe on a pico donor: reproducible bytes, right figures, refusals."""

from __future__ import annotations

import json
import math
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes import embedded_donor
from recipes.data.donor_text import Corpus, EncodedDocument
from recipes.model.config import DonorConfig
from recipes.model.donor import Donor
from recipes.params.embedded_donor import Optimizer, Params
from recipes.recipe import Context, RunResult
from recipes.train.donor_optimizer import DonorOptimizer
from recipes.train.loop import Scratch, Trainer
from recipes.train.state import Identity
from vpstore.errors import RecipeRefused

RANKS = Path(__file__).parent.parent.parent / "assets/qwen.tiktoken"
SHAPE = {"hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 8, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PICO = DonorConfig(**SHAPE, **HEADS)
TINY = PICO.model_copy(update={"vocab_size": 40})


def params(**changes: object) -> Params:
    optimizer = Optimizer(
        matrix_rate=0.01,
        embedding_rate=0.02,
        gain_rate=0.01,
        matrix_decay=0.01,
        embedding_decay=0.01,
        momentum=0.95,
        betas=(0.9, 0.95),
        clip_norm=1.0,
        warmup=1,
    )
    values = {
        "donor": PICO,
        "optimizer": optimizer,
        "steps": 3,
        "sequence_length": 16,
        "sequences": 2,
        "embedding_std": 0.02,
        "matrix_std": 0.05,
        "seed": 1,
        "held_out_fraction": 0.2,
        "evaluated": "corpus/text.jsonl",
        "copies": {},
        "evaluations": 2,
        "loss_chunk": 8,
        "precision": "float32",
    }
    return Params.model_validate(values | changes)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    texts = [{"doc_id": f"d{n}", "text": f"Query {n} joins table {n + 1} with {n + 2}.\n"} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return {"corpus/text.jsonl": path, "ranks/qwen.tiktoken": RANKS}


def content(result: RunResult) -> dict[str, bytes]:
    found = {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in result.tensors.items()}
    for file in result.files:
        out = BytesIO()
        file.write(out)
        found[file.name] = out.getvalue()
    found["report"] = json.dumps([dict(result.report.metrics), dict(result.report.plots)], sort_keys=True).encode()
    return found


@pytest.mark.slow
def test_two_runs_give_equal_bytes(sources: dict[str, Path], tmp_path: Path) -> None:
    first, second = (embedded_donor.run(Context(params(), {}, sources, tmp_path)) for _ in range(2))
    assert content(first) == content(second)
    assert {tensor.dtype for tensor in first.tensors.values()} == {torch.bfloat16}
    assert set(first.tensors) == set(Donor(TINY).state_dict())
    assert [file.name for file in first.files] == ["config.json", "tokenizer.json"]
    report = first.report
    assert report.metrics["trained"]["tokens"] == 3 * 16 * 2
    assert [row["step"] for row in report.plots["held_out"]] == [2, 3]
    assert len(report.plots["loss"]) == 3
    assert report.plots["loss"][0]["loss"] == pytest.approx(math.log(151936), rel=0.01)


def test_a_missing_rank_file_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    without = {name: path for name, path in sources.items() if not name.startswith("ranks")}
    with pytest.raises(RecipeRefused, match="a source is missing"):
        embedded_donor.run(Context(params(), {}, without, tmp_path))


def pico_texts() -> list[EncodedDocument]:
    generator = np.random.default_rng(3)
    sizes = (1, 5, 9, 17, 30)
    return [EncodedDocument(str(n), generator.integers(0, 40, n).astype(np.int32), 3 * n) for n in sizes]


def test_bits_per_byte_equal_a_loop_over_single_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.data.donor_text.END_OF_TEXT", 39)
    donor = embedded_donor.new_donor(params(donor=TINY, matrix_std=0.5, embedding_std=0.5))
    texts, bits, size_bytes = pico_texts(), 0.0, 0
    for text in texts:
        ids = [39, *text.ids.tolist()]
        for at in range(len(text.ids)):
            begin = at - at % 8  # fresh context every 8 tokens
            with torch.no_grad():
                logits = donor(torch.tensor([ids[begin : at + 1]]))[0, -1]
            bits -= torch.log_softmax(logits.double(), 0)[ids[at + 1]].item() / math.log(2)
        size_bytes += text.size_bytes
    figures = embedded_donor.held_out_figures(donor, texts, 8)
    assert figures["bits_per_byte"] == pytest.approx(bits / size_bytes, rel=1e-5)
    assert figures["tokens"] == sum(len(text.ids) for text in texts)


@pytest.fixture
def small_ids(monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """A text that repeats itself, in a vocabulary of 40 ids."""
    monkeypatch.setattr("recipes.data.donor_text.END_OF_TEXT", 39)
    return Corpus([EncodedDocument("d", np.arange(17, dtype=np.int32), 17)], pico_texts(), {})


def trainer(corpus: Corpus, folder: Path, **changes: object) -> Trainer:
    asked = params(donor=TINY, **changes)
    scratch = Scratch(folder, Identity({}, asked.model_dump(mode="json")))
    return embedded_donor.trainer_of(embedded_donor.new_donor(asked), asked, corpus, scratch)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_learns_a_repeated_text(small_ids: Corpus, tmp_path: Path, precision: str) -> None:
    run = trainer(small_ids, tmp_path, steps=100, precision=precision)
    run.run(lambda *_: None)
    assert run.rows[0]["loss"] > 3.5
    assert run.rows[-1]["loss"] < 1.0


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(small_ids: Corpus, tmp_path: Path) -> None:
    whole, begun, resumed = (trainer(small_ids, tmp_path / name, steps=9) for name in ("a", "b", "b"))
    whole.run(lambda *_: None)
    begun.on_step = lambda row, figures: begun.step == 5  # states are saved at every step here; this one is not
    begun.run(lambda *_: None)
    assert resumed.resume()
    assert resumed.step == 4
    resumed.run(lambda *_: None)
    assert resumed.rows == whole.rows
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_seed_decides_the_weights_and_the_rows() -> None:
    one, same, other = (embedded_donor.new_donor(params(donor=TINY, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one.head_weight, same.head_weight)
    assert not torch.equal(one.head_weight, other.head_weight)


def test_every_weight_has_one_optimizer() -> None:
    donor = Donor(TINY)
    steppers = DonorOptimizer(donor, params().optimizer).steppers
    owned = [id(weight) for stepper in steppers for group in stepper.param_groups for weight in group["params"]]
    assert sorted(owned) == sorted(id(weight) for weight in donor.parameters())


def test_a_loss_that_is_not_finite_stops_the_run(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="not finite"):
        embedded_donor.run(Context(params(embedding_std=1e38, matrix_std=1e38), {}, sources, tmp_path))
