from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from recipes import execute
from recipes.names import layer_tensor, shard_of, split_layer
from recipes.planned import PlannedTensor
from recipes.recipe import Plan
from recipes.shards import ShardWriter
from recipes.tensors import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    TensorReader,
    iterate_rows,
    kept,
    planned,
    planned_rows,
    read_safetensors,
    write_safetensors,
)
from vpstore.errors import RecipeRefused


def _plan_of(tensors: dict[str, torch.Tensor]) -> list[PlannedTensor]:
    return [PlannedTensor(n, DTYPE_NAMES[t.dtype], tuple(t.shape), lambda t=t: t) for n, t in tensors.items()]


def _sample() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "model.embed_tokens.weight": torch.randn(7, 4, generator=generator).bfloat16(),
        layer_tensor(1, "mlp.fc1.weight"): torch.randn(3, 4, generator=generator).bfloat16(),
        layer_tensor(1, "self_attn.value_residual"): torch.tensor(9.2),
        layer_tensor(2, "mlp.fc1.weight"): torch.randn(3, 4, generator=generator),
    }


def _write(folder: Path, tensors: dict[str, torch.Tensor], order: list[str]) -> ShardWriter:
    writer = ShardWriter(folder, _plan_of(tensors))
    writer.prepare()
    for name in order:
        writer.write(name, tensors[name])
    return writer


def test_shards_read_back_equal_with_the_stock_library(tmp_path: Path) -> None:
    tensors = _sample()
    writer = _write(tmp_path / "shards", tensors, sorted(tensors))
    stock = {k: v for shard in writer.shards() for k, v in load_file(tmp_path / "shards" / shard).items()}
    assert set(stock) == set(tensors)
    for name, value in tensors.items():
        assert stock[name].dtype == value.dtype
        assert torch.equal(stock[name], value)
    assert sum(p.stat().st_size for p in (tmp_path / "shards").iterdir()) == writer.size_bytes


def test_bytes_do_not_depend_on_the_order_of_writing_or_planning(tmp_path: Path) -> None:
    tensors = _sample()
    _write(tmp_path / "a", tensors, sorted(tensors))
    backwards = dict(reversed(tensors.items()))
    _write(tmp_path / "b", backwards, sorted(tensors, reverse=True))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_torn_tensor_is_not_done(tmp_path: Path) -> None:
    tensors = _sample()
    writer = _write(tmp_path / "shards", tensors, sorted(tensors))
    name = "model.embed_tokens.weight"
    assert writer.is_done(name)
    path = tmp_path / "shards" / shard_of(name)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    again = ShardWriter(tmp_path / "shards", _plan_of(tensors))
    again.prepare()
    assert not again.is_done(name)
    assert again.is_done(layer_tensor(2, "mlp.fc1.weight"))


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (torch.zeros(7, 5, dtype=torch.bfloat16), "another tensor than it planned"),
        (torch.zeros(7, 4), "another tensor than it planned"),
        (torch.full((7, 4), float("nan"), dtype=torch.bfloat16), "not finite"),
        (torch.full((7, 4), float("inf"), dtype=torch.bfloat16), "not finite"),
    ],
)
def test_what_was_not_planned_is_refused(tmp_path: Path, value: torch.Tensor, complaint: str) -> None:
    writer = ShardWriter(tmp_path / "shards", _plan_of(_sample()))
    writer.prepare()
    with pytest.raises(RecipeRefused, match=complaint):
        writer.write("model.embed_tokens.weight", value)
    assert not writer.is_done("model.embed_tokens.weight")


def test_reader_follows_the_index(tmp_path: Path) -> None:
    tensors = _sample()
    writer = _write(tmp_path / "shards", tensors, sorted(tensors))
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(writer.index()))
    reader = TensorReader(tmp_path / "shards")
    assert reader.names() == sorted(tensors)
    assert reader.spec(layer_tensor(1, "self_attn.value_residual")) == ("F32", ())
    assert torch.equal(kept(reader, "model.embed_tokens.weight").compute(), tensors["model.embed_tokens.weight"])
    with pytest.raises(RecipeRefused, match="no tensor of this name"):
        reader.read("model.norm.weight")


