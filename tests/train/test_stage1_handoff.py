"""The Stage 1 files say all that the contract lists, read back, and refuse what cannot run."""

from __future__ import annotations

import hashlib
import math
import shutil
import tomllib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from training_pico import (
    Workshop,
    checkpoint_context,
    pico_config,
    pico_moe,
    pico_weights,
    stage1_params,
    write_checkpoint,
    write_data,
)

from recipes import stage1_handoff, tokenizer
from recipes.data.batches import AlignedDataset
from recipes.data.encodings import O200K_HARMONY
from recipes.recipe import Plan
from recipes.train.run_files import parse_arguments, to_toml, write_arguments
from vpstore.errors import RecipeRefused


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("shop"), pico_moe())


def texts(plan: Plan) -> dict[str, str]:
    found = {}
    for file in plan.files:
        out = BytesIO()
        file.write(out)
        found[file.name] = out.getvalue().decode()
    return found


def test_the_run_is_complete(shop: Workshop) -> None:
    plan = stage1_handoff.plan(checkpoint_context(shop, stage1_params()))
    assert not plan.tensors
    files = texts(plan)
    run = tomllib.loads(files["stage1.toml"])
    assert {role: one["digest"] for role, one in run["inputs"].items()} == {
        role: f"blake3:{role}" for role in ("checkpoint", "data", "tokenizer")
    }
    assert run["object"] == "vpMoE"
    shown = 2048 * 256 * run["data"]["fill"]  # tokens a step, without padding
    assert 0 < run["data"]["fill"] < 1
    assert run["batch"]["steps"] == math.ceil(1_000_000_000 / shown)
    assert 1_000_000_000 <= run["batch"]["tokens"] < 1_000_000_000 + shown
    assert run["loss"]["weights"] == {"reasoning": 1.0, "final": 1.0}
    assert run["loss"]["mask_ids_from"] == 200019
    assert run["teacher"]["model"] == "openai/gpt-oss-120b"
    assert [stage["name"] for stage in run["later_stages"]] == ["stage2", "stage3"]
    assert run["router"]["num_experts"] == 8
    assert run["schedule"]["restart"] is True
    assert run["data"]["packing"] == "best_fit"
    assert {"normuon_second_moment", "expert_bias", "log_freq_float32", "consumed_samples"} <= set(
        run["resume"]["state"]
    )
    assert {"checkpoint", "data", "data_manifest", "tokenizer", "config"} == set(run["identity"]["refuse_if_different"])
    logs = run["logging"]
    assert {"cross_entropy_reasoning", "gradient_norm", "tokens_per_second"} <= set(logs["every_step"])
    assert {"entropy", "cv_percent", "dead_experts"} <= set(logs["router"])
    assert run["stop"]["min_format_validity"] == 0.95
    arguments = parse_arguments(files["megatron_args.txt"])
    assert arguments["num-experts"] == "8"
    assert arguments["moe-layer-freq"] == "[0]+[1]*3"
    assert arguments["window-size"] == "127,0"  # T13: two numbers
    assert arguments["norm-epsilon"] == "1e-06"
    assert arguments["window-attn-skip-freq"] == "4"  # without it every layer would have the window
    assert arguments["position-embedding-type"] == "rope"
    assert arguments["train-iters"] == str(run["batch"]["steps"])
    assert arguments["moe-router-dtype"] == "fp32"
    assert "moe-router-enable-expert-bias" in arguments
    for role in ("checkpoint", "data", "tokenizer"):
        assert f"blake3:{role}" in files["megatron_args.txt"]
    assert texts(stage1_handoff.plan(checkpoint_context(shop, stage1_params()))) == files


def test_it_says_which_data_and_which_tokenizer(shop: Workshop) -> None:
    run = tomllib.loads(texts(stage1_handoff.plan(checkpoint_context(shop, stage1_params())))["stage1.toml"])
    manifest = (shop.root / "data/manifest.json").read_bytes()
    assert run["data"]["manifest"] == {"path": "manifest.json", "digest": f"blake3:{blake3(manifest).hexdigest()}"}
    assert (run["data"]["train"], run["data"]["valid"]) == (["train/text"], ["valid/text"])
    train = AlignedDataset(shop.root / "data", "train")
    assert run["data"]["epochs"] == run["batch"]["tokens"] / train.tokens
    assert (
        run["tokenizer"]["ranks_sha256"]
        == hashlib.sha256((shop.root / "tokenizer/o200k_base.tiktoken").read_bytes()).hexdigest()
    )
    assert (run["tokenizer"]["padded_vocab"], run["tokenizer"]["valid_vocab"]) == (201088, 200019)
    assert run["logging"]["uniform_entropy"] == pytest.approx(math.log(8))
    assert run["teacher"]["used_in"] == ["stage2", "stage3"]
    assert [stage["starts_from"] for stage in run["later_stages"]] == ["stage1", "stage2"]


