"""Safetensors headers, sound and unsound, and the stock library as the judge of them."""

from __future__ import annotations

import json
import struct
from random import Random
from typing import Any

import safetensors

from vpstore.errors import BadManifest
from vpstore.schema.tensor_table import BITS, ShardLayout, parse_header

DTYPES = ("U8", "I8", "F16", "BF16", "F32", "I64", "BOOL", "F8_E4M3", "F4", "C64")
ODD = (-1, 0, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 1.5, 1.0, True, None, "1", [], [0, 1])


def ours(data: bytes) -> ShardLayout | None:
    """What we read; None if we refuse."""
    try:
        return parse_header(data, file_size=len(data), where="oracle")
    except BadManifest:
        return None


def stock(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the stock library reads: dtype, shape and bytes by name; None if it refuses."""
    try:
        rows = safetensors.deserialize(data)
    except Exception:  # it raises its own error and others
        return None
    return {name: (str(row["dtype"]), tuple(row["shape"]), bytes(row["data"])) for name, row in rows}


def disagreement(data: bytes) -> str:
    """What is wrong if we accept a file: the stock library refuses it, or reads something else. Empty if nothing is."""
    layout = ours(data)
    if layout is None:
        return ""
    theirs = stock(data)
    if theirs is None:
        return "accepted, though the stock library refuses it"
    mine = {span.name: (span.dtype, span.shape, data[span.begin : span.end]) for span in layout.tensors}
    return "" if mine == theirs else f"read differently: {mine} {theirs}"


def shard(header: Any, body: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header; `length` is what its first eight bytes say."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", (len(head) if length is None else length) % 2**64) + head + body


def sound(random: Random) -> tuple[dict[str, Any], bytes]:
    """A header that is right, and its tensors' bytes."""
    rows: dict[str, Any] = {}
    at = 0
    for number in range(random.randrange(5)):
        dtype = random.choice(DTYPES)
        shape = [random.randrange(4) for _ in range(random.randrange(3))]
        bits = BITS[dtype]
        for size in shape:
            bits *= size
        if bits % 8:
            continue
        rows[random.choice(["a", "b.c", "\u00e9", "x" * 40]) + str(number)] = {
            "dtype": dtype, "shape": shape, "data_offsets": [at, at + bits // 8],
        }  # fmt: skip
        at += bits // 8
    if random.random() < 0.3:
        rows["__metadata__"] = {"format": "pt"}
    return rows, bytes(index % 251 for index in range(at))


def unsound(random: Random) -> bytes:
    """A file that is almost right: one or two things in header, length or bytes are off."""
    rows, body = sound(random)
    length = None
    for _ in range(random.choice((0, 1, 1, 1, 2))):
        tensors = [name for name in rows if name != "__metadata__"]
        match random.randrange(9):
            case 0:
                length = random.choice((0, 1, 2, 2**63, 2**64 - 1, 100_000_001, len(json.dumps(rows)) + 1))
            case 1:
                body = random.choice((body[:-1], body + b"\0", body * 2, b""))
            case 2 if tensors:
                shapes = ([], [1], [2**40, 2**40], [0, 2**63], [random.choice(ODD)])
                rows[random.choice(tensors)]["shape"] = random.choice(shapes)
            case 3 if tensors:
                row = rows[random.choice(tensors)]
                if isinstance(row.get("data_offsets"), list) and row["data_offsets"]:
                    row["data_offsets"][random.randrange(len(row["data_offsets"]))] = random.choice(ODD)
            case 4 if tensors:
                rows[random.choice(tensors)]["dtype"] = random.choice((*BITS, "F12", "f32", "", 5, None))
            case 5 if len(tensors) > 1:
                first, second = random.sample(tensors, 2)
                rows[first]["data_offsets"] = list(rows[second].get("data_offsets", [0, 0]))
            case 6 if tensors:
                name = random.choice(tensors)
                rows[name] = random.choice(({}, [], None, {**rows[name], "extra": 1}, {"dtype": "U8"}))
                if not isinstance(rows[name], dict) or "data_offsets" not in rows[name]:
                    return shard(rows, body, length=length)
            case 7:
                rows["__metadata__"] = random.choice(({}, {"a": 1}, [], None, {"a": None}, {"\u00e9": ""}))
            case 8:
                head = json.dumps(rows).encode()
                heads = (head + b" " * 7, b" " + head, head[:-1] + b',"a":{}}', head.replace(b'"', b"'"), head + b"x",
                         head[:-1], b"[" + head + b"]", head + b"\n", head + b"\0")  # fmt: skip
                return shard(random.choice(heads), body, length=length)
    return shard(rows, body, length=length)
