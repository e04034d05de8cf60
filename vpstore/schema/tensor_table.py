"""Safetensors headers and tensor tables: which bytes of a shard are which tensor.

Place in the path: publish parses the header of each shard and stores a table (a blob of its own) that the manifest
names; verify and repair say with it which tensor a damaged byte belongs to, `open` checks single tensors against it.
Invariants: spans are absolute byte ranges [begin, end) of the shard; header and tensors tile the file without a hole or
an overlap; nothing that the stock library refuses is accepted, and what it reads is, but for the bounds below and for
JSON that is not strict (a key twice in one row, NaN, nesting beyond 64).

Example:
    layout = parse_header(first_bytes, file_size=path.stat().st_size, where=str(path))
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from vpstore.errors import BadManifest
from vpstore.schema.canonical import canonical_bytes, parse_canonical, parse_strict
from vpstore.schema.digest import Digest
from vpstore.schema.fields import Fields

FORMAT: Final = 1
MEDIA_TYPE: Final = "application/vnd.vpstore.tensor-table.v1+json"
SAFETENSORS: Final = "application/vnd.safetensors"
MAX_HEADER_BYTES: Final = 100_000_000  # the stock library's own bound; 80,000 tensors need about 12 MB
MAX_TENSORS: Final = 1_000_000
_MAX_RANK: Final = 64  # no tensor library has more
_BLANKS: Final = b" \t\n\r"  # of JSON
_MIN_NESTING: Final = 12  # bytes of a header for each bracket: a tensor has three and needs more than 40
BITS: Final[Mapping[str, int]] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpan:
    """One tensor of a shard, as its header declares it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorRow(TensorSpan):
    """One tensor of a shard with the digest of its bytes."""

    digest: Digest

    @property
    def span(self) -> TensorSpan:
        """The row as a header declares it."""
        return TensorSpan(self.name, self.dtype, self.shape, self.begin, self.end)

    def to_json(self) -> dict[str, Any]:
        """The row as a table writes it."""
        span = [self.begin, self.end]
        return {
            "name": self.name, "dtype": self.dtype, "shape": list(self.shape), "span": span, "digest": self.digest,
        }  # fmt: skip


@dataclass(frozen=True)
class ShardLayout:
    """A parsed header: where it ends and which tensors follow, in the order of their bytes."""

    header_end: int
    tensors: tuple[TensorSpan, ...]


@dataclass(frozen=True)
class TensorTable:
    """The table of one shard."""

    size_bytes: int
    header: tuple[int, Digest]  # end of the header and the digest of the bytes before it
    tensors: tuple[TensorRow, ...]

    @cached_property
    def by_name(self) -> dict[str, TensorRow]:
        """Rows by tensor name."""
        return {row.name: row for row in self.tensors}

    def encode(self) -> bytes:
        """The canonical bytes: what the manifest's `tensors` digest is of."""
        return canonical_bytes(
            {
                "format": FORMAT,
                "size_bytes": self.size_bytes,
                "header": {"span": [0, self.header[0]], "digest": self.header[1]},
                "tensors": [row.to_json() for row in self.tensors],
            }
        )

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> TensorTable:
        """Read a table and hold it against the tiling rule.

        Raises:  BadManifest: not canonical, unknown fields, or rows that do not tile the shard.
        """
        fields = Fields(parse_canonical(data, where=where), where=where)
        fields.format(FORMAT)
        size_bytes = fields.count("size_bytes")
        header = fields.inner("header")
        begin, end = _span(header)
        header_digest = header.digest("digest")
        header.done()
        rows = fields.each("tensors", _row)
        fields.done()
        if begin != 0:
            fields.refuse("a header does not begin at 0", at="header", found=str(begin))
        _check_tiling(rows, begin=end, end=size_bytes, where=where)
        return cls(size_bytes, (end, header_digest), rows)


def _row(fields: Fields) -> TensorRow:
    name, dtype = fields.take("name", str), fields.text("dtype")
    shape = _shape(fields)
    begin, end = _span(fields)
    row = TensorRow(name, dtype, shape, begin, end, fields.digest("digest"))
    _check_size(row, where=fields.where)
    return row


