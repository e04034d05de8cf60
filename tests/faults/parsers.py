"""Every parser of bytes that come from outside, with valid documents to start from, and how such bytes are mutated."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from small_project import OBJECTS

from vpstore.checkout import read_toml
from vpstore.errors import VpstoreError
from vpstore.schema.attestation import BuildFacts, Statement
from vpstore.schema.canonical import canonical_bytes, parse_canonical, parse_strict, readable_bytes
from vpstore.schema.digest import Digest
from vpstore.schema.dsse import Envelope, EnvelopeSignature
from vpstore.schema.lockfile import LockEntry, Lockfile
from vpstore.schema.manifest import (
    BuildRecord,
    FileRecord,
    InputRecord,
    IntermediateRecord,
    Manifest,
    Pin,
    RecipeFile,
    SourceRecord,
)
from vpstore.schema.objects import parse_objects
from vpstore.schema.ref import StageRef, parse_ref
from vpstore.schema.reproduction import Outcome, Reproduction, Subject
from vpstore.schema.tensor_table import TensorRow, TensorTable, parse_header
from vpstore.signatures import open_envelope
from vpstore.storage.keys import Keys
from vpstore.storage.pointers import Pointer
from vpstore.storage.roots import CheckoutRoot

Again = Callable[[bytes], bytes]  # decode, then encode: the same bytes, if the document is canonical


@dataclass(frozen=True)
class Parser:
    """One parser."""

    name: str
    samples: tuple[bytes, ...]
    again: Again
    is_canonical: bool = True  # one value, one sequence of bytes; else: what is written again is read as the same
    is_json: bool = True


class Violation(AssertionError):
    """A parser did something else than to refuse with an error of ours or to give back what it was given."""


def hold(parser: Parser, data: bytes) -> bool:
    """Give bytes to a parser.

    Returns: whether they were accepted.
    Raises:  Violation.
    """
    try:
        again = parser.again(data)
    except VpstoreError as error:
        try:
            json.dumps([str(error), error.where, error.expected, error.found]).encode()
        except (UnicodeError, TypeError, ValueError) as trouble:
            raise Violation(f"{parser.name}: the error cannot be printed: {trouble}") from trouble
        return False
    except Exception as error:
        raise Violation(f"{parser.name}: {type(error).__name__}: {error} for {data[:300]!r}") from error
    if parser.is_canonical:
        if again != data:
            raise Violation(f"{parser.name}: accepted, but not given back: {data[:300]!r}")
    elif parser.again(again) != again:
        raise Violation(f"{parser.name}: what it writes is not what it reads: {data[:300]!r}")
    return True


def _manifest() -> Manifest:
    record = BuildRecord(
        "small.grow",
        tuple(
            RecipeFile(f"small/{name}.py", Digest.of(name.encode()), Digest.of(b"code")) for name in ("grow", "soil")
        ),
        {"step": 1, "rate": 0.5, "deep": {"list": [1, [2, None], "drei"]}},
        (InputRecord("parent", Digest.of(b"parent"), Digest.of(b"content")),),
        (SourceRecord("donor/a", "1" * 64, None), SourceRecord("donor/b", "2" * 64, 7)),
        (Pin("tokenizer", Digest.of(b"ranks"), {"family": "o200k", "padded_vocab": 201088}),),
    )
    files = (
        FileRecord("model.safetensors", "application/vnd.safetensors", Digest.of(b"m"), 3, Digest.of(b"t")),
        FileRecord("reports/metrics.json", "application/json", Digest.of(b"c"), 2),
    )
    return Manifest("plant", "bloom", record, files, (IntermediateRecord("mean", Digest.of(b"i"), 1),))


def _facts() -> BuildFacts:
    return BuildFacts("2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z", 1767225601, 1.25, {"device": "cpu"},
                      {"commit": None, "dirty": None}, {"vpstore": "0.1.0", "python": "3.11.7"})  # fmt: skip


def _header() -> bytes:
    rows = {"__metadata__": {"format": "pt"}, "a": _row("F32", [2, 1], 0, 8), "b": _row("U8", [0], 8, 8),
            "c": _row("BF16", [], 8, 10)}  # fmt: skip
    return shard_bytes(json.dumps(rows).encode(), 10)


def _row(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def shard_bytes(head: bytes, body: int) -> bytes:
    """A shard with this header and so many bytes of tensors."""
    return struct.pack("<Q", len(head)) + head + bytes(body)


def _table() -> TensorTable:
    rows = (TensorRow("a", "F32", (2, 1), 30, 38, Digest.of(b"a")), TensorRow("b", "U8", (0,), 38, 38, Digest.of(b"b")))
    return TensorTable(38, (30, Digest.of(b"head")), rows)


def _read_header(data: bytes) -> bytes:
    layout = parse_header(data, file_size=len(data), where="fuzz")
    assert all(layout.header_end <= span.begin <= span.end <= len(data) for span in layout.tensors)
    return data


def _read_key(data: bytes, folder: Path) -> bytes:
    path = folder / "k" / "artifact"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    key, artifact = Keys(folder, folder).read(path)
    raise AssertionError(f"a key file under a wrong name was believed: {key} {artifact}")


def _reproduction() -> Reproduction:
    outcome = Outcome("PASSED", "whole", 2, 2, 10, 10, rebuilt=_manifest().digest)
    return Reproduction.of(Subject("plant@bloom", _manifest().digest, _manifest().build.key()), outcome, _facts())


def _objects(data: bytes, folder: Path) -> bytes:
    (folder / "objects.toml").write_bytes(data)
    parse_objects(read_toml(folder / "objects.toml"), {}, where="fuzz")
    return data


def _ref(data: bytes) -> bytes:
    return str(parse_ref(data.decode("utf-8", "surrogateescape"))).encode()


def _root() -> CheckoutRoot:
    return CheckoutRoot(Path("/home/ada/vpmoe"), {"tiny/plant@bloom": Digest.of(b"x")}, "0123abcd")


@cache
def parsers(folder: Path) -> tuple[Parser, ...]:
    """All of them. `folder` is for those that read files."""
    manifest, digest = _manifest(), Digest.of(b"d")
    statement, reproduction = Statement.of(manifest, _facts()), _reproduction()
    envelope = Envelope(statement.encode(), (EnvelopeSignature("ab" * 32, b"signature"),)).encode()
    lock = Lockfile({"tiny": {StageRef("plant", "bloom"): LockEntry.of(manifest)}, "large": {}})
    key = canonical_bytes({"format": 1, "key": digest, "artifact": digest})
    return (
        Parser("manifest", (manifest.encoded,), lambda data: Manifest.decode(data, where="fuzz").encoded),
        Parser("tensor table", (_table().encode(),), lambda data: TensorTable.decode(data, where="fuzz").encode()),
        Parser("safetensors header", (_header(),), _read_header, is_json=False),
        Parser("attestation", (statement.encode(),), lambda data: Statement.decode(data, where="fuzz").encode()),
        Parser("reproduction", (reproduction.encode(),), lambda data: Reproduction.decode(data, where="fuzz").encode()),
        Parser("envelope", (envelope,), lambda data: Envelope.decode(data, where="fuzz").encode()),
        Parser("signed statement", (envelope,), lambda data: (open_envelope(data, (), where="fuzz"), data)[1]),
        Parser("pointer", (Pointer(StageRef("plant", "bloom"), digest, digest).encode(),),
               lambda data: Pointer.decode(data, where="fuzz").encode(), is_canonical=False),
        Parser("lock", (lock.encode(), Lockfile().encode()),
               lambda data: Lockfile.decode(data, where="fuzz").encode(), is_canonical=False),
        Parser("key", (key,), lambda data: _read_key(data, folder)),
        Parser("root of a checkout", (_root().encode(),), lambda data: CheckoutRoot.decode(data, where="fuzz").encode(),
               is_canonical=False),
        Parser("objects.toml", (OBJECTS.encode(),), lambda data: _objects(data, folder), is_json=False),
        Parser("ref", (b"vpDense0-5_28.real@real-heal", b"vpMoE#0123456789ab"), _ref, is_json=False),
        Parser("strict JSON", (manifest.encoded, readable_bytes({"a": [1.5, None, True, "\u00e9"]})),
               lambda data: canonical_bytes(parse_strict(data, where="fuzz")), is_canonical=False),
        Parser("canonical JSON", (canonical_bytes({"a": [1.5, None, True, "\u00e9", {"\ue000": 1e21}]}),),
               lambda data: canonical_bytes(parse_canonical(data, where="fuzz"))),
    )  # fmt: skip
