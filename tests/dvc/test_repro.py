"""`dvc repro` over vpstore: exactly what changed is made again, and an old key is found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from press_files import LETTERS
from press_project import Press

STAGES = ["letters-main", "words-main", "stamps-main", "pages-draft", "pages-final", "reports"]
RECIPES = ["press.letters", "press.words", "press.stamps", "press.pages", "press.pages", "press.judge", "press.judge"]
BELOW_WORDS = ["words-main", "pages-draft", "pages-final", "reports"]


def test_a_fresh_clone_builds_everything_and_a_second_run_nothing(template: Press, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    clone = Press(tmp_path / "clone", tmp_path / "home")
    clone.root.mkdir()
    clone.run("git", "clone", "-q", str(template.root), ".")
    assert clone.repro() == STAGES
    assert clone.ran() == RECIPES
    assert clone.pointers() == template.pointers()  # the same digests in another place
    assert clone.text("pages") == "Page: Draft: " + LETTERS.replace("quick", "rapid") * 2
    assert clone.run("git", "status", "--porcelain").stdout == ""  # dvc.lock and the reports too
    again = clone.installed("dvc", "repro")  # the command itself, and no fork of one that has loaded it
    assert (again.returncode, "Running stage" in again.stdout) == (0, False), again.stderr
    assert "up to date" in again.stdout
    assert clone.ran() == []


def commented(text: str) -> str:
    """A module with all that its normal form leaves out, and with the line ends of another system."""
    text = '"""What this makes."""\n\n# why\n' + text.replace("):\n", "):  # how\n    'what'\n\n", 1)
    return text.replace("\n", "\r\n")


def test_what_decides_no_byte_builds_nothing_here_and_gives_the_locks_contents_elsewhere(
    press: Press, tmp_path: Path
) -> None:
    press.run("vpstore", "lock")
    press.commit("lock")
    before, keys = press.pointers(), press.json("vpstore", "build", "--all", "--dry-run")
    for path in (press.root / "press").glob("*.py"):
        path.write_bytes(commented(path.read_text()).encode())
    for path in (*press.root.glob("configs/*.toml"), *press.root.glob("configs/profiles/*.toml")):
        path.write_text("# why\n\n" + path.read_text().replace(" = ", "  =  ") + "# that is all\n")
    assert press.json("vpstore", "build", "--all", "--dry-run") == keys
    assert press.repro() == STAGES  # DVC cannot know; the build cache does
    assert press.ran() == []
    assert press.repro() == []
    assert press.pointers() == before
    press.run("vpstore", "lock", "--check")
    press.run("git", "config", "core.autocrlf", "false")
    press.commit("comments")
    (tmp_path / "other" / "home").mkdir(parents=True)
    clone = Press(tmp_path / "other" / "clone", tmp_path / "other" / "home")
    clone.root.mkdir()
    clone.run("git", "clone", "-q", str(press.root), ".")
    assert clone.repro() == STAGES
    assert clone.ran() == RECIPES
    seen = ("key", "content")
    assert [[row[name] for name in seen] for row in clone.pointers().values()] == [
        [row[name] for name in seen] for row in before.values()
    ]
    assert clone.artifact("words-main") != press.artifact("words-main")  # which covers every byte of the recipe
    clone.run("vpstore", "lock", "--check")
    for ref in ("letters", "words", "stamps", "pages@draft", "pages"):
        clone.run("vpstore", "resolve", ref, "--locked")
    assert clone.run("vpstore", "audit", "pages", "--locked").returncode == 0
    assert clone.run("git", "status", "--porcelain").stdout == ""


@pytest.mark.parametrize(
    ("path", "ran", "rerun"),
    [
        ("press/spelling.py", ["press.words"], ["words-main", "pages-draft"]),
        ("press/judge.py", ["press.judge", "press.judge"], ["reports"]),
        pytest.param("press/binding.py", RECIPES, STAGES, marks=pytest.mark.slow),
    ],
)
def test_other_code_of_equal_result_is_built_and_nothing_behind_it(
    press: Press, path: str, ran: list[str], rerun: list[str]
) -> None:
    """A stage behind it is asked once, as the key of its parent is another, and finds its own key known."""
    before = press.pointers()
    file = press.root / path
    file.write_text(file.read_text() + "\n\nunused = 1\n")
    assert press.repro() == rerun
    assert press.ran() == ran
    assert press.repro() == []
    after = press.pointers()
    assert {slug: row["content"] for slug, row in after.items()} == {
        slug: row["content"] for slug, row in before.items()
    }
    assert len({slug for slug in before if after[slug]["key"] != before[slug]["key"]}) == len(ran)


@pytest.mark.slow
def test_a_moved_file_a_float_for_an_integer_and_another_environment(press: Press) -> None:
    (press.root / "press" / "spelling.py").rename(press.root / "press" / "writing.py")
    press.edit("press/words.py", "press.spelling", "press.writing")
    press.run("vpstore", "pipeline", "--write")
    press.repro()
    assert press.ran() == ["press.words"]
    before = press.pointers()
    press.edit("press/run.py", '"device": "cpu"', '"device": "another card"')
    press.run("vpstore", "build", "--all")
    assert press.ran() == RECIPES
    assert press.pointers() == before
    press.edit("configs/words.toml", "repeat = 2", "repeat = 2.0")  # which Python, and so DVC, takes for equal
    refused = press.run("dvc", "repro", code=None)
    assert "TypeError" in refused.stdout + refused.stderr


def test_a_param_changed_and_changed_back(press: Press) -> None:
    before, text = press.pointers(), press.text("pages")
    view = press.run("vpstore", "resolve", "pages").stdout
    press.edit("configs/words.toml", "repeat = 2", "repeat = 3")
    assert press.repro() == BELOW_WORDS
    assert press.ran() == ["press.words", "press.pages", "press.pages", "press.judge", "press.judge"]
    other = press.pointers()
    assert other["pages-final"]["content"] != before["pages-final"]["content"]
    assert other["stamps-main"] == before["stamps-main"]
    assert press.text("pages") == text + LETTERS.replace("quick", "rapid")
    press.edit("configs/words.toml", "repeat = 3", "repeat = 2")
    done = press.run("dvc", "repro").stdout
    assert [done.count(word) for word in ("Running stage", "cache hit", "built in")] == [4, 5, 0]
    assert press.ran() == []  # no recipe: the build cache
    assert press.pointers() == before
    assert press.run("vpstore", "resolve", "pages").stdout == view
    assert press.text("pages") == text
    assert press.run("git", "status", "--porcelain").stdout == ""  # the reports are the old ones again


@pytest.mark.slow
def test_another_profile_is_built_beside_the_first(press: Press) -> None:
    before = press.pointers()
    press.edit("params.yaml", "tiny", "large")
    assert press.repro() == STAGES
    assert press.ran() == ["press.pages"]  # only `longest` differs: the rest has the same keys
    assert press.pointers() == before
    press.edit("params.yaml", "large", "tiny")
    assert press.repro() == STAGES  # dvc.lock remembers one profile; vpstore's cache remembers both
    assert press.ran() == []
    assert press.pointers() == before


def test_a_store_deleted_under_present_pointers(press: Press) -> None:
    before, text = press.pointers(), press.text("pages")
    shutil.rmtree(press.root / ".vpstore")
    assert press.repro() == []  # DVC cannot see it
    assert "there is no store" in press.run("vpstore", "resolve", "pages", code=10).stderr
    rows = press.json("vpstore", "build", "--all")["builds"]
    assert press.ran() == RECIPES
    assert {row["ref"].replace("@", "-"): row["key"] for row in rows} == {
        slug: pointer["key"] for slug, pointer in before.items()
    }
    assert press.pointers() == before
    assert press.text("pages") == text  # the views show bytes again
    press.run("vpstore", "verify", "--all")
    assert press.repro() == []


@pytest.mark.slow
def test_metrics_and_plots(press: Press) -> None:
    figures = press.json("dvc", "metrics", "show")[""]["data"]
    assert len(figures) == 7
    assert figures["reports/tiny/reports-pages-final/metrics.json"]["data"] == {"length": 49, "vowels": 13}
    press.edit("press/judge.py", "len(line)", "2 * len(line)")
    press.edit("press/judge.py", "aeiou", "a")
    press.repro()
    difference = press.json("dvc", "metrics", "diff")["reports/tiny/reports-pages-final/metrics.json"]
    assert difference == {"vowels": {"old": 13, "new": 6, "diff": -7}}
    plot = "reports/tiny/reports-pages-final/lines.json"
    shown = press.json("dvc", "plots", "show")["data"][plot][0]
    assert [row["length"] for row in shown["content"]["data"]["values"]] == [60, 34]
    compared = press.json("dvc", "plots", "diff")["data"][plot][0]
    rows = compared["content"]["data"]["values"]
    assert {name: [row["length"] for row in rows if row["rev"] == name] for name in compared["revisions"]} == {
        "workspace": [60, 34],
        "HEAD": [30, 17],
    }


def test_what_dvc_records_is_what_a_build_has_written(press: Press) -> None:
    """dvc.lock names pointers and reports, never bytes of the store."""
    lock = (press.root / "dvc.lock").read_text()
    assert "weights/tiny/refs/pages-final.json" in lock
    assert ".vpstore" not in lock
    cache = press.root / ".dvc" / "cache"
    assert [file for file in cache.rglob("*") if file.is_file() and "runs" not in file.parts] == []
    assert json.loads(press.pointer("pages-final").read_text())["object"] == "pages"
