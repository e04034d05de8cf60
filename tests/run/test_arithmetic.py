"""One arithmetic: what the machine, its threads and its environment say must not decide a bit."""

from __future__ import annotations

import ast
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.ops.roots import binary_log, square_root

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden/arithmetic.json"  # torch's version -> the table, from two makes of processor
SETTLED_ELSEWHERE = {"sqrt", "sqrt_", "log2", "log2_", "log10", "_foreach_sqrt"}  # by recipes/ops/roots.py
PLAIN = {"math", "np"}  # modules that work on single numbers, or by the processor's own instruction


def table(code: str = "", **environment: str) -> dict[str, str]:
    """The fingerprint as another process has it, under other settings."""
    program = f"import json; from recipes import arithmetic, runtime; {code}"
    program += "\nprint(json.dumps(arithmetic.fingerprint(threads=2)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env={**os.environ, **environment}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="bits are promised among x86-64 processors")
def test_this_processor_computes_as_those_that_made_the_golden_table() -> None:
    known = json.loads(GOLDEN.read_text())
    version = torch.__version__.partition("+")[0]
    if version not in known:
        pytest.skip(f"the table was made with torch {sorted(known)}, not {version}")
    assert (
        table(OMP_NUM_THREADS="3", MKL_NUM_THREADS="5", MKL_CBWR="AVX512", ATEN_CPU_CAPABILITY="default")
        == known[version]
    )


@pytest.mark.slow
def test_the_table_sees_another_arithmetic() -> None:
    """Negative control: other kernels, or another number of threads, and it differs."""
    other = "runtime.environment = lambda threads, was=runtime.environment: was(threads) | {'MKL_CBWR': 'AUTO'}"
    one, two = table(), table(other)
    assert one["all"] != two["all"]
    assert one["matmul float32"] != two["matmul float32"]
    assert one["relu float32"] == two["relu float32"]


@given(st.lists(st.floats(0, 2.0**126, width=32, allow_subnormal=False), min_size=1, max_size=40))
def test_roots_are_right_to_a_unit_of_the_last_place(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    wanted = np.sqrt(x.numpy())
    assert np.all(np.abs(square_root(x).numpy() - wanted) <= np.spacing(wanted))


def test_roots_and_logarithms_at_the_ends() -> None:
    x = torch.tensor([0.0, 1.0, 4.0, float("inf")])
    assert square_root(x).tolist() == [0.0, 1.0, 2.0, float("inf")]
    assert square_root(torch.tensor(-1.0)).isnan()
    powers = torch.tensor([2.0**-40, 0.5, 1.0, 8.0, 2.0**30], dtype=torch.float64)
    assert torch.allclose(
        binary_log(powers), torch.tensor([-40, -1, 0, 3, 30], dtype=torch.float64), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.py")), ids=lambda path: path.name)
def test_no_recipe_asks_the_vector_library(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SETTLED_ELSEWHERE:
            owner = node.func.value
            is_plain = isinstance(owner, ast.Name) and owner.id in PLAIN
            assert is_plain, f"{path.name}:{node.lineno} calls {node.func.attr}: use recipes.ops.roots"
