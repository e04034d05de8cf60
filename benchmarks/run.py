"""Run every measure on this machine, write the results, and put the table into docs/MEASURES.md.

Use: python -m benchmarks.run [--quick] [--only NAME] [--rounds N] [--output FILE] [--no-table] [--folder DIR]
Both sides of every ratio are measured in turns in this one run; the figures are medians. Run it on a quiet machine: the
page cache and the cores decide.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from benchmarks import measures
from benchmarks.measures import Figure, Sizes
from benchmarks.projects import REPOSITORY, Place

MEASURES: Final[dict[str, Callable[[Place, Sizes], Iterator[Figure]]]] = {
    "ingest": measures.ingest,
    "verify": measures.verify_and_resolve,
    "sharing": measures.sharing,
    "graph": measures.graph,
    "memory": measures.memory,
}
RESULTS: Final = REPOSITORY / "benchmarks" / "results"
PAGE: Final = REPOSITORY / "docs" / "MEASURES.md"
BEGIN: Final = "<!-- measures: begin, written by python -m benchmarks.run -->"
END: Final = "<!-- measures: end -->"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / (1 << 30), 1),
        "kernel": platform.release(),
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "b3sum": _version("b3sum"),
        **{name: metadata.version(name) for name in ("blake3", "dvc", "vpstore")},
        "on": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _version(program: str) -> str | None:
    try:
        return subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def table(figures: list[Figure], facts: dict[str, Any], sizes: Sizes) -> str:
    """The part of the page that is written by the machine."""
    lines = [
        f"Measured {facts['on']} on {facts['cores']} cores of {facts['cpu']}, {facts['memory_gib']} GiB, Linux "
        f"{facts['kernel']}, Python {facts['python']}, DVC {facts['dvc']}, blake3 {facts['blake3']}, "
        f"{facts['b3sum'] or 'no b3sum'}; medians of {sizes.rounds} rounds, both sides in turns; load before "
        f"{facts['load_before'][0]}.",
        "",
        "| measure | figure | aim | | sides (median s) |",
        "|---|---|---|---|---|",
    ]
    for row in figures:
        mark = {True: "met", False: "MISSED", None: ""}[row.is_met]
        sides = ", ".join(f"{name} {side['median_s']:.3f}" for name, side in row.sides.items())
        unit = "" if row.unit == "x" else f" {row.unit}"
        lines.append(f"| {row.name} | {row.value:g}{unit} | {row.aim + unit if row.aim else ''} | {mark} | {sides} |")
    return "\n".join(lines) + "\n"


def rewrite(page: Path, text: str) -> None:
    """Put the table between its marks."""
    before, mark, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"{page} lacks the marks {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def main() -> int:
    """Measure, write, and say whether every aim was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: shows that it works")
    parser.add_argument("--only", action="append", choices=MEASURES, help="one measure; may be given several times")
    parser.add_argument("--rounds", type=int, help="instead of 5")
    parser.add_argument("--output", type=Path, help="instead of benchmarks/results/latest.json")
    parser.add_argument("--no-table", action="store_true", help="leave docs/MEASURES.md as it is")
    parser.add_argument("--folder", type=Path, help="where the temporary files go: on the disk that is to be measured")
    given = parser.parse_args()
    sizes = Sizes.quick() if given.quick else Sizes.full()
    if given.rounds:
        sizes = dataclasses.replace(sizes, rounds=given.rounds)
    facts, figures = machine(), []
    with tempfile.TemporaryDirectory(prefix="vpstore-bench-", dir=given.folder) as folder:
        place = Place(Path(folder).resolve())
        for name in given.only or MEASURES:
            for row in MEASURES[name](place, sizes):
                figures.append(row)
                mark = {True: "met   ", False: "MISSED", None: "      "}[row.is_met]
                print(f"{mark} {row.name}: {row.value:g} {row.unit} {f'({row.aim})' if row.aim else ''}", flush=True)
    document = {
        "schema": 1, "machine": facts, "sizes": dataclasses.asdict(sizes),
        "figures": [dataclasses.asdict(row) for row in figures],
    }  # fmt: skip
    output = given.output or RESULTS / "latest.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if not given.no_table and not given.quick and not given.only:
        rewrite(PAGE, table(figures, facts, sizes))
    return 0 if given.quick or all(row.is_met is not False for row in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
