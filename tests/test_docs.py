"""The documents say what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest

from tools.refresh_docs import mapping, pages, refreshed
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


LOCK = json.loads((ROOT / "vpstore.lock").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_digests_beside_a_locked_name_are_the_locks(page: Path) -> None:
    """After `vpstore lock`, tools/refresh_docs.py puts the new ones there."""
    agreed = {ref: entry for entries in LOCK["profiles"].values() for ref, entry in entries.items()}
    wrong = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        refs = [ref for ref in re.findall(r"[\w-]+@[A-Za-z][\w-]*?(?=-[0-9a-f]{12}\b|[^\w-]|$)", line) if ref in agreed]
        known = {digest.removeprefix("blake3:")[:12] for ref in refs for digest in agreed[ref].values()}
        found = {digits[:12] for digits in re.findall(r"(?<![0-9a-f])[0-9a-f]{12}(?:[0-9a-f]{52})?(?![0-9a-f])", line)}
        if refs and found - known:
            wrong.append(f"{page.name}:{number}: {', '.join(sorted(found - known))}")
    assert wrong == []


def test_digests_are_moved_from_an_old_lock_to_a_new_one() -> None:
    def lock(**digits: str) -> dict[str, Any]:
        return {"profiles": {"tiny": {"plant@main": {name: f"blake3:{digit * 64}" for name, digit in digits.items()}}}}

    digits = mapping(lock(artifact="a", key="b", code="c"), lock(artifact="d", key="e", code="c"))
    text = f"plant@main-{'a' * 12} blake3:{'b' * 64} {'c' * 12} {'f' * 12} {'a' * 13}"
    assert refreshed(text, digits) == f"plant@main-{'d' * 12} blake3:{'e' * 64} {'c' * 12} {'f' * 12} {'a' * 13}"


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
