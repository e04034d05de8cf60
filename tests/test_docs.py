"""The documents say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from vpstore.cli.exit_codes import table
from vpstore.cli.group import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    import vpstore.cli  # noqa: F401 - declares the commands

    return sorted(cli.list_commands(click.Context(cli)))


@pytest.mark.parametrize("name", commands())
def test_every_command_is_in_the_readme(name: str) -> None:
    assert f"`vpstore {name}" in README


def test_no_command_of_the_readme_is_invented() -> None:
    assert set(re.findall(r"(?:`|\$ )vpstore ([a-z]+)", README)) <= set(commands())


def test_help_has_the_groups_of_the_readme() -> None:
    from vpstore.cli.overview import GROUPS

    found: dict[str, list[str]] = {}
    for line in README.partition("\n## Commands\n")[2].partition("\n## ")[0].splitlines():
        if match := re.match(r"\| \*\*([a-z ]+)\*\*", line):
            found[match[1]] = []
        elif match := re.match(r"\| `vpstore ([a-z]+)", line):
            found[list(found)[-1]].append(match[1])
    assert found == {title: list(group) for title, group in GROUPS.items()}


def test_exit_codes_in_the_design_are_the_classes() -> None:
    assert table() in (ROOT / "docs/DESIGN.md").read_text(encoding="utf-8")


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
