"""The chain as it was built here: what the README promises of it. Nothing is built by these tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from recipes.checkpoint import expected_tensors, parse_student_config
from vpstore import resolve

ROOT = Path(__file__).resolve().parents[2]
POINTER = ROOT / "weights/tiny/refs/vpMoE-smoke.json"
pytestmark = [
    pytest.mark.chain,
    pytest.mark.skipif(not POINTER.exists(), reason="the chain is not built here: make repro"),
]
CHECKPOINTS = (
    "qwen3-0_6B-main",
    "qwen3-0_6B-o200k-transplant",
    "vpDense0-5_28-convert",
    "vpDense0-5_28-compat-heal",
    "vpDense0-5_28-real-morph",
    "vpDense0-5_28-real-heal",
    "vpDense-expand",
    "vpDense-wake-up",
    "vpMoE-upcycle",
    "vpMoE-smoke",
)


def vpstore(*arguments: str, code: int = 0, root: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vpstore", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout


def figure(slug: str) -> float:
    report = json.loads((ROOT / f"reports/tiny/reports-{slug}/metrics.json").read_text())
    return float(report["bits_per_byte"])


def test_the_moe_is_a_directory_that_stock_safetensors_opens() -> None:
    view = Path(vpstore("resolve", "vpMoE").strip())
    config = parse_student_config(json.loads((view / "config.json").read_text()))
    index = json.loads((view / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = expected_tensors(config)
    assert set(index) == set(wanted)
    for shard in sorted(set(index.values())):
        with safe_open(view / shard, framework="pt") as opened:  # type: ignore[no-untyped-call]
            for name in opened.keys():  # noqa: SIM118 - a handle is not a mapping
                assert tuple(opened.get_slice(name).get_shape()) == tuple(wanted[name][1])


def test_the_digests_lead_back_to_the_donor() -> None:
    seen, waiting = set(), ["vpMoE@smoke"]
    while waiting:
        ref = waiting.pop()
        if ref not in seen:
            seen.add(ref)
            waiting += [row["ref"] for row in json.loads(vpstore("show", ref, "--json"))["inputs"]]
    assert {"qwen3-0_6B@main", "gpt-oss-20b@main", "healing_text@main", "o200k-harmony@main"} <= seen
    assert len(seen) == 14


def test_bits_per_byte_along_the_chain() -> None:
    bits = {slug: figure(slug) for slug in CHECKPOINTS}
    assert bits["qwen3-0_6B-main"] < 1.65
    assert bits["vpDense0-5_28-compat-heal"] < bits["vpDense0-5_28-convert"] - 0.05  # healing regains something
    assert bits["vpDense0-5_28-real-heal"] < bits["vpDense0-5_28-real-morph"]
    assert bits["vpDense-expand"] == bits["vpDense0-5_28-real-heal"]  # bit-equal logits
    assert bits["vpMoE-upcycle"] == bits["vpDense-wake-up"]


def test_everything_is_whole_and_one_changed_byte_is_named(tmp_path: Path) -> None:
    """On a copy of what one artifact needs, so that the store itself stays as it is."""
    assert json.loads(vpstore("verify", "vpMoE", "--json"))["ok"]
    view = Path(vpstore("resolve", "vpMoE").strip())
    manifest = json.loads((view / "artifact.json").read_text())
    copy_artifact(manifest, tmp_path / "store")
    shard = next(row for row in manifest["files"] if row["path"] == "model-layer-003.safetensors")
    blob = tmp_path / "store/blobs/blake3" / shard["digest"][7:9] / shard["digest"][9:]
    before = blob.stat()
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[-5] ^= 1
    blob.write_bytes(data)
    blob.chmod(0o444)
    os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = _verify_in(tmp_path / "store")
    assert not found["ok"]
    assert [f["blob"] for f in found["faults"] if f["tensor"]] == [shard["digest"]]
    assert all(f["tensor"].startswith("model.layers.2.") for f in found["faults"] if f["tensor"])


def copy_artifact(manifest: Any, target: Path) -> None:
    """A store that holds one artifact."""
    rows = json.loads(POINTER.with_suffix(".artifact").read_text())["artifacts"]
    pointer, store = rows[-1], ROOT / ".vpstore"
    rows = [*manifest["files"], *manifest["intermediates"], *manifest["build"]["recipe"]["files"]]
    digests = {row["digest"] for row in rows} | {row["tensors"] for row in manifest["files"] if row["tensors"]}
    places = [f"blobs/blake3/{d[7:9]}/{d[9:]}" for d in digests | {pointer["artifact"]}]
    for place in ["format", "attestations", "keys", *places]:
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (store / place).is_dir() else shutil.copy2
        copy(store / place, target / place)


def _verify_in(store: Path) -> Any:
    environment = {**os.environ, "VPSTORE_ROOT": str(store)}
    done = subprocess.run(
        [sys.executable, "-m", "vpstore", "verify", "vpMoE", "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    return json.loads(done.stdout)


def test_the_examples_of_the_readme_load_what_was_built() -> None:
    examples = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    said = [
        subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for text in examples
    ]
    assert said == ["torch.bfloat16 (32, 64)\n", "BF16 (32, 64) 4096\nbfloat16 torch.bfloat16\n"]


def test_transformers_loads_the_donor_stages_and_not_the_student() -> None:
    import transformers

    for ref in ("qwen3-0_6B", "qwen3-0_6B-o200k"):
        model = transformers.AutoModelForCausalLM.from_pretrained(resolve(ref, checkout=ROOT))
        assert type(model).__name__ == "Qwen3ForCausalLM"
    with pytest.raises(ValueError, match="does not recognize this architecture"):
        transformers.AutoConfig.from_pretrained(vpstore("resolve", "vpDense0-5_28.compat").strip())
