"""Reports: an artifact's files under `reports/` put where DVC and git see them.

Place in the path: after the view, before the pointer; on a build and on a cache hit alike.
Invariants: an equal file is not touched; a file of the folder that the artifact does not have is removed, so the folder
always shows one artifact.

Example:
    restore_reports(work, manifest)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from vpstore.schema.manifest import Manifest
from vpstore.schema.objects import Summary
from vpstore.schema.ref import StageRef
from vpstore.storage import atomic
from vpstore.workspace import Workspace

PREFIX: Final = "reports/"


def restore_reports(work: Workspace, manifest: Manifest) -> int:
    """Make `reports/<profile>/<object>-<stage>/` show what the artifact reports.

    Returns: how many files were written.
    """
    folder = work.checkout.reports_of(manifest.ref)
    rows = {row.path.removeprefix(PREFIX): row for row in manifest.files if row.path.startswith(PREFIX)}
    written = 0
    with atomic.disk_errors(folder, "writing reports"):
        for name, row in rows.items():
            data = work.store.blobs.read(row.digest, what=f"{manifest.ref}, {row.path}")
            written += atomic.write_if_different(folder / name, data)
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.is_file() and path.relative_to(folder).as_posix() not in rows and path.name != ".gitignore":
                atomic.remove(path)
    return written


def summary_value(work: Workspace, ref: StageRef, summary: Summary) -> Any:
    """The figure for one stage out of another object's report, or None if there is no such report or key.

    The object `summary.source` reports about `X@Y` in its own stage `X-Y`.
    """
    path = work.checkout.reports_of(StageRef(summary.source, ref.slug)) / summary.file
    value = _read(path)
    for part in summary.key.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value if isinstance(value, (int, float, str)) else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
