from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from recipes.data import compressed, rows
from recipes.data.row_reader import START, Mark
from recipes.data.rows import ENDINGS, PROSE_COLUMNS, JsonLines, open_rows, row_format, seekable
from vpstore.errors import RecipeRefused

VALUES = [{"doc_id": f"d-{n}", "text": f"é{n} " * n, "dump": "x", "score": n} for n in range(1, 38)]
MEANT = [{"doc_id": value["doc_id"], "text": value["text"]} for value in VALUES]


def json_lines(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def write(path: Path, values: list[dict[str, Any]], *, row_group: int = 10) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(values), path, row_group_size=row_group)
    elif path.suffix == ".zst":
        data = json_lines(values)
        half = len(data) // 2  # two frames in one file, the border inside a row
        path.write_bytes(b"".join(zstandard.compress(part) for part in (data[:half], data[half:])))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(json_lines(values)))
    else:
        path.write_bytes(json_lines(values))
    return path


def read(path: Path, columns: rows.Columns = PROSE_COLUMNS) -> list[dict[str, str]]:
    with open_rows(path, columns) as reader:
        return [row for _, row in reader.rows()]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_same_pruned_rows(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a{ending}", VALUES)
    assert row_format(path.name) == ending
    with open_rows(path, PROSE_COLUMNS) as reader:
        assert list(reader.rows()) == list(enumerate(MEANT))
        assert list(reader.rows()) == list(enumerate(MEANT))  # once more from the start


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("every", [1, 4, 10, 36, 37, 100])
def test_reading_begins_at_every_mark(tmp_path: Path, ending: str, every: int) -> None:
    with open_rows(write(tmp_path / f"a{ending}", VALUES), PROSE_COLUMNS) as reader:
        marks = reader.marks(every)
        if not reader.is_seekable:
            assert marks == [START]
            marks = [Mark(row, 0) for row in range(0, len(MEANT), every)]
        assert [mark.row for mark in marks] == list(range(0, len(MEANT), every))
        pieces = [list(reader.rows(mark, every)) for mark in marks]
    assert sum(pieces, []) == list(enumerate(MEANT))
    assert all(len(piece) == every for piece in pieces[:-1])


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_id_may_have_its_other_name_and_null_is_empty(tmp_path: Path, ending: str) -> None:
    values = [{"id": "a", "text": None}, {"id": None, "text": "x"}]
    assert read(write(tmp_path / f"a{ending}", values)) == [{"doc_id": "a", "text": ""}, {"doc_id": "", "text": "x"}]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_without_rows(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        parquet.write_table(pa.table({"doc_id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), path)
    else:
        write(path, [])
    assert read(path) == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_copy_that_can_be_entered_anywhere(tmp_path: Path, ending: str) -> None:
    values = [*VALUES, {"doc_id": "lone", "text": "a\ud800b"}] if ending == ".jsonl.gz" else VALUES
    path = tmp_path / f"a{ending}"
    if ending == ".jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(value) + "\n" for value in values).encode()))
    else:
        write(path, values)
    with seekable(open_rows(path, PROSE_COLUMNS), tmp_path / "unpacked" / "0.jsonl") as plain:
        found = list(plain.with_offsets())
        assert [row["text"] for _, row in found] == [value["text"] for value in values]
        assert [plain.row_at(offset) for offset, _ in reversed(found)] == [row for _, row in reversed(found)]
        assert (plain.path == path) == (ending == ".jsonl")


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.zst", ".jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"doc_id": "a"}', "no such key"),
        (b'{"doc_id": 3, "text": "x"}', "int"),
        (b'["doc_id"]', "list"),
        (b'{"doc_id": "a", "text": "x"', "delimiter"),
        (b"\xff", "invalid start byte"),
        (b"x", "Expecting value"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_malformed_row_is_refused_with_its_number(tmp_path: Path, ending: str, line: bytes, found: str) -> None:
    data = b'{"doc_id": "a", "text": "x"}\n' + line + b"\n"
    pack: dict[str, Callable[[bytes], bytes]] = {".jsonl.zst": zstandard.compress, ".jsonl.gz": gzip.compress}
    path = tmp_path / f"a{ending}"
    path.write_bytes(pack.get(ending, bytes)(data))
    with pytest.raises(RecipeRefused, match="malformed") as caught:
        read(path)
    assert caught.value.where == f"a{ending}, row 2"
    assert found in caught.value.found
    assert caught.value.next_step


@pytest.mark.parametrize("ending", [".jsonl.zst", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused_and_never_taken_for_a_shorter_one(
    tmp_path: Path, ending: str, share: float
) -> None:
    path = write(tmp_path / f"a{ending}", VALUES)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(RecipeRefused, match="damaged") as caught:
        read(path)
    assert caught.value.where.startswith(f"a{ending}")
    assert caught.value.expected
    assert caught.value.found
    assert caught.value.next_step


def test_the_library_alone_would_take_a_cut_frame_for_a_whole_one(tmp_path: Path) -> None:
    """The reason for reading frames by hand; if this fails, `zstd_chunks` may become simpler."""
    data = zstandard.compress(json_lines(VALUES) * 200)
    path = tmp_path / "a.zst"
    path.write_bytes(data[: len(data) // 2])
    with path.open("rb") as handle, zstandard.ZstdDecompressor().stream_reader(handle) as reader:
        while reader.read(1 << 16):
            pass
    with path.open("rb") as handle, pytest.raises(RecipeRefused, match="damaged"):
        list(compressed.zstd_chunks(handle, "a.zst"))


@pytest.mark.parametrize("ending", [".jsonl.zst", ".jsonl.gz", ".parquet"])
def test_garbage_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"no such format, but long enough for every magic number" * 4)
    with pytest.raises(RecipeRefused, match="damaged"):
        read(path)


def test_a_damaged_page_of_a_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"doc_id": [f"{n}" for n in range(50)], "text": [f"text {n * 7919}" for n in range(50)]})
    parquet.write_table(table, path, compression="gzip")
    data = bytearray(path.read_bytes())
    data[40:120] = bytes(80)
    path.write_bytes(bytes(data))
    with pytest.raises(RecipeRefused, match="damaged"):
        read(path)


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ({"doc_id": ["a"], "body": ["x"]}, "doc_id, body"),
        ({"doc_id": ["a"], "text": [3]}, "int64"),
        ({"doc_id": ["a"], "text": [b"x"]}, "binary"),
        ({"doc_id": ["a"], "text": [["x"]]}, "list"),
    ],
)
def test_another_schema_is_refused(tmp_path: Path, table: dict[str, Any], found: str) -> None:
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(RecipeRefused, match="schema") as caught:
        read(tmp_path / "a.parquet")
    assert found in caught.value.found
    assert "text" in caught.value.expected


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_kind_of_text_column_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array(["a", None, "é"]).cast(kind)
    parquet.write_table(pa.table({"doc_id": ["0", "1", "2"], "text": texts}), tmp_path / "a.parquet")
    assert [row["text"] for row in read(tmp_path / "a.parquet")] == ["a", "", "é"]


def test_a_column_of_nothing_but_nulls_is_empty_text(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"doc_id": ["0"], "text": pa.nulls(1)}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [{"doc_id": "0", "text": ""}]


def test_bytes_that_are_no_text_in_a_text_column(tmp_path: Path) -> None:
    def column(value: bytes) -> pa.Array:
        data = pa.array([b"fine", value], pa.binary())
        return pa.Array.from_buffers(pa.string(), 2, data.buffers())

    parquet.write_table(pa.table({"doc_id": ["0", "1"], "text": column(b"\xed\xa0\x80")}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[1]["text"] == "\ud800"  # counted later, as from JSON
    parquet.write_table(pa.table({"doc_id": ["0", "1"], "text": column(b"\xff")}), tmp_path / "b.parquet")
    with pytest.raises(RecipeRefused, match="malformed") as caught:
        read(tmp_path / "b.parquet")
    assert caught.value.where == "b.parquet, row 2"


def test_a_file_that_none_reads_or_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="no reader"):
        open_rows(tmp_path / "a.csv", PROSE_COLUMNS)
    for ending in ENDINGS:
        with pytest.raises(RecipeRefused, match="cannot be read"):
            open_rows(tmp_path / f"none{ending}", PROSE_COLUMNS)


def test_a_line_without_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 50)
    for ending in (".jsonl", ".jsonl.zst", ".jsonl.gz"):
        with pytest.raises(RecipeRefused, match=r"malformed|damaged"):
            read(write(tmp_path / f"a{ending}", [{"doc_id": "a", "text": "x" * 100}]))


@given(st.lists(st.binary(max_size=9), max_size=30))
def test_lines_do_not_depend_on_the_chunks(chunks: list[bytes]) -> None:
    whole = b"".join(chunks).split(b"\n")
    meant = whole if whole[-1] else whole[:-1]
    assert list(compressed.lines_of(iter(chunks), name="x", limit=1 << 20)) == meant


def test_two_readings_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    with JsonLines(write(tmp_path / "a.jsonl", VALUES), PROSE_COLUMNS) as reader:
        stream = reader.with_offsets()
        next(stream)
        offset, row = next(stream)
        assert reader.row_at(offset) == row
        assert next(stream)[1] == MEANT[2]


LINES = [json.dumps(value).encode() for value in MEANT[:3]]
MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize(
    "data",
    [b"\n".join(LINES) + b"\n\n", b"\n \t\r\n\n".join(LINES), b"\n" + b"\r\n".join(LINES), MARK + b"\n".join(LINES),
     MARK + b"\n" + b"\n".join(MARK + line for line in LINES)],
    ids=["an empty last line", "white lines between", "an empty first line, CRLF", "a mark", "a mark a line"],
)  # fmt: skip
def test_empty_lines_and_byte_order_marks_are_no_rows(tmp_path: Path, ending: str, data: bytes) -> None:
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[ending]
    path = tmp_path / f"a{ending}"
    path.write_bytes(pack(data))
    with open_rows(path, PROSE_COLUMNS) as reader:
        assert list(reader.rows()) == list(enumerate(MEANT[:3]))
        for mark in reader.marks(1):
            assert next(reader.rows(mark, 1)) == (mark.row, MEANT[mark.row])
        if isinstance(reader, JsonLines):
            assert [reader.row_at(offset) for offset, _ in reader.with_offsets()] == MEANT[:3]


@pytest.mark.parametrize("log", [27, 28, 31])
def test_a_zstandard_frame_with_a_long_window_is_read(tmp_path: Path, log: int) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=False, compression_level=1)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # no size: the whole window is asked
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(b"\n".join(LINES)) + packer.flush())
    assert read(tmp_path / "a.jsonl.zst") == MEANT[:3]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n"


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_pointer_of_git_lfs_is_called_that(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a{ending}").write_bytes(POINTER)
    with pytest.raises(RecipeRefused, match="Git LFS pointer") as caught:
        read(tmp_path / f"a{ending}")
    assert "git lfs pull" in caught.value.next_step


def test_a_doubled_column_is_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["doc_id", "text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(RecipeRefused) as caught:
        read(tmp_path / "a.parquet")
    assert (caught.value.expected, caught.value.found) == ("one column text", "2 of them")


@pytest.mark.parametrize(("ending", "data"), [(".jsonl", b"{"), (".jsonl.zst", b"x"), (".parquet", b"PAR1")])
def test_nobody_is_told_to_restore_what_was_just_found_right(tmp_path: Path, ending: str, data: bytes) -> None:
    (tmp_path / f"a{ending}").write_bytes(data)
    with pytest.raises(RecipeRefused) as caught:
        read(tmp_path / f"a{ending}")
    assert "restore" not in caught.value.next_step
    assert "pin" in caught.value.next_step
