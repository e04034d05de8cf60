"""Run the fault matrix and write its counts: `python -m benchmarks.fault_matrix`, which `make faults` calls.

Every scenario of tests/faults/fault_registry.py is run; the counts go to benchmarks/results/faults.json and, as tables,
into docs/FAULTS.md between its markers. Exit code 1 if anything was wrong.

Example:
    python -m benchmarks.fault_matrix                      # everything: about half an hour
    python -m benchmarks.fault_matrix --share 20           # about a twentieth of the cases; writes only with --write
    python -m benchmarks.fault_matrix disk damage          # some scenarios; the others' tables stay
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "FAULTS.md"
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
BEGIN, END = "<!-- counts: written by make faults -->", "<!-- end of counts -->"
MEMORY = "/dev/shm"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write."""
    sys.path[:0] = [str(ROOT / "tests" / "faults"), str(ROOT / "tests" / "store")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from fault_registry import SCENARIOS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help=", ".join(row.name for row in SCENARIOS))
    parser.add_argument("--share", type=int, default=1, help="about one of so many cases")
    parser.add_argument("--write", action="store_true", help="write the counts of a share, too; the table says so")
    given = parser.parse_args(arguments)
    unknown = set(given.names) - {row.name for row in SCENARIOS}
    if unknown:
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"schema": 1, "scenarios": {}}
    for scenario in SCENARIOS:
        if not given.names or scenario.name in given.names:
            document["scenarios"][scenario.name] = _run(scenario, given.share)
    document["machine"] = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if given.share == 1 or given.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        write_page(document)
    ran = [row for name, row in document["scenarios"].items() if not given.names or name in given.names]
    return int(any(row["wrong"] for table in ran for row in table["rows"]))


def _run(scenario: Any, share: int) -> dict[str, Any]:
    print(f"\n{scenario.title}", flush=True)
    began = time.monotonic()
    rows = []
    with tempfile.TemporaryDirectory(
        dir=MEMORY if os.access(MEMORY, os.W_OK) else None, prefix="vpstore-faults-"
    ) as place:
        for row in scenario.rows(Path(place) / scenario.name, share):
            rows.append({"what": row.what, "tried": row.tried, "wrong": row.wrong, "note": row.note})
            print(f"  {row.tried:>7} tried {row.wrong:>4} wrong  {row.what}  {row.note}", flush=True)
            for example in row.examples:
                print(f"          {example}", flush=True)
    seconds = round(time.monotonic() - began)
    print(f"  {sum(row['tried'] for row in rows)} cases in {seconds} s")
    title = scenario.title if share == 1 else f"{scenario.title} (about one case in {share})"
    return {"title": title, "note": scenario.note, "rows": rows, "seconds": seconds}


def table(scenario: dict[str, Any]) -> str:
    """One scenario as the page shows it."""
    lines = [f"### {scenario['title']}", "", f"| what | tried | wrong | {scenario['note']} |", "|---|---:|---:|---|"]
    lines += [f"| {row['what']} | {row['tried']} | {row['wrong']} | {row['note']} |" for row in scenario["rows"]]
    tried, wrong = (sum(row[part] for row in scenario["rows"]) for part in ("tried", "wrong"))
    return "\n".join([*lines, f"| **all** | {tried} | {wrong} | |"])


def counts(document: dict[str, Any]) -> str:
    """Every table, in the order of the matrix."""
    from fault_registry import SCENARIOS

    found = document["scenarios"]
    return "\n\n".join(table(found[row.name]) for row in SCENARIOS if row.name in found)


def write_page(document: dict[str, Any]) -> None:
    """Put the tables between the markers of the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{counts(document)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
