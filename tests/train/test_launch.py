"""Ranks that a build starts: their result, their refusals word for word, and their deaths."""

from __future__ import annotations

import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recipes import runtime
from recipes.job import Job
from recipes.launch import on_ranks
from recipes.recipe import Progress
from recipes.train.ranks import Ranks, ranks_here
from recipes.train.state import Identity, TrainingState, save_state
from vpstore.errors import RecipeRefused, VpstoreError

# Each starts two processes that import torch.
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a build, which fixes them before torch is imported; the ranks inherit the environment."""
    for name, value in runtime.environment(1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime, "_done_with", [1])


def work(job: Job, progress: Progress) -> dict[str, Any]:
    """What each rank does; `job.params` says what goes wrong."""
    ranks = ranks_here()
    progress("steps", 1, 2)
    wrong = job.params.get("wrong")
    ranks.require_same("the key", str(ranks.rank if wrong == "disagrees" else 0))
    if wrong == "refuses" and ranks.rank == 1:
        raise RecipeRefused("this rank cannot", where="rank 1", next_step="do something")
    if wrong == "dies" and ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if wrong == "is stopped" and ranks.rank == 0:
        os.kill(os.getppid(), signal.SIGTERM)  # as a scheduler does, to the process that it started
    if wrong == "is stopped":
        time.sleep(60)
    if wrong == "fills the disk":
        save(job.scratch / "states", 1, numbers=10, ranks=ranks)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        save(job.scratch / "states", 2, numbers=100_000, ranks=ranks)
    ranks.wait()
    return {"rank": ranks.rank, "world": ranks.world, "group": dist.get_backend()}


def save(folder: Path, step: int, *, numbers: int, ranks: Ranks) -> None:
    """A state whose one weight is every rank's."""
    save_state(folder, TrainingState(step, {"a": torch.zeros(numbers)}, {}, {}, {}), Identity({}, {}), ranks=ranks)


def job(tmp_path: Path, **params: Any) -> Job:
    return Job("recipes.heal", params, 1, {}, {}, tmp_path)


def test_every_rank_works_and_the_first_ones_result_counts(tmp_path: Path) -> None:
    assert on_ranks(work, job(tmp_path), 2, lambda *_: None) == {"rank": 0, "world": 2, "group": "gloo"}
    assert not (tmp_path / "ranks").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("disagrees", "do not agree"),
        ("refuses", "this rank cannot"),
        ("dies", "rank of a training died"),
        ("is stopped", "ended from outside"),
        ("fills the disk", "state cannot be written"),
    ],
)
def test_what_goes_wrong_in_a_rank_is_what_the_build_says(tmp_path: Path, wrong: str, said: str) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(VpstoreError, match=said) as raised:
        on_ranks(work, replace(job(tmp_path), params={"wrong": wrong}), 2, lambda *_: None)
    if wrong == "dies":
        assert "rank 1" in str(raised.value)
        assert "signal 9" in str(raised.value)
    assert signal.getsignal(signal.SIGTERM) == handler
    kept = ["state-00000001"] if wrong == "fills the disk" else []
    assert [path.name for path in tmp_path.glob("states/*")] == kept