def test_planned_casts_to_the_promised_dtype() -> None:
    assert planned("model.norm.weight", [2], "BF16", lambda: torch.ones(2)).compute().dtype == torch.bfloat16


def test_rows_are_computed_beside_each_other_under_the_threads_that_were_fixed(tmp_path: Path) -> None:
    """The order of sums follows the intra-op threads: with one a long sum comes out otherwise than with three."""
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(2))
    names = [layer_tensor(number, "mlp.fc1.weight") for number in (1, 2, 3)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = values.sum()
        torch.set_num_threads(3)
        wanted = values.sum()
        assert single != wanted  # the negative control
        rows = lambda: (values.sum().expand(2, 3).clone() for _ in range(2))  # noqa: E731
        plan = Plan([planned_rows(name, (4, 3), "F32", rows) for name in names])
        writer = ShardWriter(tmp_path / "shards", plan.tensors)
        writer.prepare()
        execute.compute(plan, writer, names, lambda label, done, total: None)
    finally:
        torch.set_num_threads(threads)
    for name in names:
        assert torch.equal(TensorReader(tmp_path / "shards").read(name), wanted.expand(4, 3))
        assert writer.is_done(name)


def test_a_tensor_in_rows_is_the_same_whole(tmp_path: Path) -> None:
    reader = _reader_of(tmp_path, {"model.embed_tokens.weight": torch.arange(30.0).reshape(10, 3).bfloat16()})
    whole = reader.read("model.embed_tokens.weight")
    assert torch.equal(reader.rows("model.embed_tokens.weight", 4, 99), whole[4:])
    assert torch.equal(reader.gather("model.embed_tokens.weight", [7, 0, 7]), whole[[7, 0, 7]])
    assert torch.equal(torch.cat(list(reader.pieces("model.embed_tokens.weight"))), whole)
    short = planned_rows("model.embed_tokens.weight", (11, 3), "BF16", lambda: iter([whole]))
    writer = ShardWriter(tmp_path / "again", [short])
    writer.prepare()
    with pytest.raises(RecipeRefused, match="another tensor than it planned") as caught:
        writer.write(short.name, short.value())
    assert caught.value.found == "10 rows"
    assert not writer.is_done(short.name)


def _reader_of(folder: Path, tensors: dict[str, torch.Tensor]) -> TensorReader:
    _write(folder / "shards", tensors, sorted(tensors))
    return TensorReader(folder / "shards")


def test_a_file_that_ends_too_early_is_no_tensor(tmp_path: Path) -> None:
    reader = _reader_of(tmp_path, {"model.norm.weight": torch.ones(9)})
    assert reader.spec("model.norm.weight") == ("F32", (9,))
    path = tmp_path / "shards" / shard_of("model.norm.weight")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OSError, match="ends before"):
        reader.read("model.norm.weight")


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text("abcdefgh", min_size=1, max_size=6),
        st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    )
)
def test_one_file_round_trips_every_dtype_and_shape(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("one") / "x.safetensors"
    tensors = {n: torch.ones(shape).to(TORCH_DTYPES[dtype]) for n, (dtype, shape) in specs.items()}  # type: ignore[index]
    write_safetensors(path, tensors)
    for found in (read_safetensors(path), load_file(path)):
        assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
        assert all(torch.equal(found[n], tensors[n]) for n in tensors)
    assert not list(path.parent.glob("*.partial"))


def test_one_file_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="not finite"):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.tensor([float("nan")])})
    assert list(tmp_path.iterdir()) == []


@given(st.integers(0, 50), st.integers(1, 9))
def test_row_ranges_cover_everything_once(total: int, chunk: int) -> None:
    rows = [row for start, stop in iterate_rows(total, chunk) for row in range(start, stop)]
    assert rows == list(range(total))


def test_layers_count_from_one_and_names_from_zero() -> None:
    assert split_layer(layer_tensor(80, "mlp.fc2.bias")) == (80, "mlp.fc2.bias")
    assert shard_of("model.layers.79.mlp.fc2.bias") == "model-layer-080.safetensors"
    assert split_layer("model.norm.weight") is None
    with pytest.raises(RecipeRefused, match="no known module"):
        shard_of("visual.patch")
