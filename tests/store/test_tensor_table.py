"""Safetensors headers: the stock library is the oracle; what it refuses is refused, what it writes is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from vpstore.errors import BadManifest
from vpstore.schema.digest import Digest
from vpstore.schema.tensor_table import TensorTable, parse_header
from vpstore.storage.tables import HEADER, damaged_parts, read_table

arrays = st.builds(
    lambda dtype, shape: np.zeros(shape, dtype=dtype),
    st.sampled_from(["float32", "float16", "int64", "uint8", "bool"]),
    st.lists(st.integers(0, 4), max_size=3),
)


def shard(header: Any, body: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


def row(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def is_taken(data: bytes) -> bool:
    try:
        parse_header(data, file_size=len(data), where="test")
    except BadManifest:
        return False
    return True


def stock_takes(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except Exception:  # the library raises its own and others
        return False
    return True


@given(st.dictionaries(st.text(min_size=1, max_size=8), arrays, max_size=5), st.none() | st.just({"format": "pt"}))
def test_what_the_stock_library_writes_is_read(tensors: dict[str, Any], metadata: dict[str, str] | None) -> None:
    if "__metadata__" in tensors:
        return
    data = save(tensors, metadata=metadata)
    layout = parse_header(data, file_size=len(data), where="test")
    assert {span.name: tuple(span.shape) for span in layout.tensors} == {n: a.shape for n, a in tensors.items()}
    for span in layout.tensors:
        assert data[span.begin : span.end] == tensors[span.name].tobytes()


STRICTER = {"duplicate names"}  # of which the stock library takes one
BAD = {
    "empty": b"",
    "short": b"\x01\0\0\0",
    "length beyond the file": struct.pack("<Q", 1000) + b"{}",
    "length overflow": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a bomb of a header": struct.pack("<Q", 2**40) + b"{}",
    "not json": shard(b"{x}"),
    "an array": shard(b"[]"),
    "leading no-break space": shard(b"\xa0{}"),
    "only blanks": shard(b"  "),
    "duplicate names": shard(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                             b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "hole at the start": shard({"a": row(1, 2)}, b"xy"),
    "hole between": shard({"a": row(0, 1), "b": row(2, 3)}, b"xyz"),
    "overlap": shard({"a": row(0, 2), "b": row(1, 3)}, b"xyz"),
    "out of range": shard({"a": row(0, 9)}, b"xyz"),
    "trailing bytes": shard({"a": row(0, 1)}, b"xyz"),
    "backwards": shard({"a": {"dtype": "U8", "shape": [0], "data_offsets": [1, 0]}}, b"x"),
    "unknown dtype": shard({"a": row(0, 1, "U7")}, b"x"),
    "wrong size": shard({"a": row(0, 3, "U16", [1])}, b"xyz"),
    "overflowing shape": shard({"a": row(0, 1, "U8", [2**40, 2**40])}, b"x"),
    "negative shape": shard({"a": row(0, 1, "U8", [-1])}, b"x"),
    "boolean shape": shard({"a": row(0, 1, "U8", [True])}, b"x"),
    "fractional offset": shard({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1.5]}}, b"x"),
    "metadata not text": shard({"__metadata__": {"a": 1}}),
    "metadata of null": shard({"__metadata__": {"a": None}}),
    "a header of 100 MB and a byte": shard(b"{}" + b" " * (100_000_000 - 1)),
    "missing field": shard({"a": {"dtype": "U8", "shape": [1]}}, b"x"),
    "nan": shard(b'{"a":NaN}'),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_headers_are_refused(name: str) -> None:
    assert not is_taken(BAD[name])
    assert not stock_takes(BAD[name]) or name in STRICTER


ODD = {
    "leading blanks": shard(b" \n\t\r" + json.dumps({"a": row(0, 1)}).encode(), b"x"),
    "trailing blanks": shard(json.dumps({"a": row(0, 1)}).encode() + b" " * 9, b"x"),
    "metadata null": shard({"__metadata__": None, "a": row(0, 1)}, b"x"),
    "an unknown field": shard({"a": {**row(0, 1), "x": [{"y": None}]}}, b"x"),
    "a header of 40 MiB": shard({"__metadata__": {"vocabulary": "a" * (40 << 20)}, "a": row(0, 1)}, b"x"),
    "64 dimensions": shard({"a": row(0, 1, shape=[1] * 64)}, b"x"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_the_stock_library_reads_though_nobody_writes_it_is_read(name: str) -> None:
    assert stock_takes(ODD[name])
    assert [span.name for span in parse_header(ODD[name], file_size=len(ODD[name]), where="test").tensors] == ["a"]


@settings(max_examples=300)
@given(
    st.sampled_from(
        [
            save({"a": np.arange(6, dtype="int16"), "b": np.ones((2, 2), dtype="float32")}),
            shard({"a": row(0, 2)}, b"xy"),
        ]
    ),
    st.integers(0, 300),
    st.integers(0, 255),
)
@example(shard({"a": row(0, 2)}, b"xy"), 8, ord(" "))
def test_nothing_is_taken_that_the_stock_library_refuses(data: bytes, at: int, byte: int) -> None:
    changed = bytearray(data)
    changed[at % len(changed)] = byte
    if is_taken(bytes(changed)):
        assert stock_takes(bytes(changed))


def make(path: Path) -> tuple[Path, dict[str, Any]]:
    tensors = {
        "one": np.arange(100, dtype="float32"),
        "two": np.arange(7, dtype="uint8"),
        "none": np.zeros((0, 3), dtype="float16"),
    }
    path.write_bytes(save(tensors))
    return path, tensors


def test_a_table_names_every_byte(tmp_path: Path) -> None:
    path, tensors = make(tmp_path / "s.safetensors")
    table = read_table(path, where="test")
    assert TensorTable.decode(table.encode(), where="test") == table
    assert list(damaged_parts(path, table)) == []
    for name, array in tensors.items():
        assert table.by_name[name].digest == Digest.of(array.tobytes())
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        expected = HEADER if at < table.header[0] else next(r.name for r in table.tensors if r.begin <= at < r.end)
        assert list(damaged_parts(path, table)) == [expected]


def test_a_truncated_shard_damages_what_is_cut_off(tmp_path: Path) -> None:
    path, _ = make(tmp_path / "s.safetensors")
    table = read_table(path, where="test")
    last = table.tensors[-1]
    path.write_bytes(path.read_bytes()[: last.end - 1])
    assert last.name in list(damaged_parts(path, table))


@pytest.mark.parametrize("change", ["hole", "twice", "unknown", "order", "dtype"])
def test_a_table_that_contradicts_itself_is_refused(tmp_path: Path, change: str) -> None:
    from vpstore.schema.canonical import canonical_bytes

    path, _ = make(tmp_path / "s.safetensors")
    document = json.loads(read_table(path, where="test").encode())
    rows = document["tensors"]
    match change:
        case "hole":
            document["size_bytes"] += 1
        case "twice":
            rows[-1]["name"] = rows[-2]["name"]
        case "unknown":
            document["note"] = "x"
        case "order":
            rows.reverse()
        case "dtype":
            rows[0]["dtype"] = "F99"
    with pytest.raises(BadManifest):
        TensorTable.decode(canonical_bytes(document), where="test")
