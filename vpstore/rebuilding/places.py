"""Places in a laid-out tree, told as places in the checkout: where a person corrects what failed.

Place in the path: errors of the process that runs a recipe -> **here** -> a person. A recipe's files are imported
without comments and blank lines, so their lines have other numbers there.
Invariants: text without such places stays as it is.

Example:
    in_checkout('File "/…/tree/recipes/heal.py", line 9, in run', job)  # 'File "/…/recipes/heal.py", line 17, in run'
"""

from __future__ import annotations

import re
from typing import Final

from vpstore.rebuilding.worker import Job

_FRAME: Final = re.compile(r'(File ")([^"\n]+)(", line )([0-9]+)')
_PLACE: Final = re.compile(r"([\w./-]+\.py):([0-9]+)")


def in_checkout(text: str, job: Job) -> str:
    """A message of the process, with every place in the tree as one in the checkout."""
    top = f"{job.tree}/"

    def frame(found: re.Match[str]) -> str:
        before, path, between, line = found.groups()
        name = path.removeprefix(top)
        return f"{before}{job.root / name if name != path else path}{between}{_line(job, name, line)}"

    def place(found: re.Match[str]) -> str:
        name = found[1].removeprefix(top)
        return f"{name}:{_line(job, name, found[2])}"

    return _PLACE.sub(place, _FRAME.sub(frame, text))


def _line(job: Job, name: str, line: str) -> str:
    origins = job.lines.get(name, ())
    return str(origins[int(line) - 1]) if 0 < int(line) <= len(origins) else line
