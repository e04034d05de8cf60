"""What surrounds a build and may differ between equal ones: time, commit, versions.

Place in the path: only attestations see it; nothing here enters a key or a manifest.

Example:
    watch = Stopwatch(); ...; facts = watch.facts(root, environment)
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import vpstore
from vpstore.repository import git_environment, is_in_repository
from vpstore.schema.attestation import BuildFacts

UNKNOWN: Final = "unknown"  # a commit that git does not tell
_NO_COMMIT: Final = ("unknown revision", "Needed a single revision")  # of a branch that has none yet


class Stopwatch:
    """Runs from its creation until `facts`."""

    def __init__(self) -> None:
        self._started = time.time()
        self._began = time.monotonic()

    def facts(self, root: Path, environment: Mapping[str, str]) -> BuildFacts:
        """What is known about the run that ends now.

        Args:    root: of the checkout, for its commit; environment: what the runner says decides a cache hit.
        """
        finished = time.time()
        return BuildFacts(
            started_on=_rfc3339(self._started),
            finished_on=_rfc3339(finished),
            finished_unix=int(finished),
            duration_seconds=round(time.monotonic() - self._began, 3),
            environment=dict(environment),
            git=git_state(root),
            builder_version={"vpstore": vpstore.__version__, "python": platform.python_version()},
            machine=machine(),
        )


def machine() -> dict[str, str]:
    """The model of the CPU and how many cores there are: what may explain that two builds differ. No name of a host."""
    return {"cpu": _cpu_model(), "cores": str(os.cpu_count() or 0)}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((model for model in models if model), platform.processor() or platform.machine())


def git_state(root: Path) -> dict[str, Any]:
    """The commit of a checkout and whether tracked files differ from it.

    Returns: both None without a repository or a commit; the commit `unknown` if there is one that git does not tell, as
             of a repository that belongs to somebody else.
    """
    try:
        commit = _git(root, "rev-parse", "HEAD")
        status = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or ""
        is_there = is_in_repository(root) and not any(text in said for text in _NO_COMMIT)
        return {"commit": UNKNOWN if is_there else None, "dirty": None}
    return {"commit": commit, "dirty": bool(status)}


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        check=True, capture_output=True, text=True, timeout=30, env={**git_environment(), "LC_ALL": "C"},
    )  # fmt: skip
    return done.stdout.strip()


def _rfc3339(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
