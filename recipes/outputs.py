"""What lies beside an artifact's shards: a plan's files and the report, written into the scratch folder.

Place in the path: execute, recompute -> **here**. It moves bytes; what they are, recipes say.

Example:
    made = write_files(scratch / "files", report_files(report))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.recipe import PlannedFile, Report, json_file
from vpstore.errors import RecipeRefused


def write_files(folder: Path, files: Sequence[PlannedFile]) -> dict[str, tuple[str, Path]]:
    """Write files beside the shards."""
    made: dict[str, tuple[str, Path]] = {}
    for planned in files:
        path = folder / planned.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            planned.write(out)
        made[planned.name] = (planned.media_type, path)
    return made


def report_files(report: Report) -> list[PlannedFile]:
    """metrics.json, always, and one file a plot, under reports/.

    Raises:  RecipeRefused: a figure that JSON cannot say, or a gate twice.
    """
    refuse_twice([gate.name for gate in report.gates])
    gates = {
        gate.name: {
            "value": gate.value,
            "relation": gate.relation,
            "threshold": gate.threshold,
            "verdict": gate.verdict,
            **({"reason": gate.reason} if gate.reason else {}),
        }
        for gate in report.gates
    }
    metrics = {**report.metrics, **({"gates": gates} if gates else {})}
    values = {"metrics": metrics, **{name: list(rows) for name, rows in sorted(report.plots.items())}}
    refuse_twice(["metrics", *report.plots])
    return [_report_file(f"reports/{name}.json", value) for name, value in values.items()]


def _report_file(name: str, value: Any) -> PlannedFile:
    try:
        return json_file(name, value)
    except (TypeError, ValueError) as error:
        raise RecipeRefused(
            "a recipe reports a figure that JSON cannot say",
            where=name,
            expected="finite numbers and strings",
            found=str(error),
            next_step="look for NaN or infinity in what the recipe measured; nothing was published",
        ) from error


def refuse_twice(names: Sequence[str]) -> None:
    """Hold that no name comes twice.

    Raises:  RecipeRefused: the one that does.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise RecipeRefused("a recipe yields a name twice", where=name, next_step="mend the recipe's plan")
        seen.add(name)
