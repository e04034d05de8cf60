"""Numerics, fixed before torch is imported: what a machine may decide about a sum is decided here instead.

Place in the path: below every recipe; part of every recipe's code closure.

Tried with torch 2.13 on x86-64, Intel and AMD: with all of these, and `ops.roots` for square roots, sums, solves,
eigen- and singular values and training steps are equal whatever the make of the processor and the machine's thread
settings. MKL's faster branches (`AVX2,STRICT`) are equal only among Intel's own: docs/decisions/0011-one-arithmetic.md.

Example:
    >>> fix_numerics(threads=2)  # first thing in the process, then import torch
"""

from __future__ import annotations

import os
import sys

from vpstore.errors import UsageError, VpstoreError

DEVICE_VARIABLE = "VPSTORE_DEVICE"

_done_with: list[int] = []


def environment(threads: int) -> dict[str, str]:
    """The environment variables that the numeric libraries read once, at their own start."""
    return {
        "MKL_CBWR": "COMPATIBLE",  # the one branch that every make of processor takes alike
        "MKL_DYNAMIC": "FALSE",
        "MKL_NUM_THREADS": str(threads),
        "OMP_DYNAMIC": "FALSE",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # decides no bits; spinning threads starve each other on a busy machine
        "OPENBLAS_NUM_THREADS": str(threads),
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
    }


def device() -> str:
    """`cpu`, or `cuda` where VPSTORE_DEVICE asks for it: chosen, not detected, so a GPU changes no digest unasked.

    Raises:  UsageError: another word.
    """
    found = os.environ.get(DEVICE_VARIABLE, "cpu")
    if found not in ("cpu", "cuda"):
        raise UsageError("not a device", where=DEVICE_VARIABLE, expected="cpu or cuda", found=found)
    return found


def gpus() -> int:
    """How many GPUs a run uses: all that are here if it was asked to run on them, else none.

    Raises:  UsageError: as for `device`.
    """
    if device() == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def fix_numerics(threads: int) -> None:
    """Set the environment, import torch, ask for deterministic algorithms and the intra-op thread count.

    Args:    threads: intra-op threads, a parameter of the profile because it decides the order of sums.
    Raises:  VpstoreError: torch was imported before, under other settings.
    """
    if _done_with == [threads]:
        return
    wanted = environment(threads)
    if "torch" in sys.modules and any(os.environ.get(name) != value for name, value in wanted.items()):
        raise VpstoreError(
            "torch was imported before its numerics were fixed",
            where="recipes/runtime.py",
            expected="fix_numerics() first, then import torch",
            found=f"torch in memory, threads fixed as {_done_with or 'never'}",
            next_step="build stages with different runtime.threads in separate processes",
        )
    os.environ.update(wanted)
    import torch

    torch.use_deterministic_algorithms(True)
    # Filling fresh memory costs a tenth of the time and would only hide a read of memory that nothing wrote.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - the stubs do not know it
    torch.set_num_threads(threads)
    _done_with[:] = [threads]
