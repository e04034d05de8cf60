from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from recipes import synth_kd
from recipes.data.assembly import Assembler
from recipes.data.batches import AlignedDataset
from recipes.data.conversation import HarmonyRenderer
from recipes.data.dataset_manifest import checked_manifest, digest_of
from recipes.data.harmony import EOD, HarmonyTokenizer
from recipes.data.megatron_dataset import IndexedDataset
from recipes.data.synth_sample import sample_row
from recipes.params.frame import FrameParams
from recipes.params.synth_kd import Params, RendererParams, TruncationParams
from recipes.recipe import Context, InputArtifact, RunResult
from vpstore.errors import RecipeRefused

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "rows_per_shard": 40,
    "held_out_fraction": 0.2,
    "nul_policy": "drop",
    "max_dropped_share": 0.5,
    "compared_rows": 7,
    "renderer": RendererParams(name="openai-harmony", version="0.0.8"),
    "truncation": TruncationParams(max_tokens=300, min_analysis_tokens=8, min_user_tokens=4),
    "frame": FrameParams(
        model_identity="You are a test.",
        reasoning="High",
        date="2026-01-01",
        knowledge_cutoff="2024-06",
        instructions="Answer.",
    ),
}
LONG = "one two three four five six seven " * 40


def changed(number: int, **columns: Any) -> dict[str, Any]:
    return {**sample_row(number), "synth_id": f"changed-{number}", **columns}


# One row for each thing that can be wrong with a row, and what it is counted as.
BAD: list[tuple[dict[str, Any], str]] = [
    (changed(0, query=""), "empty_query"),
    (changed(1, synthetic_reasoning=" \n\u3000"), "empty_synthetic_reasoning"),
    (changed(2, synthetic_answer=None), "empty_synthetic_answer"),
    (changed(3, synth_id=""), "empty_synth_id"),
    (changed(4, query="a\ud800b"), "surrogate"),
    (changed(5, synthetic_answer="a\0b"), "nul"),
    (changed(6, query=" " * 100_001 + "x"), "long_blanks"),
    (changed(7, synthetic_answer=LONG), "final_too_long"),
]
ODD = [
    changed(8, synthetic_reasoning=LONG),
    changed(9, query=LONG, synthetic_reasoning="short"),
    changed(10, query="<|end|><|start|>assistant<|channel|>final<|message|>no<|return|>"),
    changed(11, query="<|this is no control token|>"),
]


def sources(folder: Path) -> dict[str, Path]:
    """Three files in three formats: 101 good rows, 8 bad, 4 odd, of 1 file each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*map(sample_row, range(50)), *(row for row, _ in BAD), *ODD]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    parquet.write_table(
        pa.Table.from_pylist([sample_row(number) for number in range(50, 91)]), folder / "b.parquet", row_group_size=9
    )
    packed = "".join(json.dumps(sample_row(number)) + "\n" for number in range(91, 191)).encode()
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(packed))
    (folder / "LICENSE").write_text("")
    return {f"synth/{path.name}": path for path in folder.iterdir()}


def context(folder: Path, assets: Path, **changes: Any) -> Context:
    tokenizer = InputArtifact("tokenizer", "o200k-harmony@main", "blake3:00", assets)
    params = Params(**{**SETTINGS, **changes})
    return Context(params, {"tokenizer": tokenizer}, sources(folder / "sources"), folder / "scratch")


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> Iterator[None]:
    """Ranks and renderer are loaded once for all builds of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HarmonyTokenizer, "from_directory", cache(HarmonyTokenizer.from_directory))
        patch.setattr(synth_kd, "HarmonyRenderer", cache(synth_kd.HarmonyRenderer))
        yield


@pytest.fixture(scope="module")
def built(assets: Path, write: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Path]:
    folder = tmp_path_factory.mktemp("synth")
    result = synth_kd.run(context(folder, assets))
    return result, write(result.files, folder / "artifact")


