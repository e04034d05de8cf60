"""gc: the function that deletes.

Place in the path: calls the verb; the command line is a skin over it.

Example:
    vpstore.api.gc(vpstore.api.Terms(is_dry_run=True)).goes_bytes
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from vpstore.collecting.judging import Collection, Terms
from vpstore.errors import UsageError
from vpstore.verbs.gc import collect
from vpstore.workspace import Workspace

__all__ = ["Collection", "Terms", "duration", "gc"]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def gc(terms: Terms | None = None, *, forget: Iterable[Path] = (), work: Workspace | None = None) -> Collection:
    """Delete what no checkout and no process needs.

    Args:    terms: grace period and the rest; forget: checkouts that are gone for good.
    Returns: everything in the store, whether it stays or goes, and why.
    Raises:  NoStore; BadManifest: damage hides what is needed, nothing was deleted; UsageError: a checkout to forget is
             there, or is not known.
    """
    return collect(work or Workspace.find(Path.cwd()), terms or Terms(), forget=forget)


def duration(text: str) -> float:
    """Read a grace period: `0`, `90s`, `30m`, `12h`, `1d`, `2w`, also `1.5d`.

    Returns: seconds.
    Raises:  UsageError.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])", text.strip() if text.strip() != "0" else "0s")
    if match is None:
        raise UsageError(
            "not a duration",
            where="--grace",
            expected="a number and s, m, h, d or w, such as 12h",
            found=text,
            next_step="--grace 1d is the default",
        )
    return float(match[1]) * _UNITS[match[2]]
