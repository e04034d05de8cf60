"""The trials that `make faults` does to DVC and to vpstore: vpstore finds each, serves none and mends what it can."""

from __future__ import annotations

from pathlib import Path

import pytest
from dvc_scenarios import TRIALS, count_durable
from strace_faults import STRACE


@pytest.mark.slow
@pytest.mark.parametrize("what", TRIALS)
def test_vpstore_finds_what_is_done_to_it(tmp_path: Path, what: str) -> None:
    if "killed" in what and STRACE is None:
        pytest.skip("needs strace")
    theirs, ours = TRIALS[what]
    mine = ours(tmp_path / "vpstore", 1)
    assert (mine.found, mine.served) == (True, False)
    assert mine.mended is not False
    other = theirs(tmp_path / "dvc", 1)
    if "killed" not in what:  # DVC finds it less, serves it more, or cannot mend it: else the trial says nothing
        assert (not other.found) or other.served or other.mended is False


@pytest.mark.slow
@pytest.mark.skipif(STRACE is None, reason="needs strace")
def test_every_blob_is_durable_before_it_has_a_name(tmp_path: Path) -> None:
    _, (durable, every) = count_durable(tmp_path)
    assert durable == every > 0
