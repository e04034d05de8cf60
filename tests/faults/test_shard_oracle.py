"""Safetensors bombs and near misses: whatever the stock library refuses we refuse, what we accept it reads alike."""

from __future__ import annotations

import struct
import subprocess
import sys
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_headers import disagreement, ours, shard, sound, stock, unsound

from vpstore.errors import BadManifest
from vpstore.schema import tensor_table


def row(begin: int, end: int, dtype: str = "U8", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


BOMBS = {
    "header of 0 bytes": shard(b""),
    "header of 1 byte": shard(b"{"),
    "header of 2^64 - 1 bytes": shard({}, length=2**64 - 1),
    "header of 2^63 bytes": shard({}, length=2**63),
    "header of 100 MB in a file of 10 bytes": shard({}, length=100_000_000),
    "header beyond the file by one": shard({}, length=3),
    "overlap": shard({"a": row(0, 2), "b": row(1, 3)}, b"xyz"),
    "the same bytes twice": shard({"a": row(0, 2), "b": row(0, 2)}, b"xy"),
    "hole": shard({"a": row(0, 1), "b": row(2, 3)}, b"xyz"),
    "hole at the start": shard({"a": row(1, 2)}, b"xy"),
    "bytes after the last tensor": shard({"a": row(0, 1)}, b"xy"),
    "offsets beyond the file": shard({"a": row(0, 2**40)}, b"x"),
    "offsets of 2^63": shard({"a": row(2**63, 2**63 + 1)}, b"x"),
    "negative offsets": shard({"a": row(-1, 0, shape=[1])}, b"x"),
    "backwards": shard({"a": row(1, 0, shape=[0])}, b"x"),
    "a shape that overflows to 0": shard({"a": row(0, 0, "U8", [2**32, 2**32])}),
    "a shape that overflows to 1": shard({"a": row(0, 1, "U8", [2**63, 2, 1])}, b"x"),
    "a shape of 2^63": shard({"a": row(0, 0, "U8", [2**63, 0])}),
    "a negative shape": shard({"a": row(0, 1, "U8", [-1, -1])}, b"x"),
    "a fractional shape": shard({"a": row(0, 1, "U8", [1.0])}, b"x"),
    "an unknown dtype": shard({"a": row(0, 1, "U7")}, b"x"),
    "another dtype than its bytes": shard({"a": row(0, 3, "U16", [1])}, b"xyz"),
    "half a byte": shard({"a": row(0, 1, "F4", [1])}, b"x"),
    "a name twice": shard(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                          b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "metadata twice": shard(b'{"__metadata__":{},"__metadata__":{}}'),
    "deep nesting": shard(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "not UTF-8": shard(b'{"\xff":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"x"),
    "half a character": shard(b'{"\\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"x"),
    "a byte order mark": shard(b'\xef\xbb\xbf{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"x"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused(name: str) -> None:
    assert ours(BOMBS[name]) is None
    assert disagreement(BOMBS[name]) == ""


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 2**64))
def test_the_stock_library_reads_what_we_accept(seed: int) -> None:
    assert disagreement(unsound(Random(seed))) == ""


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**64))
def test_sound_headers_are_accepted_by_both(seed: int) -> None:
    rows, body = sound(Random(seed))
    data = shard(rows, body)
    assert ours(data) is not None
    assert disagreement(data) == ""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_stock_library_reads_what_we_accept_of_many() -> None:
    accepted = refused = strict = 0
    for seed in range(100_000):
        data = unsound(Random(seed))
        assert disagreement(data) == "", (seed, data)
        accepted += ours(data) is not None
        refused += stock(data) is None
        strict += ours(data) is None and stock(data) is not None
    assert accepted > 10_000
    assert refused > 10_000
    assert strict < 20_000  # where we are stricter: names twice, shapes and metadata that are not plain


def test_a_lenient_reader_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the rule of tiling, the oracle disagrees."""
    monkeypatch.setattr(tensor_table, "_check_tiling", lambda *spans, **rest: None)
    assert any(disagreement(unsound(Random(seed))) for seed in range(300))


HEAVY = {
    "six hundred thousand tensors": lambda: b"{" + b",".join(
        b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % number for number in range(600_000)) + b"}",
    "brackets": lambda: b'{"a":[' + b"[]," * 5_000_000 + b"[]]}",
    "braces": lambda: b'{"a":[' + b"{}," * 5_000_000 + b"{}]}",
    "numbers": lambda: b'{"a":[' + b"1.5," * 5_000_000 + b"1]}",
    "names that are one another's prefix": lambda: b"{" + b",".join(b'"%x":1' % n for n in range(1_500_000)) + b"}",
    "one name a million times": lambda: b"{" + b",".join([b'"a":1'] * 2_000_000) + b"}",
    "the first name again at the end": lambda: b"{" + b",".join(b'"%x":1' % n for n in (*range(400_000), 0)) + b"}",
    "nines": lambda: b'{"a":' + b"9" * 20_000_000 + b"}",
    "depth": lambda: b'{"a":' * 3_000_000 + b"1" + b"}" * 3_000_000,
}  # fmt: skip
JUDGE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from vpstore.errors import BadManifest
from vpstore.schema.tensor_table import parse_header
data = sys.stdin.buffer.read()
try:
    parse_header(data, file_size=len(data), where="bomb")
except BadManifest as error:
    print("refused:", error.what, "|", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "MiB")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAVY)
def test_a_large_header_costs_bounded_time_and_memory(name: str) -> None:
    """In a process that may have 3 GiB of addresses; a header may be 32 MiB."""
    head = HEAVY[name]()
    data = struct.pack("<Q", len(head)) + head
    done = subprocess.run([sys.executable, "-c", JUDGE], input=data, capture_output=True, timeout=120, check=True)
    assert done.stdout.startswith(b"refused:") or name == "six hundred thousand tensors"


@pytest.mark.timeout(120)
def test_a_name_that_comes_again_after_many_others_is_found_at_once() -> None:
    """Looking for it pair by pair would take an hour."""
    head = b"{" + b",".join(b'"%x":1' % number for number in (*range(200_000), 0)) + b"}"
    with pytest.raises(BadManifest, match="strict JSON"):
        tensor_table.parse_header(struct.pack("<Q", len(head)) + head, file_size=len(head) + 8, where="test")
