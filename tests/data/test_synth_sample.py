from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from recipes.data.conversation import Exchange
from recipes.data.synth import COLUMNS, exchange_of, has_control_text
from recipes.data.synth_exercises import KINDS
from recipes.data.synth_sample import provenance, sample_bytes, sample_row
from recipes.data.synth_templates import LANGUAGES, TEMPLATES, WEEKDAYS, YES_NO

ROWS = 500
UNITS = {"km m": 1000, "m cm": 100, "kg g": 1000, "h min": 60, "min s": 60, "l ml": 1000, "t kg": 1000}


@pytest.fixture(scope="module")
def rows(assets: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (assets / "synth_sample.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_asset_is_what_the_generator_gives(assets: Path) -> None:
    data = (assets / "synth_sample.jsonl").read_bytes()
    assert data == sample_bytes(ROWS)
    assert len(data) < 600_000
    stated = json.loads((assets.parent / "configs/upcycle/provenance/synth_sample.json").read_text(encoding="utf-8"))
    assert stated == provenance(data)


def test_schema_ids_and_languages(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == ROWS
    assert all(tuple(row) == COLUMNS for row in rows)
    assert len({row["synth_id"] for row in rows}) == ROWS
    languages = Counter(row["language"] for row in rows)
    assert set(languages) == set(LANGUAGES)
    assert min(languages.values()) >= 20
    assert set(Counter(row["exercise"] for row in rows).values()) <= {41, 42}
    assert all(exchange_of(row, drops=Counter()) is not None for row in rows)
    assert all(row["words"] == len(f"{row['synthetic_reasoning']} {row['synthetic_answer']}".split()) for row in rows)


def test_every_equation_in_a_reasoning_is_true(rows: list[dict[str, Any]]) -> None:
    checked = 0
    for row in rows:
        for left, sign, right, result in re.findall(r"(\d+) ([+\-×]) (\d+) = (-?\d+)", row["synthetic_reasoning"]):
            a, b = int(left), int(right)
            assert int(result) == {"+": a + b, "-": a - b, "×": a * b}[sign], row
            checked += 1
    assert checked > 900


@pytest.mark.parametrize("kind", KINDS)
def test_every_statement_is_true_and_is_what_the_answer_says(rows: list[dict[str, Any]], kind: str) -> None:
    mine = [row for row in rows if row["exercise"] == kind]
    for row in mine:
        match = re.fullmatch(rf"{kind}\((.*)\) = (.*)", row["query_seed_text"])
        assert match, row
        arguments, stated = match[1].split(", "), match[2]
        result = _recomputed(kind, arguments)
        assert stated == result, row
        _check_answer(kind, row, result)
        if kind not in ("weekday", "units", "ordering"):
            assert all(argument in row["query"] for argument in arguments), row


def _recomputed(kind: str, arguments: list[str]) -> str:
    if kind in ("addition", "subtraction", "multiplication", "division", "divisibility"):
        a, b = map(int, arguments)
        found = {
            "addition": str(a + b),
            "subtraction": str(a - b),
            "multiplication": str(a * b),
            "division": f"{a // b}, {a % b}",
            "divisibility": "no" if a % b else "yes",
        }
        return found[kind]
    if kind == "copying":
        return ", ".join(arguments)
    if kind == "date":
        return str(datetime.date.fromisoformat(arguments[0]) + datetime.timedelta(days=int(arguments[1])))
    if kind == "weekday":
        return str((int(arguments[0]) + int(arguments[1])) % 7)
    if kind == "units":
        return str(int(arguments[0]) * UNITS[f"{arguments[1]} {arguments[2]}"])
    if kind == "ordering":
        (p, q), (second, r) = (argument.split(" > ") for argument in arguments)
        assert q == second
        assert len({p, q, r}) == 3
        return p
    numbers = list(map(int, arguments))
    if kind == "sorting":
        return ", ".join(map(str, sorted(numbers)))
    gaps = {after - before for before, after in zip(numbers, numbers[1:], strict=False)}
    assert len(gaps) == 1
    return str(numbers[-1] + gaps.pop())


def _check_answer(kind: str, row: dict[str, Any], result: str) -> None:
    answer, language = row["synthetic_answer"], row["language"]
    if kind == "weekday":
        assert answer == WEEKDAYS[language][int(result)]
    elif kind == "divisibility":
        assert answer == YES_NO[language][0 if result == "yes" else 1]
    elif kind == "division":
        assert re.findall(r"\d+", answer) == result.split(", ")
    else:
        assert result in answer


def test_every_template_has_every_language() -> None:
    assert set(TEMPLATES) == set(KINDS)
    assert all(set(templates) == set(LANGUAGES) for templates in TEMPLATES.values())


def test_rows_are_functions_of_their_number() -> None:
    assert sample_row(123) == sample_row(123)
    assert len({json.dumps(sample_row(number)) for number in range(600, 800)}) == 200


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": " "}, "empty_query"),
        ({"synthetic_reasoning": ""}, "empty_synthetic_reasoning"),
        ({"synthetic_answer": "\n"}, "empty_synthetic_answer"),
        ({"query": "\udc00"}, "surrogate"),
        ({"synth_id": "\udc00"}, "surrogate"),
        ({"synthetic_answer": "a\0"}, "nul"),
        ({"query": "a" + " " * 100_000 + "b"}, "long_blanks"),
    ],
)
def test_rows_that_are_dropped_are_counted(change: dict[str, str], reason: str) -> None:
    drops: Counter[str] = Counter()
    assert exchange_of({**sample_row(0), **change}, drops=drops) is None
    assert drops == {reason: 1}


def test_columns_that_are_not_used_are_not_judged() -> None:
    assert exchange_of({**sample_row(0), "constraints": "\udc00", "script": "\0"}, drops=Counter()) is not None


@pytest.mark.parametrize(
    ("text", "spells"),
    [
        ("<|start|>", True),
        ("x<|reserved_200500|>y", True),
        ("<|endofprompt|>", True),
        ("<|start", False),
        ("<| start |>", False),
        ("<|reserved_999999|>", False),
        ("a < b | c > d", False),
    ],
)
def test_a_text_that_spells_a_control_token_is_noticed(text: str, spells: bool) -> None:
    for name in ("user", "analysis", "final"):
        exchange = Exchange(**{"user": "u", "analysis": "a", "final": "f", name: text})
        assert has_control_text(exchange) == spells
