"""docs/FAULTS.md shows the counts of the last full run, and every scenario is among them."""

from __future__ import annotations

import json
import re

import pytest
from fault_registry import SCENARIOS, Row, Scenario

from benchmarks import fault_matrix

PAGE = fault_matrix.PAGE.read_text(encoding="utf-8")
LINE = re.compile(r"\| (?P<what>[^|]+) \| (?P<tried>\d+) \| (?P<wrong>\d+) \| (?P<note>[^|]*)\|")


def shown(title: str) -> list[re.Match[str]]:
    """The lines of one table."""
    share = r"(?: \(about one case in \d+\))?"
    section = re.split(rf"^### {re.escape(title)}{share}\n", PAGE, flags=re.MULTILINE)[-1].partition("\n###")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| what ")]
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return [match for match in found if match]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_every_scenario_has_a_table_without_a_wrong(scenario: Scenario) -> None:
    rows = shown(scenario.title)
    assert len(rows) > 1
    assert rows[-1]["what"] == "**all**"
    assert int(rows[-1]["tried"]) == sum(int(row["tried"]) for row in rows[:-1]) > 0
    assert [row["what"] for row in rows if row["wrong"] != "0"] == []


def test_the_page_shows_what_the_last_run_wrote() -> None:
    document = json.loads(fault_matrix.RESULTS.read_text(encoding="utf-8"))
    assert fault_matrix.counts(document) in PAGE


def test_a_wrong_count_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import fault_registry

    def rows(folder: object, share: int) -> list[Row]:
        return [Row("good", 3, 0), Row("bad", 3, 1, "", ("this went wrong",))]

    monkeypatch.setattr(fault_registry, "SCENARIOS", (Scenario("mine", "Mine", "", rows),))  # type: ignore[arg-type]
    assert fault_matrix.main(["mine", "--share", "2"]) == 1
    assert "this went wrong" in capsys.readouterr().out
