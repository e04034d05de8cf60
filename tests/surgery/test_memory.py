"""Surgery streams: a process holds a part of what it writes, and says how much before it begins."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.sides import Command, Run
from recipes import config, run, runtime
from recipes.params.upcycle_moe import Params
from recipes.walk_needs import checkpoint_bytes, student_needs
from vpstore.checkout import Checkout
from vpstore.runner import Prepared

ROOT = Path(__file__).resolve().parents[2]
MIB, GIB = 1 << 20, 1 << 30
HELD = 360 * MIB  # beside the interpreter with torch; what is written has 286 MiB, what is read 105


def upcycled(folder: Path, how: str) -> Run:
    paths = [str(ROOT), str(ROOT / "tests/surgery"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "VPSTORE_DEVICE": "cpu"}
    script = str(ROOT / "tests/surgery/upcycle_in_process.py")
    return Command([sys.executable, script, str(folder), how], folder, environment).run()


def test_an_upcycle_holds_a_part_of_what_it_writes_and_says_so(tmp_path: Path) -> None:
    """With a negative control: tensors that are maps of their files stay in memory, and break the bound."""
    folder = tmp_path / "in"
    folder.mkdir()
    upcycled(folder, "make")
    bare = Command([sys.executable, "-c", "import torch"], folder, dict(os.environ)).run().peak_bytes
    streamed, mapped = upcycled(folder, "plain"), upcycled(folder, "mapped")
    disk, memory = map(int, streamed.output.split())
    written = sum(path.stat().st_size for path in (folder / "plain/shards").iterdir())
    assert abs(written - disk) < MIB
    assert streamed.peak_bytes - bare < HELD < mapped.peak_bytes - bare
    assert streamed.peak_bytes < memory


@pytest.fixture
def upcycle_profile(monkeypatch: pytest.MonkeyPatch) -> Checkout:
    monkeypatch.setenv("VPSTORE_DEVICE", "cuda")
    return Checkout.find(ROOT, profile="upcycle")


def prepared(checkout: Checkout, object: str, stage: str) -> Prepared:
    return run.prepare(checkout, object, stage)


@pytest.mark.parametrize(
    ("object", "stage", "walked", "streams"),
    [
        ("vpDense0-5_28", "convert", "calibration_tokens probe_tokens", 16),
        ("vpDense0-5_28", "real-morph", "calibration_tokens probe_tokens", 16),
        ("vpDense", "expand", "check_tokens", 4),
        ("vpMoE", "upcycle", "calibration_tokens check_tokens", 4),
    ],
)
def test_at_full_size_no_step_needs_more_than_three_gibibytes_beside_a_gpu(
    upcycle_profile: Checkout, object: str, stage: str, walked: str, streams: int
) -> None:
    found = prepared(upcycle_profile, object, stage)
    values = {name: value for name, value in found.params.items() if name != "runtime"}
    params = config.validated(config.params_model(found.recipe_entry), values, where=stage)
    tokens = sum(getattr(params, name) for name in walked.split())
    needs = student_needs(params.model, walked=tokens, streams=streams)  # type: ignore[attr-defined]
    assert runtime.device() == "cuda"
    assert needs.memory_bytes <= 3 * GIB
    assert needs.disk_bytes == checkpoint_bytes(params.model)  # type: ignore[attr-defined]
    if isinstance(params, Params):
        assert 12.0e9 < needs.disk_bytes < 12.1e9
