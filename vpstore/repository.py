"""What git says of a checkout, asked with care, running nothing that it configures; and where its modules lie.

Place in the path: a checkout asks whose a symbolic link is; attestations and audits use the same environment.

Example:
    has_link(checkout.root, "weights")
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

PROJECT: Final = "pyproject.toml"  # what every checkout has at its root
SOURCES: Final = "src/"  # a checkout may have its packages here
_TIMEOUT: Final = 30  # seconds
# Inside a hook or an alias, git says by these which repository it is about; the question here is about the checkout.
_ELSEWHERE: Final = frozenset({
    "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_COMMON_DIR", "GIT_DIR", "GIT_GRAFT_FILE", "GIT_IMPLICIT_WORK_TREE",
    "GIT_INDEX_FILE", "GIT_NAMESPACE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX", "GIT_REPLACE_REF_BASE", "GIT_SHALLOW_FILE",
    "GIT_WORK_TREE",
})  # fmt: skip

# What a repository's configuration could have git run for a question; the last word has the environment.
_OFF: Final = {
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.pager": "cat",
    "core.sshCommand": "false",
    "protocol.allow": "never",
}
# A partial clone fetches what is missing, by a program that its configuration names.
_NOTHING_FETCHED: Final = {
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_ALLOW_PROTOCOL": "none",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
}


def module_places(root: Path) -> tuple[Path, Path]:
    """Where the modules of a checkout lie: at its root, or below src/, which need not be there."""
    return root, root / SOURCES


def git_environment() -> dict[str, str]:
    """The environment in which git looks for the repository by the folder that it is told alone.

    A repository's own configuration may name programs; a question about it starts none of them, and fetches nothing.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    given = kept.get("GIT_CONFIG_COUNT", "")
    first = int(given) if given.isdecimal() else 0  # what this person says of every repository stays
    said = {"GIT_CONFIG_COUNT": str(first + len(_OFF))}
    for number, (name, value) in enumerate(_OFF.items(), start=first):
        said |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    return {**kept, **said, **_NOTHING_FETCHED}


def is_in_repository(root: Path) -> bool:
    """Whether git would look for a repository: without asking git, whose no may have other reasons."""
    real = root.resolve()
    return any(os.path.lexists(folder / ".git") for folder in (real, *real.parents))


def has_link(root: Path, path: str) -> bool | None:
    """Whether git tracks a symbolic link at a path below `root`, so that a clone has it; None if git cannot say.

    A repository around the project that tracks nothing of it cannot: the project came there in another way.
    """
    listed = _git(root, "ls-files", "--stage", "-z", "--", path, PROJECT)
    if listed is None:
        return None
    rows = [row.partition(b"\t") for row in listed.split(b"\0")]
    is_tracked = any(name == PROJECT.encode() for _, _, name in rows)
    if not is_tracked and _git(root, "rev-parse", "--show-prefix") != b"\n":
        return None
    return any(mode.startswith(b"120000 ") for mode, _, name in rows if name != PROJECT.encode())


def _git(root: Path, *arguments: str) -> bytes | None:
    """What a command of git says about the repository of a folder; None if it fails."""
    command = ["git", "--literal-pathspecs", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, check=False, capture_output=True, timeout=_TIMEOUT, env=git_environment())
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
