"""What git says of a checkout, asked with care: about this folder's repository, and running nothing that it configures.

Place in the path: a checkout asks whose a symbolic link is; attestations and audits use the same environment.

Example:
    has_link(checkout.root, "weights")
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

_TIMEOUT: Final = 30  # seconds
# Inside a hook or an alias, git says by these which repository it is about; the question here is about the checkout.
_ELSEWHERE: Final = frozenset({
    "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_COMMON_DIR", "GIT_DIR", "GIT_GRAFT_FILE", "GIT_IMPLICIT_WORK_TREE",
    "GIT_INDEX_FILE", "GIT_NAMESPACE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX", "GIT_REPLACE_REF_BASE", "GIT_SHALLOW_FILE",
    "GIT_WORK_TREE",
})  # fmt: skip


def git_environment() -> dict[str, str]:
    """The environment in which git looks for the repository by the folder that it is told alone."""
    return {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}


def has_link(root: Path, path: str) -> bool | None:
    """Whether git tracks a symbolic link at a path below `root`, so that a clone has it; None if git cannot say."""
    command = ["git", "--literal-pathspecs", "-c", "core.fsmonitor=false", "-C", str(root)]
    try:
        done = subprocess.run(
            [*command, "ls-files", "--stage", "-z", "--", path],
            check=False, capture_output=True, timeout=_TIMEOUT, env=git_environment(),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode != 0:
        return None
    return any(row.startswith(b"120000 ") for row in done.stdout.split(b"\0"))
