"""The way back from Megatron: what is taken, bit for bit, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stack_cases import CONFIGS, artifact, exported, in_plain_order, rewritten
from student_builder import config_of
from torch import Tensor

from recipes import import_megatron
from recipes.checkpoint import load_student
from recipes.megatron.check import TOKENS
from recipes.model.config import StudentConfig
from recipes.params.import_megatron import Params
from recipes.recipe import Context, InputArtifact, refuse_missed
from recipes.tensors import TensorReader, read_safetensors, write_safetensors
from vpstore.errors import GateMissed, RecipeRefused

Tensors = dict[str, Tensor]


def taken(parent: InputArtifact, folder: Path, out: Path) -> dict[str, int]:
    """Import a torch_dist folder as a build would; what the report says."""
    sources = {f"checkpoint/{path.relative_to(folder)}": path for path in folder.rglob("*") if path.is_file()}
    context = Context(Params(max_loss_rise=0.5), {"parent": parent}, sources, out)
    plan = import_megatron.plan(context)
    out.mkdir()
    write_safetensors(out / "model.safetensors", {tensor.name: tensor.compute() for tensor in plan.tensors})
    report = import_megatron.check(context, TensorReader(out))
    refuse_missed(report.gates, where="import")
    figures: dict[str, int] = report.metrics["import_megatron"]
    return figures


def knowing(parent: InputArtifact, config: StudentConfig) -> None:
    """Let a student know the fixed tokens, so that its loss tells when it is taken apart."""
    ids = torch.tensor(TOKENS)
    with torch.no_grad():
        hidden = load_student(TensorReader(parent.path), config).forward_hidden(ids[None])[0]
    weights = read_safetensors(parent.path / "model.safetensors")
    head = torch.zeros_like(weights["lm_head.weight"], dtype=torch.float32)
    tokens, place = ids[1:].unique(return_inverse=True)
    # 61 states of 64 numbers: rows exist that give each its next token a logit of 20, and every other token 0.
    head[tokens] = (torch.linalg.pinv(hidden[:-1]) @ (20 * torch.nn.functional.one_hot(place).float())).T
    write_safetensors(parent.path / "model.safetensors", {**weights, "lm_head.weight": head.bfloat16()})


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> InputArtifact:
    return artifact(tmp_path_factory.mktemp("parent") / "experts", CONFIGS["experts"])


@pytest.fixture(scope="module")
def release(parent: InputArtifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("exported") / "out", parent, "megatron") / "release"


def test_what_was_not_changed_comes_back_bit_for_bit_and_what_was_does_not(
    parent: InputArtifact, release: Path, tmp_path: Path
) -> None:
    """Folded biases too, and an optimizer's state beside the weights is passed over."""

    def trained(tensors: Tensors) -> None:
        tensors["decoder.final_layernorm.weight"] = tensors["decoder.final_layernorm.weight"].float() * 1.01
        tensors["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(16)

    shutil.copytree(release, tmp_path / "release")
    rewritten(tmp_path / "release", trained)
    figures = taken(parent, tmp_path / "release", tmp_path / "out")
    before, after = (read_safetensors(folder / "model.safetensors") for folder in (parent.path, tmp_path / "out"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.norm.weight"]
    assert after["model.norm.weight"].dtype == torch.bfloat16
    assert (figures["ignored"], figures["tensors"] - figures["unchanged"]) == (1, 1)


@pytest.mark.slow
def test_a_plain_order_of_q_k_v_is_seen_in_the_loss(tmp_path: Path) -> None:
    config = config_of("gqa", layers=2, hidden=64)
    source = artifact(tmp_path / "parent", config)
    knowing(source, config)
    case = exported(tmp_path / "exported", source, "megatron")
    assert taken(source, case / "release", tmp_path / "out")["loss"] < 6
    in_plain_order(case)
    with pytest.raises(GateMissed, match="loss_rise"):
        taken(source, case / "release", tmp_path / "wrong")


FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
EMBEDDING = "embedding.word_embeddings.weight"


def _set(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(FC1), f"{FC1}: missing"),
        (lambda tensors: tensors.update({"decoder.layers.9.x": torch.zeros(1)}), "decoder.layers.9.x: extra"),
        (_set(FC1, lambda value: value.T.contiguous()), "as if transposed"),
        (_set(EMBEDDING, lambda value: value[:-64].clone()), "another padded vocabulary"),
        (_set(FC1, lambda value: value.int()), "no floating-point weights"),
        (_set(FC1, lambda value: value / 0), "not finite"),
    ],
    ids=["missing", "extra", "transposed", "vocabulary", "integers", "infinite"],
)
def test_other_tensors_are_refused(
    parent: InputArtifact, release: Path, tmp_path: Path, change: Callable[[Tensors], None], said: str
) -> None:
    shutil.copytree(release, tmp_path / "release")
    rewritten(tmp_path / "release", change, is_checked=False)
    with pytest.raises(RecipeRefused) as refusal:
        taken(parent, tmp_path / "release", tmp_path / "out")
    assert said in str(refusal.value)


def test_other_folders_are_refused(parent: InputArtifact, release: Path, tmp_path: Path) -> None:
    def context(sources: dict[str, Path]) -> Context:
        return Context(Params(max_loss_rise=0.5), {"parent": parent}, sources, tmp_path)

    files = {f"checkpoint/{path.name}": path for path in release.iterdir()}
    with pytest.raises(RecipeRefused, match="not the files of one"):
        import_megatron.plan(context({f"checkpoint/release/{path.name}": path for path in release.iterdir()}))
    with pytest.raises(RecipeRefused, match="not pinned"):
        import_megatron.plan(context({name: path for name, path in files.items() if "distcp" not in name}))
    shutil.copytree(release, tmp_path / "old")
    (tmp_path / "old" / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    with pytest.raises(RecipeRefused, match="another version of Megatron"):
        import_megatron.plan(context({f"checkpoint/{path.name}": path for path in (tmp_path / "old").iterdir()}))
