from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recipes import import_donor
from recipes.names import EMBEDDING, HEAD, INDEX_FILE
from recipes.params.import_donor import Params
from recipes.recipe import Context, Plan
from vpstore.errors import RecipeRefused

CONFIG = {"hidden_size": 8, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 2, "vocab_size": 20, "tied": False}
QUERY = "model.layers.*.self_attn.q_proj.weight"
SETTINGS: dict[str, Any] = {
    "keep_files": ("config.json", "tokenizer.json", "model.safetensors"),
    "keep_tensors": (),
    "verbatim": True,
    "expect": {"hidden_size": 8, "tied": False},
    "tensors": {
        EMBEDDING: ("vocab_size", "hidden_size"),
        HEAD: ("vocab_size", "hidden_size"),
        QUERY: ("num_heads*head_dim", "hidden_size"),
    },
    "optional_tensors": (HEAD,),
    "dtype": "BF16",
    "ordinary_tokens": 2,
}
REFERENCE = {
    **SETTINGS,
    "keep_files": ("config.json", "tokenizer.json"),
    "keep_tensors": (EMBEDDING, HEAD),
    "verbatim": False,
    "tensors": {name: ("vocab_size", "hidden_size") for name in (EMBEDDING, HEAD)},
    "optional_tensors": (),
}
TOKENIZER = {"added_tokens": [], "model": {"vocab": {"a": 0, "b": 1}}}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {EMBEDDING: (20, 8), QUERY.replace("*", "0"): (8, 8), QUERY.replace("*", "1"): (8, 8)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    folder = tmp_path / "donor"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    save_file(tensors(), folder / "model.safetensors")
    return folder


def context(folder: Path, settings: dict[str, Any], without: tuple[str, ...] = (), **changes: Any) -> Context:
    files = {path.name: path for path in sorted(folder.iterdir()) if path.name not in without}
    sources = {f"donor/{name}": path for name, path in files.items()}
    return Context(Params(**{**settings, **changes}), {}, sources, folder)


def plan(folder: Path, settings: dict[str, Any] = SETTINGS, without: tuple[str, ...] = (), **changes: Any) -> Plan:
    return import_donor.plan(context(folder, settings, without, **changes))


def test_a_verbatim_donor_is_kept_byte_for_byte(donor: Path, write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    made = plan(donor)
    assert not made.tensors
    artifact = write(made.files, tmp_path / "artifact")
    assert sorted(path.name for path in artifact.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert all(path.read_bytes() == (donor / path.name).read_bytes() for path in artifact.iterdir())
    assert made.report is not None
    assert made.report.metrics == {"tensors": 3, "parameters": 20 * 8 + 2 * 64}


@pytest.fixture
def reference(donor: Path) -> Path:
    """Like a large donor: two shards and an index, more tensors than are wanted."""
    all_tensors = tensors() | {HEAD: tensors(1)[EMBEDDING], "model.strange.weight": torch.zeros(3)}
    (donor / "model.safetensors").unlink()
    names = sorted(all_tensors)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for shard, own in shards.items():
        save_file({name: all_tensors[name] for name in own}, donor / shard)
    weight_map = {name: shard for shard, own in shards.items() for name in own}
    (donor / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return donor


def test_kept_tensors_are_equal_bit_for_bit(reference: Path) -> None:
    made = plan(reference, REFERENCE)
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in made.tensors] == [
        (EMBEDDING, "BF16", (20, 8)),
        (HEAD, "BF16", (20, 8)),
    ]
    found = {tensor.name: tensor.compute() for tensor in made.tensors}
    assert torch.equal(found[EMBEDDING], tensors()[EMBEDDING])
    assert torch.equal(found[HEAD], tensors(1)[EMBEDDING])
    assert [file.name for file in made.files] == ["config.json", "tokenizer.json"]


def test_what_is_kept_is_the_disk_that_is_needed_and_faults_are_left_to_the_plan(reference: Path) -> None:
    files = sum((reference / name).stat().st_size for name in ("config.json", "tokenizer.json"))
    assert import_donor.needs(context(reference, REFERENCE)).disk_bytes == files + 2 * 20 * 8 * 2
    assert import_donor.needs(context(reference, REFERENCE, without=("config.json",))).disk_bytes == 0
    (reference / "model-00001-of-00002.safetensors").write_bytes(b"no shard")
    assert import_donor.needs(context(reference, REFERENCE)).disk_bytes == files


def test_a_shard_that_was_not_verified_is_not_read(reference: Path) -> None:
    with pytest.raises(RecipeRefused, match="do not agree") as caught:
        plan(reference, REFERENCE, without=("model-00002-of-00002.safetensors",))
    assert "model-00002-of-00002" in caught.value.found
    with pytest.raises(RecipeRefused, match="do not agree"):
        plan(reference, REFERENCE, without=(INDEX_FILE,))


def test_a_strange_shard_in_the_folder_is_refused(donor: Path) -> None:
    save_file({EMBEDDING: torch.zeros(20, 8).bfloat16()}, donor / "other.safetensors")
    with pytest.raises(RecipeRefused, match="do not agree") as caught:
        plan(donor, without=("other.safetensors",))
    assert "other.safetensors" in caught.value.found


@pytest.mark.parametrize("name", SETTINGS["keep_files"])
def test_a_missing_file_says_where_to_put_it(donor: Path, name: str) -> None:
    with pytest.raises(RecipeRefused, match="lacks files") as caught:
        plan(donor, without=(name,))
    assert name in caught.value.found
    assert "provenance" in caught.value.next_step


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"hidden_size": 16}, "hidden_size is 16, not 8"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"tied": 0}, "tied is 0, not False"),
        ({"tied": None}, "tied is None"),
    ],
)
def test_another_config_is_refused(donor: Path, change: dict[str, Any], found: str) -> None:
    (donor / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(RecipeRefused, match="config.json") as caught:
        plan(donor)
    assert found in caught.value.found


@pytest.mark.parametrize("content", ["{", "[]", "\udc80"])
def test_a_damaged_config_is_refused(donor: Path, content: str) -> None:
    (donor / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(RecipeRefused, match="not a JSON object"):
        plan(donor)


def test_all_wrong_tensors_are_named(donor: Path) -> None:
    wrong = tensors()
    del wrong[EMBEDDING]
    wrong[QUERY.replace("*", "0")] = torch.zeros(8, 9).bfloat16()
    wrong[QUERY.replace("*", "1")] = torch.zeros(8, 8)
    wrong["extra"] = torch.zeros(1)
    save_file(wrong, donor / "model.safetensors")
    with pytest.raises(RecipeRefused, match="not what its config says") as caught:
        plan(donor)
    for fault in (
        f"{EMBEDDING} is absent",
        "extra is not part",
        "BF16 [8, 9], not BF16 [8, 8]",
        "F32 [8, 8], not BF16 [8, 8]",
    ):
        assert fault in caught.value.found


def test_a_damaged_shard_is_refused(donor: Path) -> None:
    path = donor / "model.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(RecipeRefused):
        plan(donor)


def test_another_tokenizer_is_refused(donor: Path) -> None:
    with pytest.raises(RecipeRefused, match=r"tokenizer\.json") as caught:
        plan(donor, ordinary_tokens=3)
    assert caught.value.found == "2"


@pytest.mark.parametrize(
    "change",
    [{"keep_tensors": (EMBEDDING,)}, {"keep_files": ("config.json",)}, {"verbatim": False, "keep_tensors": ("x",)}],
)
def test_params_that_contradict_themselves(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="keep_"):
        Params(**{**SETTINGS, **change})
