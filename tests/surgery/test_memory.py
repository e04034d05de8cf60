"""Surgery streams: a process holds a part of what it writes, and says how much before it begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import config, run, runtime
from recipes.params.upcycle_moe import Params
from recipes.walk_needs import checkpoint_bytes, student_needs
from vpstore.checkout import Checkout
from vpstore.runner import Prepared

ROOT = Path(__file__).resolve().parents[2]
MIB, GIB = 1 << 20, 1 << 30
HELD = 240 * MIB  # beside the interpreter with what it imports; 219 MiB are written, 102 read


def upcycled(folder: Path, how: str) -> dict[str, int]:
    paths = [str(ROOT), str(ROOT / "tests/surgery"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "VPSTORE_DEVICE": "cpu"}
    script = str(ROOT / "tests/surgery/upcycle_in_process.py")
    command = [sys.executable, script, str(folder), how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout or "{}")
    return found


@pytest.mark.slow
def test_an_upcycle_holds_a_part_of_what_it_writes_and_says_so(tmp_path: Path) -> None:
    """With a negative control: tensors that are maps of their files stay in memory, and break the bound."""
    upcycled(tmp_path, "make")
    streamed, mapped = upcycled(tmp_path, "plain"), upcycled(tmp_path, "mapped")
    written = sum(path.stat().st_size for path in (tmp_path / "plain/shards").iterdir())
    assert abs(written - streamed["disk_bytes"]) < MIB
    assert streamed["held"] < HELD < mapped["held"]
    assert streamed["peak"] < streamed["memory_bytes"]


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
