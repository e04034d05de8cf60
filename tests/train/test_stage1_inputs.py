"""What a Stage 1 trainer finds before it starts: another input, a damaged one, a run that is not complete."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from blake3 import blake3
from stage1_pico import Stage1Shop, write_view

from recipes import stage1_smoke
from recipes.train.stage1_document import read_document
from recipes.train.stage1_inputs import verify_folder
from vpstore.errors import RecipeRefused


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Stage1Shop:
    return Stage1Shop.make(tmp_path_factory.mktemp("stage1") / "shop")


def test_another_input_is_refused_by_its_name(shop: Stage1Shop, tmp_path: Path) -> None:
    other = shop.copy(tmp_path / "other")
    for role, folder in (("checkpoint", "parent"), ("data", "data"), ("tokenizer", "tokenizer")):
        extra = other.root / folder / "note.txt"
        extra.write_text("another artifact, whole in itself")
        found = write_view(other.root / folder)
        with pytest.raises(RecipeRefused, match="not the one that the run names") as refusal:
            other.inputs()
        assert refusal.value.where == f"{role} {role}@main"
        assert refusal.value.found == found
        assert refusal.value.expected != found
        extra.unlink()
        write_view(other.root / folder)
    other.inputs()  # the control: with everything back, it opens


def test_damaged_inputs_are_refused(shop: Stage1Shop, tmp_path: Path) -> None:
    other = shop.copy(tmp_path / "other")
    path = other.root / "parent/config.json"
    whole_bytes = path.read_bytes()
    path.write_bytes(whole_bytes.replace(b"16", b"17", 1))
    with pytest.raises(RecipeRefused, match="damaged") as refusal:
        other.inputs()
    assert refusal.value.where == "checkpoint: config.json"
    path.unlink()
    with pytest.raises(RecipeRefused, match="damaged"):
        verify_folder(other.root / "parent", "checkpoint")
    (other.root / "parent/artifact.json").unlink()
    with pytest.raises(RecipeRefused, match="not complete"):
        verify_folder(other.root / "parent", "checkpoint")


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("[data.manifest]\npath = \"manifest.json\"\ndigest = \"blake3:", "", "data_manifest"),
        ("ranks_sha256 = \"446a", "ranks_sha256 = \"0000", "tokenizer"),
        ("hidden_size = 16", "hidden_size = 32", "checkpoint"),
        ("format = 1", "format = 9", "run"),
    ],
)  # fmt: skip
def test_a_run_that_was_written_for_something_else_is_refused(
    shop: Stage1Shop, tmp_path: Path, old: str, new: str, where: str
) -> None:
    other = shop.copy(tmp_path / "other")
    path = other.root / "run/stage1.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new or old + "0" * 8, 1))
    write_view(other.root / "run")
    with pytest.raises(RecipeRefused) as refusal:
        other.inputs()
    assert refusal.value.where == where


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "[]"),
        ("\xff", "UnicodeDecodeError"),
        ('{"files": 3}', "3"),
        ('{"files": [{"path": 1, "digest": "blake3:0", "size_bytes": 1}]}', "'path': 1"),
        ('{"files": [{"path": "a", "digest": "blake3:0", "size_bytes": true}]}', "True"),
        ('{"files": ["a"]}', "['a']"),
        ("{}", "None"),
    ],
)
def test_a_manifest_that_is_none_is_refused(shop: Stage1Shop, tmp_path: Path, text: str, found: str) -> None:
    folder = shop.copy(tmp_path / "other").root / "parent"
    (folder / "artifact.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeRefused) as refusal:
        verify_folder(folder, "checkpoint")
    assert refusal.value.exit_code == 20
    assert found in refusal.value.found
    assert "artifact.json" in refusal.value.where


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/hostname", "", ".", "a\0b"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    """Although the file is there and has the digest."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "x").write_text("outside")
    row = {"path": name, "digest": "blake3:" + blake3(b"outside").hexdigest(), "size_bytes": 7}
    (folder / "artifact.json").write_text(json.dumps({"files": [row]}))
    with pytest.raises(RecipeRefused, match="leads out of its folder"):
        verify_folder(folder, "data")


@pytest.mark.parametrize(
    ("cut", "where"),
    [
        (r"\n\[smoke\].*?(?=\n\[)", "smoke"),
        (r"\nthreads = 1", "smoke.threads"),
        (r"\n\[stop\].*?(?=\n\[)", "stop"),
        (r"\n\[inputs\.data\].*?(?=\n\[)", "inputs.data"),
        (r"\nmatrix_rate = [^\n]*", "optimizer"),
        (r"\npacking = [^\n]*", "data.packing"),
    ],
)
def test_a_run_that_lacks_an_entry_is_refused(
    shop: Stage1Shop, tmp_path: Path, cut: str, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shop.copy(tmp_path / "other")
    path = other.root / "run/stage1.toml"
    text = path.read_text()
    shorter = re.sub(cut, "", text, count=1, flags=re.DOTALL)
    assert shorter != text
    path.write_text(shorter)
    write_view(other.root / "run")
    with pytest.raises(RecipeRefused, match="not complete") as refusal:
        other.inputs()
    assert refusal.value.where == f"stage1.toml: {where}"
    assert stage1_smoke.main([*other.command(tmp_path / "out")]) == 20  # also where it is read before it is verified
    assert f"stage1.toml: {where}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a = ", "\xff", "a = " + "[" * 20_000])
def test_a_run_that_is_no_toml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "stage1.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeRefused, match="no run"):
        read_document(tmp_path)
