"""recipes/execute.py with the real recipe upcycle_moe: the bytes depend on no order, process, kill or resumption."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from execute_children import computed, finish, markers, shards, start, wait_until


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs, the plain build and two more of its kind."""
    root = tmp_path_factory.mktemp("execute")
    finish(start("baseline", root))
    return root


@pytest.fixture(scope="module")
def total(place: Path) -> int:
    """How many tensors the plan has."""
    names = [name for _, name in computed(place / "plain")]
    assert len(names) == len(set(names))
    return len(names) - 1  # one line is the intermediate's


def test_a_build_leaves_shards_index_files_and_report(place: Path, total: int) -> None:
    made = (place / "plain" / "made.json").read_text()
    assert total > 60
    for name in ("model-layer-004.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"):
        assert f'"{name}"' in made
    assert '"reports/metrics.json", "reports/router.json"' in made
    assert markers(place / "plain") == total


def test_the_order_of_tensors_decides_no_byte(place: Path) -> None:
    first, second = ([name for _, name in computed(place / scratch)] for scratch in ("plain", "mixed"))
    assert first != second
    assert sorted(first) == sorted(second)
    assert shards(place / "mixed") == shards(place / "plain")


@pytest.mark.slow
def test_two_processes_with_interleaved_shares_make_the_same_bytes(place: Path, total: int) -> None:
    assert set(shards(place / "shares")) == set(shards(place / "plain"))
    assert shards(place / "shares") != shards(place / "plain")
    for process in [start("share", place, number, 2) for number in (0, 1)]:
        finish(process)
    assert shards(place / "shares") == shards(place / "plain")
    assert len({pid for pid, _ in computed(place / "shares")[1:]}) == 2
    assert len(computed(place / "shares")) == 1 + total


@pytest.mark.slow
def test_a_killed_build_is_taken_up_where_it_was_by_two_processes(place: Path, total: int) -> None:
    scratch = place / "killed"
    process = start("build", place, "killed", OBSERVED_PAUSE="0.03")
    wait_until(lambda: markers(scratch) >= total // 2 or process.poll() is not None, "half of the tensors done")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before, done = computed(scratch), markers(scratch)
    assert total // 2 <= done < total
    assert len(before) - 1 in (done, done + 1)  # the intermediate's line; the last tensor may not be whole

    finish(start("build", place, "killed", VPSTORE_WORKERS="2"))
    after = computed(scratch)[len(before) :]
    again = [name for _, name in after]
    assert len({pid for pid, _ in after}) == 2
    assert len(again) == len(set(again)) == total - done
    assert not {name for _, name in before[:-1]} & set(again)  # the intermediate neither
    assert shards(scratch) == shards(place / "plain")
    for path in sorted((place / "plain" / "files").rglob("*.json")):
        assert (scratch / path.relative_to(place / "plain")).read_bytes() == path.read_bytes()
