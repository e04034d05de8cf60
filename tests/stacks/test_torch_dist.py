"""Names, layouts and folders of a Megatron checkpoint, without Megatron."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from stack_cases import CONFIGS, artifact, exported, silent
from student_builder import SMALL_MOE

from recipes.checkpoint import expected_tensors
from recipes.megatron.dist_index import read_index
from recipes.megatron.export import export
from recipes.megatron.layout import entries, extra_states, folded, megatron_key
from recipes.megatron.moulds import Moulds, saved
from recipes.megatron.torch_dist import Folder, write_folder
from recipes.model.config import StudentConfig
from recipes.recipe import InputArtifact
from recipes.tensors import TensorReader, planned, raw_bytes
from vpstore.errors import RecipeRefused


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> InputArtifact:
    return artifact(tmp_path_factory.mktemp("source") / "experts", CONFIGS["experts"])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=str)
def test_every_tensor_has_one_key(config: StudentConfig) -> None:
    rows = entries(config)
    assert [row.name for row in rows] == list(expected_tensors(config))
    keys = [row.key for row in rows] + extra_states(config)
    assert len(set(keys)) == len(keys)
    assert not any(row.is_folded for row in rows)


def test_a_stranger_has_no_key() -> None:
    for name in ("model.layers.0.mlp.gate.weight", "model.other.weight"):
        with pytest.raises(RecipeRefused, match="no place"):
            megatron_key(name)


def test_a_folded_bias_gives_the_same_output() -> None:
    generator = torch.Generator().manual_seed(5)
    bias, shared = torch.randn(16, 6, generator=generator), torch.randn(6, generator=generator)
    gates = torch.rand(4, generator=generator)
    gates = SMALL_MOE.routed_scaling * gates / gates.sum()
    wanted = gates @ bias[3:7] + shared
    assert torch.allclose(gates @ folded(bias, shared, SMALL_MOE)[3:7], wanted, atol=1e-6)


def test_two_exports_are_equal_and_say_what_was_changed(source: InputArtifact, tmp_path: Path) -> None:
    first = exported(tmp_path / "first", source, "megatron")
    second = exported(tmp_path / "second", source, "megatron")
    names = sorted(path.relative_to(first).as_posix() for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(second).as_posix() for path in second.rglob("*") if path.is_file())
    assert [name for name in names if (first / name).read_bytes() != (second / name).read_bytes()] == []
    assert (first / "latest_checkpointed_iteration.txt").read_text() == "release"
    said = json.loads((first / "PROVENANCE.json").read_text())
    assert said["artifact"] == source.digest
    changed = {row["name"].split(".", 3)[3] for row in said["tensors"] if row["before"] != row["after"]}
    assert changed == {"mlp.experts.fc2_bias", "mlp.shared_expert.fc2.bias"}
    assert said["check"]["relative"] < 2e-5
    assert all(str(tmp_path).encode() not in (first / name).read_bytes() for name in names)


def test_the_plugins_target_keeps_every_bit(source: InputArtifact, tmp_path: Path) -> None:
    case = exported(tmp_path / "out", source, "megatron-plugin")
    folder, reader = Folder(case / "release"), TensorReader(source.path)
    for row in entries(CONFIGS["experts"]):
        assert torch.equal(folder.read(row.key), reader.read(row.name))
    said = json.loads((case / "PROVENANCE.json").read_text())
    assert said["changes"] == []
    assert all(row["before"] == row["after"] for row in said["tensors"])


def test_a_layout_that_is_wrong_is_never_exported(
    source: InputArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check reads the folder by Megatron's conventions, so it sees what the writer got wrong."""
    from recipes.megatron import layout

    q, k = "self_attn.q_norm.weight", "self_attn.k_norm.weight"
    swapped = {**layout._LAYER, q: layout._LAYER[k], k: layout._LAYER[q]}
    monkeypatch.setattr(layout, "_LAYER", swapped)
    with pytest.raises(RecipeRefused, match="other logits"):
        export("megatron", source, tmp_path, silent)


def test_what_cannot_be_exported_is_refused(source: InputArtifact, tmp_path: Path) -> None:
    config = json.loads((source.path / "config.json").read_text())
    for change, said in (
        ({"rope_base": 1e6 + 0.5}, "--rotary-base takes whole numbers"),
        ({"moe": {**config["moe"], "routed_scaling": 0.0}}, "routed_scaling"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3"),
    ):
        folder = tmp_path / str(abs(hash(said)))
        folder.mkdir()
        for path in source.path.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(RecipeRefused) as refusal:
            export("megatron", InputArtifact("source", "pico@main", "", folder), tmp_path, silent)
        assert said in f"{refusal.value.found}"
    with pytest.raises(RecipeRefused, match="only a student"):
        export("megatron", InputArtifact("source", "pico@main", "", tmp_path), tmp_path, silent)


def test_a_stack_is_written_one_by_one_and_comes_back_whole(tmp_path: Path) -> None:
    """Megatron loads whole pieces: a stack in one would be read once for each expert."""
    stack = torch.randn(5, 3, 2).bfloat16()
    rows = [planned("m.experts.experts.w", (5, 3, 2), "BF16", lambda: stack)]
    digests = write_folder(tmp_path, rows, states=[], stacks=["m.experts.experts.w"])
    assert torch.equal(Folder(tmp_path).read("m.experts.experts.w"), stack)
    entry = read_index(tmp_path).state_dict_metadata["m.experts.experts.w"]
    assert [tuple(chunk.offsets) for chunk in entry.chunks] == [(number, 0, 0) for number in range(5)]
    assert digests["m.experts.experts.w"] == f"blake3:{blake3(raw_bytes(stack)).hexdigest()}"


class _Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


@pytest.mark.parametrize("shape", [(), (1,), (1, 3), (1, 128, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pieces_are_what_torch_saves_without_checksums(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    moulds = Moulds()
    for seed in range(2):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        written = b"".join(moulds.pieces(value))
        assert written == saved(value)
        assert torch.equal(torch.load(io.BytesIO(written), weights_only=True), value)


def test_an_index_runs_no_code(tmp_path: Path) -> None:
    write_folder(tmp_path, [planned("a", (2,), "F32", lambda: torch.ones(2))], states=["m._extra_state/shard_0_1"])
    assert Folder(tmp_path).read("a").tolist() == [1, 1]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Harm()))
    with pytest.raises(RecipeRefused, match="cannot be read"):
        Folder(tmp_path)


def test_a_folder_that_is_none_or_cut_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="no torch_dist folder"):
        Folder(tmp_path)
    write_folder(tmp_path, [planned("a", (999,), "F32", lambda: torch.ones(999))], states=[])
    data = tmp_path / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:500])
    with pytest.raises(RecipeRefused, match="cannot be read"):
        Folder(tmp_path).read("a")
    with pytest.raises(RecipeRefused, match="no tensor of this key"):
        Folder(tmp_path).read("b")


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="not finite"):
        write_folder(tmp_path, [planned("a", (1,), "F32", lambda: torch.tensor([float("nan")]))], states=[])
