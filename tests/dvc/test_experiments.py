"""DVC's experiments over vpstore: bytes go into the one store, and what is applied is what is resolved."""

from __future__ import annotations

import pytest
from press_files import LETTERS
from press_project import Press

THREE = "configs/words.toml:main.repeat=3"
BELOW_WORDS = ["words-main", "pages-draft", "pages-final", "reports"]


def artifacts(press: Press) -> int:
    """How many artifacts the store has."""
    return len(list((press.root / ".vpstore" / "attestations").iterdir()))


@pytest.mark.slow
def test_an_experiment_in_a_copy_keeps_its_bytes_and_apply_is_noticed(press: Press) -> None:
    before, text, count = press.pointers(), press.text("pages"), artifacts(press)
    press.run("dvc", "exp", "run", "--temp", "-n", "three", "-S", THREE)
    assert press.pointers() == before  # the workspace is untouched
    assert press.run("git", "status", "--porcelain").stdout == ""
    assert press.text("pages") == text
    assert artifacts(press) == count + 5
    assert press.ran() == ["press.words", "press.pages", "press.pages", "press.judge", "press.judge"]

    press.run("dvc", "exp", "apply", "three")
    assert "repeat = 3" in (press.root / "configs" / "words.toml").read_text()
    assert press.pointers() == before  # pointers are not DVC's to install ...
    assert (
        "params: repeat" in press.run("vpstore", "resolve", "words").stderr
    )  # ... so the old ones are said to be stale
    assert press.repro() == BELOW_WORDS
    assert press.ran() == []  # the experiment's bytes, out of the store
    assert press.text("pages") == text + LETTERS.replace("quick", "rapid")
    press.run("vpstore", "verify", "--all")


@pytest.mark.slow
def test_apply_after_the_store_was_lost_builds_again(press: Press) -> None:
    """dvc.lock of the experiment names pointers whose bytes are nowhere; what is applied is built again."""
    press.run("dvc", "exp", "run", "--temp", "-n", "three", "-S", THREE)
    press.run("rm", "-rf", ".vpstore")
    press.run("dvc", "exp", "apply", "three")
    press.ran()
    press.run("vpstore", "build", "letters")
    assert press.repro() == BELOW_WORDS
    assert "press.pages" in press.ran()
    assert press.text("pages").count("rapid") == 3


@pytest.mark.slow
def test_an_experiment_that_fails_leaves_everything(press: Press) -> None:
    before, text = press.pointers(), press.text("pages")
    done = press.run("dvc", "exp", "run", "--temp", "-S", "configs/words.toml:main.repeat=12", code=None)
    assert "exited with 20" in done.stdout + done.stderr
    assert press.pointers() == before
    assert press.text("pages") == text
    assert press.run("git", "status", "--porcelain").stdout == ""


@pytest.mark.slow
def test_an_experiment_in_the_workspace_and_back(press: Press) -> None:
    before = press.pointers()
    press.run("dvc", "exp", "run", "-n", "three", "-S", THREE)
    assert press.text("pages").count("rapid") == 3
    press.run("git", "checkout", "-q", "--", ".")  # params, dvc.lock and reports of HEAD; pointers of the experiment
    assert press.pointers() != before
    assert "params: repeat" in press.run("vpstore", "resolve", "words").stderr
    press.ran()
    assert press.repro() == BELOW_WORDS
    assert press.ran() == []
    assert press.pointers() == before


@pytest.mark.slow
def test_a_queue_of_experiments_shares_the_store(press: Press) -> None:
    before = press.pointers()
    press.run("dvc", "exp", "run", "--queue", "-n", "four", "-S", "configs/words.toml:main.repeat=4")
    press.run("dvc", "exp", "run", "--queue", "-n", "five", "-S", "configs/words.toml:main.repeat=5")
    press.run("dvc", "exp", "run", "--run-all")
    assert press.pointers() == before
    for name, count in (("four", 4), ("five", 5)):
        press.ran()
        press.run("git", "checkout", "-q", "--", ".")
        press.run("dvc", "exp", "apply", name)
        press.repro()
        assert press.ran() == []
        assert press.text("pages").count("rapid") == count
