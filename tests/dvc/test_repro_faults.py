"""Failures and tampering under DVC: nothing wrong is taken for right, and `dvc repro` or a build mends it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from press_project import Press


def other_pointer(press: Press) -> str:
    """A sound pointer of pages@final to another artifact of that stage; afterwards all is as it was."""
    press.edit("configs/pages.toml", 'title = "Page: "', 'title = "Other: "')
    press.run("vpstore", "build", "pages")
    other = press.pointer("pages-final").read_text()
    press.edit("configs/pages.toml", 'title = "Other: "', 'title = "Page: "')
    press.run("vpstore", "build", "pages")
    return other


@pytest.mark.slow
def test_a_stage_that_fails_midway_leaves_the_old_pointer(press: Press) -> None:
    """A missed gate in the middle of the chain: what is above is built, it and what is below stay as they were."""
    before, text = press.pointers(), press.text("pages")
    press.edit("configs/words.toml", "repeat = 2", "repeat = 12")
    done = press.run("dvc", "repro", code=None)
    assert "failed to run: vpstore build pages@final, exited with 20" in done.stderr
    assert "the page is too long" in done.stderr
    assert "<= 200" in done.stderr
    after = press.pointers()
    assert {slug for slug in before if after[slug] != before[slug]} == {"words-main", "pages-draft"}
    report = "reports/tiny/pages-final/metrics.json"
    assert report not in press.run("git", "status", "--porcelain").stdout  # the report still is the old artifact's
    found = press.run("vpstore", "resolve", "pages")
    assert "input parent" in found.stderr  # the old artifact, said to be stale
    assert press.text("pages") == text
    press.edit("configs/profiles/tiny.toml", "longest = 200", "longest = 400")
    assert press.repro() == ["pages-final", "reports"]
    assert press.text("pages").count("rapid") == 12


@pytest.mark.slow
def test_a_crash_in_a_recipe_is_the_same(press: Press) -> None:
    before = press.pointers()
    press.edit("press/pages.py", "longest = prepared", "longest = 1 / 0 or prepared")
    done = press.run("dvc", "repro", code=None)
    assert "failed to run: vpstore build pages@draft, exited with 1" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert press.pointers() == before
    press.edit("press/pages.py", "longest = 1 / 0 or prepared", "longest = prepared")
    assert press.repro() == []  # as nothing was touched, nothing is to be done


def test_a_source_that_is_not_the_pinned_one_is_refused(press: Press) -> None:
    """Sources are no deps of DVC: the digest is held against the provenance when the recipe has to run."""
    (press.root / "assets" / "letters.txt").write_text("a quick brown cat\n")
    press.edit("press/letters.py", "def make", "unused = 1\n\n\ndef make")
    before = press.pointers()
    done = press.run("dvc", "repro", code=None)
    assert "failed to run: vpstore build letters@main, exited with 20" in done.stderr
    assert "letters.txt" in done.stderr
    assert press.pointers() == before


@pytest.mark.slow
def test_ctrl_c_in_the_middle(press: Press) -> None:
    before = press.pointers()
    press.edit("configs/pages.toml", 'title = "Page: "\nseconds = 0', 'title = "Slow: "\nseconds = 60')
    process = subprocess.Popen(
        ["dvc", "repro"],
        cwd=press.root,
        env=press.variables(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while not list((press.root / ".vpstore" / "work").glob("*/begun.txt")):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "interrupted; nothing was published" in said
    assert press.pointers() == before
    press.edit("configs/pages.toml", "seconds = 60", "seconds = 0")
    assert press.repro() == ["pages-final", "reports"]
    assert press.text("pages").startswith("Slow: ")


@pytest.mark.slow
def test_a_build_beside_a_repro_of_the_same_stage(press: Press) -> None:
    """DVC knows nothing of the other build; the store's lock lets one of them run the recipe."""
    press.edit("configs/pages.toml", 'title = "Page: "\nseconds = 0', 'title = "Twice: "\nseconds = 2')
    commands = (["dvc", "repro"], ["vpstore", "build", "pages"])
    running = [subprocess.Popen(c, cwd=press.root, env=press.variables(), stdout=subprocess.PIPE) for c in commands]
    outputs = [process.communicate(timeout=60)[0].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert press.ran().count("press.pages") == 1
    assert sum("built in" in line for out in outputs for line in out.splitlines() if "pages@final" in line) == 1
    assert press.repro() == []


@pytest.mark.slow
def test_pointers_edited_by_hand_are_refused_and_mended(press: Press) -> None:
    before = press.pointers()
    lost = {"format": 1, "object": "stamps", "stage": "main", "artifact": "blake3:" + "0" * 64}
    lost["key"] = before["stamps-main"]["key"]
    edits = {
        "pages@draft": (14, press.pointer("words-main").read_text()),  # sound, but of another stage
        "letters@main": (14, "{}\n"),
        "words@main": (14, press.pointer("words-main").read_text()[:50]),
        "stamps@main": (12, json.dumps(lost)),
    }
    for ref, (code, text) in edits.items():
        press.pointer(ref.replace("@", "-")).write_text(text)
        refused = press.run("vpstore", "resolve", ref, code=code)
        assert refused.stdout == ""
        assert f"vpstore build {ref}" in refused.stderr
    press.run("vpstore", "build", "pages@final", code=14)  # its parent's pointer is not believed
    assert press.repro() == ["letters-main", "words-main", "stamps-main", "pages-draft"]  # below them nothing changed
    assert press.ran() == []
    assert press.pointers() == before


def test_a_pointer_to_another_artifact_of_the_stage_is_said_to_be_stale(press: Press) -> None:
    before, other = press.pointers(), other_pointer(press)
    press.run("vpstore", "lock")
    press.pointer("pages-final").write_text(other)
    found = press.run("vpstore", "resolve", "pages")  # sound, though not what the working tree would build
    assert "params: title" in found.stderr
    assert (Path(found.stdout.strip()) / "text.txt").read_text().startswith("Other: ")
    assert press.run("vpstore", "resolve", "pages", "--locked", code=15).stdout == ""
    assert press.repro() == ["pages-final"]
    assert press.pointers() == before
    press.run("vpstore", "resolve", "pages", "--locked")


def test_a_pointer_forged_together_with_dvc_lock(press: Press) -> None:
    """`dvc commit` makes DVC believe any pointer; vpstore does not, and a build puts it right."""
    before, other = press.pointers(), other_pointer(press)
    press.pointer("pages-final").write_text(other)
    forged = {"format": 1, "object": "pages", "stage": "final", "artifact": press.artifact("pages-final")}
    press.pointer("pages-final").write_text(json.dumps({**forged, "key": before["pages-final"]["key"]}))
    press.run("dvc", "commit", "-f")
    assert press.repro() == []
    assert "was not built under" in press.run("vpstore", "resolve", "pages", code=14).stderr
    faults = press.json("vpstore", "verify", "pages", code=3)["faults"]
    assert [(fault["where"], fault["found"]) for fault in faults] == [
        ("pages@final: pointer", before["pages-final"]["key"])  # not the key that the artifact was built under
    ]
    press.run("vpstore", "build", "--all")
    assert press.pointers() == before
    press.pointer("pages-final").write_text(press.pointer("words-main").read_text())
    press.run("dvc", "commit", "-f")
    press.run("vpstore", "resolve", "pages", code=14)
    press.run("vpstore", "build", "reports@pages-final", code=14)  # nothing is built from it either


@pytest.mark.slow
def test_a_view_deleted_or_edited_is_made_again(press: Press) -> None:
    text = press.text("pages@draft")
    view = Path(press.run("vpstore", "resolve", "pages@draft").stdout.strip())
    shutil.rmtree(view)
    assert press.repro() == []  # views are not DVC's
    assert press.text("pages@draft") == text
    (view / "text.txt").unlink()
    (view / "text.txt").write_text("something else")
    faults = press.json("vpstore", "verify", "pages@draft", code=3)["faults"]
    assert [fault["where"].rpartition("/")[2] for fault in faults] == ["text.txt"]
    press.edit("configs/pages.toml", 'title = "Page: "', 'title = "New: "')
    done = press.run("dvc", "repro")  # the edited view is a parent's: the child is not made from it
    assert "kept as" in done.stderr  # what somebody wrote is set aside, not lost
    assert press.text("pages") == "New: " + text
    assert press.text("pages@draft") == text
    press.run("vpstore", "verify", "--all")


@pytest.mark.slow
def test_an_edited_report_is_put_right(press: Press) -> None:
    (press.root / "reports" / "tiny" / "reports-pages-final" / "metrics.json").write_text('{"vowels": 99}\n')
    assert press.repro() == ["reports"]
    assert press.ran() == []
    assert press.run("git", "status", "--porcelain").stdout == ""
