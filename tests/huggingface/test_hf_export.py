"""`vpstore export --to hf`: what is in the folder, and what a stranger can do with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from recipes.checkpoint import load_student, parse_student_config
from recipes.huggingface.card import Subject, card
from recipes.huggingface.documents import donor_document, generation_document, student_document, tokenizer_document
from recipes.huggingface.export import export
from recipes.huggingface.families import HARMONY, QWEN, family_of
from recipes.huggingface.history import Ancestor, Source, licence_files, provenances, sources_of
from recipes.huggingface.modeling_vpmoe import VpConfig, VpForCausalLM
from recipes.model.config import StudentConfig
from recipes.recipe import InputArtifact
from recipes.run import exporters
from recipes.tensors import TensorReader
from vpstore import api
from vpstore.errors import DigestMismatch, RecipeRefused
from vpstore.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
IS_BUILT = (ROOT / "weights/tiny/refs/vpMoE-smoke.json").exists()
CHAIN = [pytest.mark.chain, pytest.mark.skipif(not IS_BUILT, reason="the chain is not built here: make repro")]
STUDENTS = (
    "vpDense0-5_28@convert", "vpDense0-5_28@compat-heal", "vpDense0-5_28@real-morph", "vpDense0-5_28@real-heal",
    "vpDense@expand", "vpDense@wake-up", "vpMoE@upcycle",
)  # fmt: skip
CONFIG = StudentConfig(hidden_size=16, num_layers=4, ffn_hidden_size=12, attention="tpa")
SOURCE = Source("prose", "somewhere", "1", "MIT", frozenset({"aa"}))


def silent(label: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def exported(ref: str, folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        api.export(ref, folder, to="hf", work=Workspace.find(ROOT))
    return folder


def texts(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported("vpMoE@smoke", tmp_path_factory.mktemp("hf") / "vpMoE")


def expected(folder: Path, file: Path, tokens: int = 300) -> None:
    """Put fixed tokens and our logits of them into a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        manifest = json.loads((folder / "artifact.json").read_text())
        view = Path(api.resolve(f"{manifest['object']}@{manifest['stage']}", work=Workspace.find(ROOT)).path)
    student = load_student(TensorReader(view), parse_student_config(json.loads((view / "config.json").read_text())))
    ids = torch.randint(0, 199998, (1, tokens), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        torch.save({"ids": ids, "logits": student(ids)}, file)


class TestOfTheChain:
    pytestmark = CHAIN

    def test_a_stranger_opens_it(self, moe: Path, tmp_path: Path) -> None:
        expected(moe, tmp_path / "known.pt")
        script = Path(__file__).with_name("new_user.py")
        given = [str(path) for path in (script, moe, tmp_path / "known.pt", tmp_path / "saved")]
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *given],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found.pop("apart") < 1e-5
        assert found.pop("prompt").endswith("<|start|>user<|message|>What is 2 + 2?<|end|><|start|>assistant")
        assert 0 < found.pop("said") <= 12
        assert found == {
            "stops": [200002, 200012, 199999], "longest": 2048, "ends": ["<|return|>", "<|endoftext|>"],
            "dtype": "torch.bfloat16", "wide": ["expert_bias", "log_freq", "softmax_offset", "value_residual"],
            "names": True, "bytes": True, "again": True,
        }  # fmt: skip

    def test_torchs_own_reader_reads_it(self, moe: Path) -> None:
        reader = HuggingFaceStorageReader(str(moe))
        specs = reader.read_metadata().state_dict_metadata
        found = {name: torch.empty(spec.size, dtype=spec.properties.dtype) for name, spec in specs.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it is not distributed
            load(found, storage_reader=reader)
        expected = TensorReader(moe)
        assert set(found) == set(expected.names())
        assert len(found) == 293
        assert all(torch.equal(tensor, expected.read(name)) for name, tensor in found.items())

    def test_two_exports_are_equal(self, moe: Path, tmp_path: Path) -> None:
        assert texts(exported("vpMoE@smoke", tmp_path / "again")) == texts(moe)

    def test_the_artifacts_files_keep_their_paths_and_bytes(self, moe: Path) -> None:
        manifest = json.loads((moe / "artifact.json").read_text())
        own = {file["path"] for file in manifest["files"]}
        assert own <= set(texts(moe))
        added = set(texts(moe)) - own - {"artifact.json", "vpstore-export.json"}
        assert added == {
            "README.md", "LICENSE", "chat_template.jinja", "generation_config.json", "modeling_vpmoe.py",
            "licenses/Apache-2.0.txt", "licenses/MIT-tiktoken.txt", "licenses/LICENSE-Python.txt",
            "licenses/LICENSE-PostgreSQL.txt", "licenses/NOTICE.md",
        }  # fmt: skip

    def test_the_card_says_where_it_comes_from(self, moe: Path) -> None:
        said = (moe / "README.md").read_text()
        for name in ("qwen3-0_6B@main", "healing_text@main", "vpMoE@upcycle", "o200k-harmony@main"):
            assert f"`{name}`" in said
        assert "blake3:" + (moe / "README.md").read_text().partition("Artifact `blake3:")[2][:64] in said
        assert "| router_max_dead_percent | 0 | <= 10 | passed |" in said
        assert str(ROOT) not in said

    @pytest.mark.parametrize("ref", ["qwen3-0_6B-o200k@transplant", "qwen3-0_6B@main"])
    def test_a_donor_stops_and_speaks(self, ref: str, tmp_path: Path) -> None:
        folder = exported(ref, tmp_path / "donor")
        is_harmony = ref.startswith("qwen3-0_6B-o200k")
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation["eos_token_id"] == ([200002, 200012, 199999] if is_harmony else [151643, 151645])
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == generation["eos_token_id"]
        assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 40960
        assert (folder / "chat_template.jinja").exists() == is_harmony
        assert not (folder / "modeling_vpmoe.py").exists()

    @pytest.mark.parametrize("ref", ["gpt-oss-20b@main", "healing_text@main", "stage1@main"])
    def test_what_is_no_model_is_refused(self, ref: str, tmp_path: Path) -> None:
        with pytest.raises(RecipeRefused, match="only a model can be exported"):
            exported(ref, tmp_path / "none")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("ref", STUDENTS)
    def test_every_student_gives_our_logits(self, ref: str, tmp_path: Path) -> None:
        folder = exported(ref, tmp_path / "student")
        expected(folder, tmp_path / "known.pt")
        known = torch.load(tmp_path / "known.pt")
        model = VpForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            apart = (model(known["ids"]).logits - known["logits"]).abs().max() / known["logits"].abs().max()
        assert float(apart) < 1e-5

    def test_a_damaged_view_is_noticed(self, tmp_path: Path) -> None:
        (tmp_path / "view").mkdir()
        (tmp_path / "out").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            found = api.resolve("vpDense0-5_28@convert", work=Workspace.find(ROOT))
        for path in found.path.rglob("*"):
            target = tmp_path / "view" / path.relative_to(found.path)
            target.parent.mkdir(exist_ok=True)
            if path.is_file():
                target.symlink_to(path.resolve())
        damaged = tmp_path / "view/model-layer-002.safetensors"
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.unlink()
        damaged.write_bytes(data)
        source = InputArtifact("source", "vpDense0-5_28@convert", found.artifact, tmp_path / "view")
        with pytest.raises(DigestMismatch, match="not what its manifest says"):
            export(source, [], root=ROOT, folder=tmp_path / "out", progress=silent)


def test_it_is_offered() -> None:
    assert "hf" in exporters()


def test_a_config_comes_back_as_it_was_written() -> None:
    document = student_document(CONFIG, HARMONY)
    config = VpConfig(**document)
    assert {key: getattr(config, key) for key in document if key not in ("auto_map", "dtype", "architectures")} == {
        key: value for key, value in document.items() if key not in ("auto_map", "dtype", "architectures")
    }
    derived = VpConfig(attention="tpa", num_hidden_layers=8).layer_types
    assert derived == (["sliding_attention"] * 3 + ["full_attention"]) * 2


def tokenizer_of(spec: Any) -> dict[str, Any]:
    added = [{"content": name, "id": number} for name, number in spec.special.items()]
    return {"added_tokens": added, "model": {"vocab": dict.fromkeys(range(spec.n_ranks))}}


@pytest.mark.parametrize("family", [HARMONY, QWEN])
def test_a_family_is_told_by_its_ids(family: Any) -> None:
    document = tokenizer_of(family.spec)
    assert family_of(document, where="x") is family
    document["added_tokens"][2]["id"] += 1
    with pytest.raises(RecipeRefused, match="of no family") as caught:
        family_of(document, where="pico@main")
    assert caught.value.where == "pico@main, tokenizer.json"


@pytest.mark.parametrize("document", [{}, [], {"added_tokens": [], "model": {}}, {"added_tokens": 3}])
def test_what_is_no_tokenizer_is_of_no_family(document: Any) -> None:
    with pytest.raises(RecipeRefused, match="of no family"):
        family_of(document, where="x")


def test_a_donors_own_ends_come_first() -> None:
    own = {"eos_token_id": 151645, "max_position_embeddings": 64}
    assert donor_document(own, QWEN)["eos_token_id"] == 151645
    assert generation_document(own, QWEN)["eos_token_id"] == [151645, 151643]
    assert tokenizer_document({}, own, QWEN)["eos_token"] == "<|im_end|>"
    assert tokenizer_document({"eos_token": "x"}, own, QWEN)["eos_token"] == "x"


def test_a_source_without_a_licence_is_refused() -> None:
    history = [Ancestor("text@main", "blake3:1", sources=(("prose/a", "aa"), ("prose/b", "aa"), ("prose/c", "bb")))]
    with pytest.raises(RecipeRefused, match="licence is not known") as caught:
        sources_of(history, [SOURCE])
    assert caught.value.where == "text@main: prose/c"
    known = sources_of(history, [replace(SOURCE, files=frozenset({"aa", "bb"}))])
    assert [(ref, role) for ref, role, _ in known] == [("text@main", "prose")]
    with pytest.raises(RecipeRefused, match="text of a licence"):
        licence_files([replace(SOURCE, license="secret")], root=ROOT)


def test_every_provenance_file_has_a_licence_whose_text_is_here() -> None:
    files = licence_files(provenances(ROOT / "configs/upcycle/provenance"), root=ROOT)
    assert all(path.is_file() for path in files.values())


def test_a_provenance_file_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"name": "x"}')
    with pytest.raises(RecipeRefused, match="not of its form"):
        provenances(tmp_path)


@pytest.mark.parametrize(
    ("donors", "wanted"),
    [
        (["Apache-2.0"], "license: apache-2.0"),
        (["Apache-2.0", "MIT"], "license: other"),
        (["PSF-2.0 and PostgreSQL"], "license: other"),
        ([], "license: other"),
    ],
)
def test_the_card_has_its_donors_licence(donors: list[str], wanted: str) -> None:
    config = {"max_position_embeddings": 8}
    subject = Subject("a@main", "blake3:1", config, {"gates": {}, "loss": 1.5}, HARMONY, 12)
    sources = [("d@main", "donor", Source(name, "Hugging Face a/b", "r", name, frozenset())) for name in donors]
    text = card(subject, [Ancestor("a@main", "blake3:1")], sources)
    assert f"\n{wanted}\n" in text
    assert ("base_model:\n- a/b" in text) == bool(donors)
    assert "its manifest is not in the store" in text
    assert "| loss | 1.5 |" in text