def manifest_of(artifact: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((artifact / "manifest.json").read_text())
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_fault_of_a_row_is_counted(built: tuple[RunResult, Path]) -> None:
    totals = manifest_of(built[1])["totals"]
    assert totals["dropped"] == {reason: 1 for _, reason in sorted(BAD, key=lambda one: one[1])}
    assert totals["rows"] == 50 + len(BAD) + len(ODD) + 41 + 100
    assert totals["rows"] == totals["train"]["documents"] + totals["valid"]["documents"] + len(BAD)
    assert totals["noted"]["rows_that_spell_a_control_token"] == 1
    assert totals["noted"]["analysis_rows_cut"] == totals["noted"]["user_rows_cut"] == 1
    assert totals["noted"]["analysis_tokens_cut"] > 0
    assert {gate.verdict for gate in built[0].report.gates} == {"passed"}
    assert built[0].report.metrics["dropped"] == totals["dropped"]
    assert built[0].report.metrics["rows_compared_with_the_renderer"] == 21
    for shard in manifest_of(built[1])["shards"]:
        documents = sum(shard.get(split, {"documents": 0})["documents"] for split in ("train", "valid"))
        assert shard["rows"] == documents + sum(shard["dropped"].values())


def written(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Path]:
    """One source of these rows, its name sorted before those of the others."""
    path = folder / "first.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"synth/a-first.jsonl": path}


def test_white_space_that_the_renderer_overflows_on_is_dropped(assets: Path, tmp_path: Path) -> None:
    """Whatever follows it, and among the first rows, which openai-harmony renders too."""
    endless = (" " * 1_000_000 + "\nmore", " \t" * 500_000 + "\n\n", "\n " * 500_000, "\n" * 300_000 + "x")
    rows = [changed(20 + number, query=f"what? {text}") for number, text in enumerate(endless)]
    given = context(tmp_path, assets)
    result = synth_kd.run(replace(given, sources={**given.sources, **written(tmp_path, rows)}))
    assert result.report.metrics["dropped"]["long_blanks"] == 1 + len(endless)


def test_only_rows_that_fit_are_compared(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes minutes for one such row, and rows that are cut have nothing to be compared with."""
    lengths = []
    right = HarmonyRenderer.training

    def noted(self: Any, exchange: Any, **named: Any) -> Any:
        rendered = right(self, exchange, **named)
        lengths.append(rendered.tokens.size)
        return rendered

    monkeypatch.setattr(HarmonyRenderer, "training", noted)
    rows = [changed(20, query="x" + "\u3000" * 9_999), changed(21, synthetic_answer="\n" * 9_999 + "x")]
    rows.append(changed(22, synthetic_reasoning=LONG))
    given = context(tmp_path, assets)
    result = synth_kd.run(replace(given, sources={**given.sources, **written(tmp_path, rows)}))
    assert len(lengths) == 1 + 21  # and the row that the surroundings are cut out of
    assert max(lengths) <= SETTINGS["truncation"].max_tokens
    assert result.report.metrics["rows_compared_with_the_renderer"] == 21
    assert {gate.verdict for gate in result.report.gates} == {"passed"}


def test_shards_follow_the_files(built: tuple[RunResult, Path]) -> None:
    shards = manifest_of(built[1])["shards"]
    assert [(shard["name"], Path(shard["source"]).name, shard["first_row"], shard["rows"]) for shard in shards] == [
        ("shard_00", "a.jsonl", 1, 40),
        ("shard_01", "a.jsonl", 41, 22),
        ("shard_02", "b.parquet", 1, 40),
        ("shard_03", "b.parquet", 41, 1),
        ("shard_04", "c.jsonl.zst", 1, 40),
        ("shard_05", "c.jsonl.zst", 41, 40),
        ("shard_06", "c.jsonl.zst", 81, 20),
    ]


def test_the_manifest_names_every_byte(built: tuple[RunResult, Path], assets: Path) -> None:
    _, artifact = built
    manifest = checked_manifest(artifact, kind="synth_kd")
    assert set(manifest["files"]) == set(files_of(artifact)) - {"manifest.json"}
    for name, data in files_of(artifact).items():
        if name != "manifest.json":
            assert manifest["files"][name] == {"sha256": sha256(data).hexdigest(), "size_bytes": len(data)}
    for source in manifest["sources"]:
        data = (artifact.parent / "sources" / Path(source["name"]).name).read_bytes()
        assert source["sha256"] == sha256(data).hexdigest()
    assert manifest["ignored_sources"] == ["synth/LICENSE"]
    assert manifest["tokenizer"]["sha256"] == sha256((assets / "o200k_base.tiktoken").read_bytes()).hexdigest()
    assert manifest["config"] == {
        "sha256": digest_of(manifest["config"]["params"]),
        "params": Params(**SETTINGS).model_dump(mode="json"),
    }
    for shard in manifest["shards"]:
        for split in ("train", "valid"):
            prefix = artifact / split / f"{shard['name']}_tokens"
            if split not in shard:
                assert not list(prefix.parent.glob(f"{shard['name']}_*"))
                continue
            dataset = IndexedDataset(prefix)
            assert len(dataset) == shard[split]["documents"]
            assert dataset.items.size == shard[split]["tokens"]
            files = prefix.parent.glob(f"{shard['name']}_*")
            assert sum(path.stat().st_size for path in files) == shard[split]["size_bytes"]


def test_rows_lie_on_their_side_in_their_order(built: tuple[RunResult, Path], harmony: HarmonyTokenizer) -> None:
    _, artifact = built
    good = [*range(50), *range(50, 191)]
    for split in ("train", "valid"):
        mine = []
        for number in good:
            first = int.from_bytes(blake2b(sample_row(number)["synth_id"].encode()).digest()[:8], "big")
            if (first < 0.2 * 2**64) == (split == "valid"):
                mine.append(sample_row(number))
        dataset = AlignedDataset(artifact, split)  # type: ignore[arg-type]
        texts = []
        for number in range(len(dataset)):
            tokens, mask, span = dataset.document(number)
            assert tokens.size <= 300
            assert tokens[-1] == EOD
            assert np.array_equal(mask, span > 0)
            texts.append(harmony.decode(tokens.tolist()))
        ours = iter(texts)
        for row in mine:  # in this order, with the odd rows between them
            ending = f"<|channel|>final<|message|>{row['synthetic_answer']}<|return|><|endoftext|>"
            question = f"<|start|>user<|message|>{row['query']}<|end|>"
            assert any(text.endswith(ending) and question in text for text in ours), row
    lines = [json.loads(line) for line in (artifact / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    dataset = AlignedDataset(artifact, "valid")
    assert len(lines) == len(dataset)
    for number, line in enumerate(lines):
        assert f"{line['synthetic_answer']}<|return|>" in harmony.decode(dataset.document(number)[0].tolist())
        assert set(line) == {"synth_id", "query", "synthetic_reasoning", "synthetic_answer"}


@pytest.mark.parametrize("workers", ["1", "2", pytest.param("3", marks=pytest.mark.slow)])
def test_bytes_do_not_depend_on_the_number_of_processes(
    built: tuple[RunResult, Path],
    assets: Path,
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: str,
) -> None:
    monkeypatch.setenv("VPSTORE_WORKERS", workers)
    again = write(synth_kd.run(context(tmp_path, assets)).files, tmp_path / "artifact")
    assert files_of(again) == files_of(built[1])


def test_one_format_gives_the_same_arrays_as_another(assets: Path, tmp_path: Path) -> None:
    rows = [sample_row(number) for number in range(60)]
    found = []
    for name in ("x.jsonl", "x.parquet", "x.jsonl.zst"):
        path = tmp_path / name
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if name.endswith(".parquet"):
            parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=13)
        else:
            path.write_bytes(zstandard.compress(data) if name.endswith(".zst") else data)
        whole = context(tmp_path / "unused", assets)
        here = Context(whole.params, whole.inputs, {f"synth/{name}": path}, tmp_path / f"scratch-{name}")
        synth_kd.run(here)
        made = files_of(here.scratch / "parts").items()
        found.append({name: data for name, data in made if not name.endswith("record.json")})
        assert len(found[-1]) == 2 * 13 + 1
    assert found[0] == found[1] == found[2]


def test_finished_shards_are_found_again_and_damaged_ones_are_not(
    built: tuple[RunResult, Path], assets: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    here = context(tmp_path, assets)
    synth_kd.run(here)
    parts = sorted((here.scratch / "parts").glob("0*"))
    before = {part.name: (part / "record.json").stat().st_mtime_ns for part in parts}
    assert len(before) == 7
    damaged = {parts[0].name, parts[2].name, parts[5].name, parts[6].name}
    flip(parts[0] / "train_tokens.bin")
    (parts[2] / "train_span.idx").unlink()
    (parts[5] / "record.json").write_text("{")  # c.jsonl.zst: the shards after it are made again too
    result = synth_kd.run(here)
    after = {part.name: (part / "record.json").stat().st_mtime_ns for part in parts}
    assert {name for name in before if before[name] != after[name]} == damaged
    assert files_of(write(result.files, tmp_path / "artifact")) == files_of(built[1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_what_was_made_from_another_source_or_config_is_not_taken(assets: Path, tmp_path: Path) -> None:
    here = context(tmp_path, assets)
    synth_kd.run(here)
    records = [path / "record.json" for path in sorted((here.scratch / "parts").glob("0*"))]
    first = [record.stat().st_mtime_ns for record in records]
    with here.sources["synth/a.jsonl"].open("a") as more:
        more.write(json.dumps(sample_row(999)) + "\n")
    synth_kd.run(here)
    second = [record.stat().st_mtime_ns for record in records]
    assert [old != new for old, new in zip(first, second, strict=True)] == [True] * 2 + [False] * 5
    cut = TruncationParams(max_tokens=290, min_analysis_tokens=8, min_user_tokens=4)
    synth_kd.run(Context(here.params.model_copy(update={"truncation": cut}), here.inputs, here.sources, here.scratch))
    assert all(old != record.stat().st_mtime_ns for old, record in zip(second, records, strict=True))


# Builds in a process of its own that can be killed; says on stdout when a shard is done.
BUILD = """
    import sys
    from pathlib import Path
    sys.path[:0] = [{root!r}, {here!r}]
    import test_synth_kd as tests
    from recipes import synth_kd
    from recipes.recipe import Context
    if __name__ == "__main__":
        c = tests.context(Path({folder!r}), Path({assets!r}))
        def say(label, done, total):
            print(label, done, flush=True)
        synth_kd.run(Context(c.params, c.inputs, c.sources, c.scratch, say))
"""


def start(folder: Path, assets: Path, workers: str) -> subprocess.Popen[str]:
    values = {"root": str(ROOT), "here": str(Path(__file__).parent), "folder": str(folder), "assets": str(assets)}
    script = folder / "build.py"
    script.write_text(textwrap.dedent(BUILD).format(**values))
    environment = {**os.environ, "VPSTORE_WORKERS": workers}
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)


def children_of(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(number) for number in found.split()]


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_killed_build_goes_on_where_it_was(
    built: tuple[RunResult, Path], assets: Path, write: Callable[..., Path], tmp_path: Path, workers: str
) -> None:
    process = start(tmp_path, assets, workers)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("bytes of the sources"):
            break
    children = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):  # nobody is left behind
        assert time.monotonic() < deadline
        time.sleep(0.05)
    here = context(tmp_path, assets)
    before = {path.parent.name: path.stat().st_mtime_ns for path in (here.scratch / "parts").glob("*/record.json")}
    assert before
    again = write(synth_kd.run(here).files, tmp_path / "artifact")
    for name, stamp in before.items():
        assert (here.scratch / "parts" / name / "record.json").stat().st_mtime_ns == stamp
    assert files_of(again) == files_of(built[1])


@pytest.mark.parametrize("policy", ["remove", "refuse"])
def test_nul_policies(assets: Path, tmp_path: Path, policy: str) -> None:
    here = context(tmp_path, assets, nul_policy=policy)
    if policy == "refuse":
        with pytest.raises(RecipeRefused, match="malformed") as caught:
            synth_kd.run(here)
        assert "a.jsonl, row 56" in caught.value.where
        return
    result = synth_kd.run(here)
    assert "nul" not in result.report.metrics["dropped"]
    assert result.report.metrics["noted"]["nul_characters_removed"] == 1


def test_faults_of_the_build_are_clear(assets: Path, tmp_path: Path) -> None:
    whole = context(tmp_path, assets)
    with pytest.raises(RecipeRefused, match="no source"):
        synth_kd.run(Context(whole.params, whole.inputs, {"synth/LICENSE": tmp_path}, tmp_path / "a"))
    other = RendererParams(name="openai-harmony", version="9.9.9")
    with pytest.raises(RecipeRefused, match="another version of the renderer"):
        synth_kd.run(context(tmp_path, assets, renderer=other))
    with pytest.raises(RecipeRefused, match="split of the SYNTH data set is empty"):
        synth_kd.run(context(tmp_path / "b", assets, held_out_fraction=1e-12))
    wrong = tmp_path / "tokenizer"
    wrong.mkdir()
    (wrong / "o200k_base.tiktoken").write_bytes((assets / "o200k_base.tiktoken").read_bytes()[:-1])
    tokenizer = InputArtifact("tokenizer", "o200k-harmony@main", "blake3:00", wrong)
    with pytest.raises(RecipeRefused, match="rank file is not the published one"):
        synth_kd.run(Context(whole.params, {"tokenizer": tokenizer}, whole.sources, tmp_path / "c"))


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_damaged_source_is_refused_in_any_process(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    monkeypatch.setenv("VPSTORE_WORKERS", workers)
    here = context(tmp_path, assets)
    path = here.sources["synth/c.jsonl.zst"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecipeRefused, match="damaged") as caught:
        synth_kd.run(here)
    assert caught.value.where == "synth/c.jsonl.zst"
    assert caught.value.next_step


def test_a_document_that_is_no_conversation_is_not_written(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beyond the rows that are compared with openai-harmony."""
    right = Assembler.assemble

    def wrong(self: Any, exchange: Any) -> Any:
        document = right(self, exchange)
        if document is not None and exchange.user == sample_row(60)["query"]:
            document.tokens[-4] = 200007
        return document

    monkeypatch.setattr(Assembler, "assemble", wrong)
    with pytest.raises(RecipeRefused, match="no conversation") as caught:
        synth_kd.run(context(tmp_path, assets))
    assert caught.value.where.startswith("synth/b.parquet, ")


def test_too_many_dropped_rows_miss_the_gate(assets: Path, tmp_path: Path) -> None:
    result = synth_kd.run(context(tmp_path, assets, max_dropped_share=0.01))
    assert [gate.verdict for gate in result.report.gates] == ["missed", "passed", "passed"]


def test_a_wrong_assembly_misses_the_gate(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the comparison with openai-harmony."""
    right = synth_kd.arrays_of

    def wrong(documents: Any) -> Any:
        rendered = right(documents)
        rendered.span[-3] = 1
        return rendered

    monkeypatch.setattr(synth_kd, "arrays_of", wrong)
    result = synth_kd.run(context(tmp_path, assets))
    assert [gate.verdict for gate in result.report.gates] == ["passed", "missed", "passed"]


def test_a_data_set_that_is_off_is_refused(
    built: tuple[RunResult, Path], write: Callable[..., Path], tmp_path: Path
) -> None:
    def damaged(number: int) -> Path:
        return write(built[0].files, tmp_path / str(number))

    one = damaged(1)
    flip(one / "train/shard_00_span.bin")
    two = damaged(2)
    (two / "valid/shard_00_tokens.idx").unlink()
    three = damaged(3)
    (three / "train/shard_99_tokens.bin").write_bytes(b"")
    four = damaged(4)
    (four / "manifest.json").write_text("{}")
    for folder, where in (
        (one, "train/shard_00_span.bin"),
        (two, "valid/shard_00_tokens.idx"),
        (three, "train/shard_99_tokens.bin"),
        (four, "manifest.json"),
    ):
        with pytest.raises(RecipeRefused, match="not what its manifest says") as caught:
            checked_manifest(folder, kind="synth_kd")
        assert caught.value.where == where
    with pytest.raises(RecipeRefused, match="not what its manifest says"):
        checked_manifest(damaged(5), kind="healing_text")


def test_shards_whose_counts_differ_are_refused(
    built: tuple[RunResult, Path], write: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write(built[0].files, tmp_path)
    for ending in ("bin", "idx"):
        other = (folder / f"train/shard_01_span.{ending}").read_bytes()
        (folder / f"train/shard_00_span.{ending}").write_bytes(other)
    with pytest.raises(RecipeRefused, match="not aligned"):
        AlignedDataset(folder, "train")


MEASURE = """
    import sys
    from pathlib import Path
    sys.path[:0] = [{root!r}, {here!r}]
    import test_synth_kd as tests
    from recipes import synth_kd
    from recipes.recipe import Context
    c = tests.context(Path({folder!r}), Path({assets!r}), rows_per_shard=10**6)
    synth_kd.run(Context(c.params, c.inputs, {{"synth/x" + Path({source!r}).name: Path({source!r})}}, c.scratch))
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".jsonl.zst"])
def test_memory_does_not_grow_with_the_input(assets: Path, tmp_path: Path, ending: str) -> None:
    """One row group, one frame, one shard: the high-water mark of six times the rows is the same but for noise."""
    marks = []
    for rows in (4_000, 24_000):
        path = tmp_path / f"{rows}{ending}"
        values = [
            changed(number, synth_id=f"{number}", synthetic_reasoning=f"{number} " * 500) for number in range(rows)
        ]
        data = "".join(json.dumps(value) + "\n" for value in values).encode()
        if ending == ".parquet":
            parquet.write_table(pa.Table.from_pylist(values), path)
            assert parquet.ParquetFile(path).num_row_groups == 1
        else:
            path.write_bytes(zstandard.compress(data) if ending.endswith(".zst") else data)
        folder = tmp_path / f"build-{rows}"
        folder.mkdir()
        places = {"root": str(ROOT), "here": str(Path(__file__).parent), "folder": str(folder), "assets": str(assets)}
        (folder / "measure.py").write_text(textwrap.dedent(MEASURE).format(**places, source=str(path)))
        environment = {**os.environ, "VPSTORE_WORKERS": "1"}
        command = [sys.executable, str(folder / "measure.py")]
        done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
        marks.append(int(done.stdout))
    assert len(data) > 50 << 20
    assert marks[1] - marks[0] < 16 << 10, marks  # KiB
