"""docs/OWN_PROJECT.md: its files and commands, taken out of the page and run as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from press_project import REPOSITORY, Press
from safetensors.numpy import load_file

PAGE = (REPOSITORY / "docs" / "OWN_PROJECT.md").read_text(encoding="utf-8")
FILES = re.findall(r"^`([\w./]+)`[^\n]*(?:\n[^`\n][^\n]*)*\n\n```\w*\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [block.splitlines() for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.slow
def test_the_page_is_a_project_that_builds(tmp_path: Path) -> None:
    press = Press(tmp_path / "garden", tmp_path / "home")
    press.root.mkdir()
    press.home.mkdir()
    files = dict(FILES)
    assert len(files) == len(FILES) == section("The files").count("\n```\n\n") + 1  # every block is one file
    later = files.pop("garden/bind.py")
    for path, text in files.items():
        (press.root / path).parent.mkdir(parents=True, exist_ok=True)
        (press.root / path).write_text(text)
    first, second = COMMANDS
    for line in first:
        command = line.removeprefix("$ ").split()
        done = press.run(*command, code=None if command[1] == "doctor" else 0)
        assert "Traceback" not in done.stderr
    seed, plant = (
        load_file(Path(press.json("vpstore", "resolve", ref)["path"]) / "model.safetensors")
        for ref in ("seed", "plant")
    )
    assert (plant["body"] == seed["body"] * 3).all()
    assert press.json("vpstore", "build", "plant")["builds"][0]["cached"]

    objects = press.root / "configs/objects.toml"
    [added] = re.findall(r"^```toml\n(.*?)^```$", section("A new object"), re.MULTILINE | re.DOTALL)
    objects.write_text(objects.read_text() + "\n" + added)
    (press.root / "garden/bind.py").write_text(later)
    for line in second:
        press.run(*line.removeprefix("$ ").split())
    shown = press.json("vpstore", "show", "bouquet", "--tensors")["tensors"]
    assert [row["name"] for row in shown] == ["left.body", "right.body"]
    assert json.loads((press.root / "reports/small/bouquet-main/metrics.json").read_text()) == {"bodies": 2}
    assert press.repro() == []
    press.edit("configs/plant.toml", "3.0", "5.0")
    assert press.repro() == ["plant-grown", "bouquet-main"]
    assert "factor" in press.run("vpstore", "why", "plant", "--lock").stdout