def parse_header(head: bytes, *, file_size: int, where: str) -> ShardLayout:
    """Read the header of a safetensors file.

    Args:    head: the file's first bytes, at least up to the end of the header; file_size: in bytes.
    Returns: tensors sorted by where their bytes begin, then by name.
    Raises:  BadManifest: truncated, oversized, duplicate names, an unknown dtype, a span that is out of range,
             overlaps, leaves a hole or contradicts dtype and shape.
    """
    end = header_end(head, file_size=file_size, where=where)
    if len(head) < end:
        raise BadManifest("a safetensors header is cut off", where=where, expected=f"{end} bytes", found=f"{len(head)}")
    if not head[8:end].lstrip(_BLANKS).startswith(b"{"):
        raise BadManifest(
            "a safetensors header is not a JSON object", where=where, expected="'{', after blanks at most"
        )
    if (count := head.count(b"[", 8, end) + head.count(b"{", 8, end)) > (end - 8) // _MIN_NESTING + 2:
        raise BadManifest("a safetensors header is mostly brackets", where=where, found=f"{count} in {end - 8} bytes")
    fields = parse_strict(head[8:end], where=where, limit=MAX_HEADER_BYTES)
    if not isinstance(fields, dict) or len(fields) > MAX_TENSORS:
        raise BadManifest(
            "a safetensors header is not acceptable", where=where, expected=f"at most {MAX_TENSORS} names"
        )
    _check_metadata(fields.pop("__metadata__", None), where=where)
    spans = [_declared(name, value, end=end, where=where) for name, value in fields.items()]
    spans.sort(key=lambda span: (span.begin, span.end, span.name))
    _check_tiling(spans, begin=end, end=file_size, where=where)
    return ShardLayout(end, tuple(spans))


def header_end(head: bytes, *, file_size: int, where: str) -> int:
    """Where the header ends, from the first 8 bytes of the file.

    Raises:  BadManifest: no room for a header, or one larger than the file or than MAX_HEADER_BYTES.
    """
    if len(head) < 8 or file_size < 10:
        raise BadManifest("a file is too short for safetensors", where=where, found=f"{file_size} bytes")
    (length,) = struct.unpack("<Q", head[:8])
    if length < 2 or length > min(MAX_HEADER_BYTES, file_size - 8):
        raise BadManifest(
            "a safetensors header has an impossible size",
            where=where,
            expected=f"2 to {min(MAX_HEADER_BYTES, file_size - 8)} bytes",
            found=f"{length} bytes",
        )
    return 8 + int(length)


def _check_metadata(metadata: object, *, where: str) -> None:
    if metadata is None:  # absent, or null
        return
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise BadManifest("safetensors metadata is not text to text", where=f"{where}: __metadata__")


def _declared(name: str, value: Any, *, end: int, where: str) -> TensorSpan:
    fields = Fields(value, where=f"{where}: {name[:200]}")
    dtype = fields.text("dtype")
    shape = _shape(fields)
    first, last = _span(fields, "data_offsets")  # other fields mean nothing to the stock library, nor here
    span = TensorSpan(name, dtype, shape, end + first, end + last)
    _check_size(span, where=fields.where)
    return span


def _shape(fields: Fields) -> tuple[int, ...]:
    shape = fields.take("shape", list)
    if len(shape) > _MAX_RANK or not all(type(size) is int and size >= 0 for size in shape):
        fields.refuse("a shape is not acceptable", at="shape", expected="counts", found=repr(shape)[:80])
    return tuple(shape)


def _span(fields: Fields, name: str = "span") -> tuple[int, int]:
    span = fields.take(name, list)
    if len(span) != 2 or not all(type(at) is int and at >= 0 for at in span) or span[0] > span[1]:
        fields.refuse("a span is not acceptable", at=name, expected="[begin, end]", found=repr(span)[:80])
    return span[0], span[1]


def _check_size(span: TensorSpan, *, where: str) -> None:
    bits = BITS.get(span.dtype)
    if bits is None:
        raise BadManifest("an unknown dtype", where=where, expected=", ".join(sorted(BITS)), found=span.dtype[:40])
    for size in span.shape:  # Python integers do not overflow; the bound only keeps the product small
        bits = min(bits * size, 1 << 80)
    if bits % 8 or bits // 8 != span.end - span.begin:
        raise BadManifest(
            "a tensor's span is not the size of its shape",
            where=where,
            expected=f"{bits / 8:g} bytes for {span.dtype} {list(span.shape)}",
            found=f"{span.end - span.begin} bytes",
        )


def _check_tiling(
    spans: tuple[TensorSpan, ...] | list[TensorSpan] | tuple[TensorRow, ...], *, begin: int, end: int, where: str
) -> None:
    at, names = begin, set()
    for span in spans:
        if span.begin != at:
            fault = "overlaps the one before it" if span.begin < at else "leaves a hole before it"
            raise BadManifest(
                f"a tensor {fault}",
                where=f"{where}: {span.name[:200]}",
                expected=f"byte {at}",
                found=f"byte {span.begin}",
            )
        if span.name in names:
            raise BadManifest("a tensor is listed twice", where=f"{where}: {span.name[:200]}")
        names.add(span.name)
        at = span.end
    if at != end:
        raise BadManifest(
            "tensors do not end where the file does", where=where, expected=f"{end} bytes", found=f"{at} bytes"
        )