def test_the_packing_is_stated_in_both_files(shop: Workshop) -> None:
    flags = {"reset-position-ids", "reset-attention-mask"}
    said = {
        "document_bounded": ("inside a document", "slices", flags),
        "whole_row": ("through the whole row", "slices", set()),
        "best_fit": ("inside a document", "whole documents", flags),
    }
    for packing, (attention, rows, wanted) in said.items():
        files = texts(stage1_handoff.plan(checkpoint_context(shop, stage1_params(packing=packing))))
        run = tomllib.loads(files["stage1.toml"])
        data = run["data"]
        assert (data["packing"], data["attention"]) == (packing, attention)
        assert data["rows"].startswith(rows)
        assert (flags & set(parse_arguments(files["megatron_args.txt"]))) == wanted
        is_whole = packing == "best_fit"
        assert ("packed by best fit" in files["megatron_args.txt"]) == is_whole
        assert ("padding" in data) == ("documents_cut" in data) == (data["fill"] < 1) == is_whole
        if is_whole:
            assert data["documents_cut"] == 0
            assert (data["padding"]["id"], data["padding"]["loss_mask"]) == (199999, 0)
        else:
            assert run["batch"]["steps"] == -(-1_000_000_000 // (2048 * 256)) == 1908


def test_what_ends_a_document_is_said_in_both_files(shop: Workshop) -> None:
    """Upstream bounds attention behind tokenizer.eod, and its own tokenizers answer another id."""
    for packing in ("best_fit", "document_bounded", "whole_row"):
        files = texts(stage1_handoff.plan(checkpoint_context(shop, stage1_params(packing=packing))))
        run = tomllib.loads(files["stage1.toml"])
        assert run["tokenizer"]["end_of_document"] == run["data"]["end_of_document"] == 199999
        is_reset = "reset-attention-mask" in parse_arguments(files["megatron_args.txt"])
        assert ("eod to 199999" in files["megatron_args.txt"]) == is_reset == (packing != "whole_row")
    train = AlignedDataset(shop.root / "data", "train")
    assert {int(train.document(number)[0][-1]) for number in range(len(train))} == {199999}


def test_the_published_tokenizer_alone_would_not_bound_a_document() -> None:
    """Why it has to be said: what stock libraries take for the end is the end of an answer."""
    assert O200K_HARMONY.special[tokenizer._config()["eos_token"]] == 200002


def test_the_evaluation_is_stated(shop: Workshop) -> None:
    files = texts(stage1_handoff.plan(checkpoint_context(shop, stage1_params())))
    found = tomllib.loads(files["stage1.toml"])["evaluation"]
    valid = AlignedDataset(shop.root / "data", "valid")
    assert (found["held_out_tokens"], found["prompts"], found["batches"]) == (valid.tokens, len(valid), 1)
    assert (found["max_new_tokens"], found["decoding"]) == (1536, "greedy")
    assert parse_arguments(files["megatron_args.txt"])["eval-iters"] == "1"
    table = stage1_params().evaluation.model_dump() | {"held_out_tokens": 256, "prompts": 3, "control_rows": 2}
    batch = {**stage1_params().batch.model_dump(), "sequence_length": 32, "global_sequences": 4}
    files = texts(stage1_handoff.plan(checkpoint_context(shop, stage1_params(evaluation=table, batch=batch))))
    found = tomllib.loads(files["stage1.toml"])["evaluation"]
    assert (found["held_out_tokens"], found["prompts"], found["control_rows"], found["batches"]) == (256, 3, 2, 2)
    assert parse_arguments(files["megatron_args.txt"])["eval-iters"] == "2"


def test_the_data_paths_are_listed(shop: Workshop) -> None:
    text = texts(stage1_handoff.plan(checkpoint_context(shop, stage1_params())))["megatron_args.txt"]
    for split in ("train", "valid"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"# --{split}-data-path")]
        prefixes = line.rpartition(": ")[2].split()
        assert prefixes == [f"{split}/text_tokens"]
        assert all((shop.root / "data" / f"{prefix}.idx").is_file() for prefix in prefixes)


def test_what_it_says_of_truncation_follows_the_packing(shop: Workshop) -> None:
    said = {}
    for packing, length in (("best_fit", 2048), ("best_fit", 40), ("document_bounded", 2048), ("whole_row", 2048)):
        batch = {**stage1_params().batch.model_dump(), "sequence_length": length}
        params = stage1_params(packing=packing, batch=batch)
        data = tomllib.loads(texts(stage1_handoff.plan(checkpoint_context(shop, params)))["stage1.toml"])["data"]
        assert "parses" not in data["harmony"]
        said[packing, length] = data["truncation"].rpartition("; ")[2]
    assert said["best_fit", 2048] == "a row keeps its documents whole"
    assert said["best_fit", 40].startswith("a row keeps its documents whole, but for the ")
    assert said["document_bounded", 2048] == said["whole_row", 2048] == "a row may still begin or end inside a message"


def test_documents_longer_than_a_row_are_counted(shop: Workshop) -> None:
    batch = stage1_params().batch.model_copy(update={"sequence_length": 40}).model_dump()
    run = tomllib.loads(texts(stage1_handoff.plan(checkpoint_context(shop, stage1_params(batch=batch))))["stage1.toml"])
    lengths = AlignedDataset(shop.root / "data", "train").lengths
    assert run["data"]["documents_cut"] == int((lengths > 40).sum()) > 0


def test_data_that_is_not_what_its_manifest_says_is_refused(shop: Workshop, tmp_path: Path) -> None:
    shutil.copytree(shop.root, tmp_path / "shop")
    path = tmp_path / "shop/data/train/text_span.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(RecipeRefused, match="manifest"):
        stage1_handoff.plan(checkpoint_context(Workshop(tmp_path / "shop"), stage1_params()))


def test_what_cannot_run_is_refused(shop: Workshop, tmp_path: Path) -> None:
    batch = stage1_params().batch.model_dump()
    with pytest.raises(RecipeRefused, match="longer than the model"):
        stage1_handoff.plan(checkpoint_context(shop, stage1_params(batch={**batch, "sequence_length": 4096})))
    with pytest.raises(RecipeRefused, match="warm-up"):
        stage1_handoff.plan(checkpoint_context(shop, stage1_params(batch={**batch, "target_tokens": 1000})))
    write_checkpoint(tmp_path / "parent", pico_config(), pico_weights(pico_config()))
    write_data(tmp_path / "data")
    with pytest.raises(RecipeRefused, match="mixture"):
        stage1_handoff.plan(checkpoint_context(Workshop(tmp_path), stage1_params()))


def test_files_that_do_not_say_the_run_are_refused(shop: Workshop) -> None:
    context = checkpoint_context(shop, stage1_params())
    moe = pico_moe().moe
    assert moe is not None
    run = stage1_handoff.run_config(context, pico_moe(), moe)
    toml = to_toml(run)
    arguments = write_arguments(stage1_handoff.megatron_arguments(run))
    stage1_handoff.validate(toml, arguments, run)
    with pytest.raises(RecipeRefused, match="read back") as refusal:
        stage1_handoff.validate(toml.replace("restart = true", "restart = false"), arguments, run)
    assert refusal.value.where == "stage1.toml: schedule"
    with pytest.raises(RecipeRefused, match="read back") as refusal:
        stage1_handoff.validate(toml, arguments.replace("--num-experts 8", "--num-experts 9"), run)
    assert refusal.value.where == "megatron_args.txt: num-experts"


KEYS = st.text(min_size=1, max_size=6)
PLAIN = st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
DOCUMENTS = st.recursive(
    st.dictionaries(KEYS, PLAIN | st.lists(PLAIN, max_size=3), max_size=4),
    lambda inner: st.dictionaries(KEYS, PLAIN | inner | st.lists(inner, min_size=1, max_size=2), max_size=3),
    max_leaves=8,
)


@given(DOCUMENTS)
def test_toml_reads_back(document: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(document)) == document


FLAGS = st.from_regex(r"[a-z][a-z0-9-]{0,10}", fullmatch=True)
WORDS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=10)


@given(st.dictionaries(FLAGS, st.none() | WORDS), st.lists(WORDS, max_size=2))
def test_arguments_read_back(arguments: dict[str, str | None], comments: list[str]) -> None:
    assert parse_arguments(write_arguments(arguments, comments=comments)) == arguments


@pytest.mark.parametrize("line", ["num-layers 4", "--a b c", "--a 1\n--a 2"])
def test_lines_that_are_no_argument_are_refused(line: str) -> None:
    with pytest.raises(RecipeRefused, match="not one argument"):
        parse_arguments(line)


def test_a_value_without_a_form_is_refused() -> None:
    with pytest.raises(RecipeRefused, match="no form"):
        to_toml({"a": {"b": None}})
