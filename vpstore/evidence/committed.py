"""Committed: what git's HEAD has of the files that an audit believes: the lock, where it lies, and the trusted keys.

Place in the path: audit holds the working tree against it (evidence.anchors), doctor says whether it can be had.
Invariants: nothing of the working tree is believed that HEAD has as well; that there is nothing (no repository, never
committed) is told from git being absent, refusing or giving what cannot be read, which is never taken for nothing; git
only reads objects here, which runs no hook, filter or pager of the checkout.

Example:
    committed = read_committed(checkout); committed.lock, committed.fault
"""

from __future__ import annotations

import os
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from vpstore.checkout import Checkout, CheckoutConfig
from vpstore.errors import UsageError, VpstoreError
from vpstore.repository import git_environment, is_in_repository
from vpstore.schema.lockfile import Lockfile

CONFIG_FILE: Final = "pyproject.toml"
_TIMEOUT: Final = 30  # seconds
_NOT_SUCH: Final = 1  # what `rev-parse --verify --quiet` exits with


@dataclass(frozen=True)
class Committed:
    """What HEAD has, or why that is not known."""

    is_repository: bool = True
    commit: str = ""  # HEAD's; "" if it has none, or that is not known
    fault: VpstoreError | None = None  # git is absent, refused, or gave what cannot be read: all else is then unknown
    config: CheckoutConfig | None = None  # None: HEAD has no [tool.vpstore]
    lock: Lockfile | None = None  # None: HEAD has none
    keys: Mapping[str, bytes] = field(default_factory=dict)  # the files of trusted keys by name, without `.pem`

    @property
    def is_known(self) -> bool:
        """Whether there is a HEAD, perhaps an empty one, that could be read."""
        return self.is_repository and self.fault is None


def read_committed(checkout: Checkout) -> Committed:
    """Ask git for HEAD's lock and keys; its own pyproject.toml says where they lie, or the one here if it has none."""
    if not is_in_repository(checkout.root):
        return Committed(is_repository=False)
    try:
        head = _head(checkout.root)
        if head is None:
            return Committed()
        config = _config(head)
        where = config or checkout.config
        return Committed(commit=head.commit, config=config, lock=_lock(head, where.lock), keys=_keys(head, where))
    except VpstoreError as error:
        return Committed(fault=error)


class _Head(NamedTuple):
    root: Path  # of the checkout, which may be a folder of the repository
    commit: str


def _config(head: _Head) -> CheckoutConfig | None:
    data = _files(head, CONFIG_FILE).get(CONFIG_FILE)
    if data is None:
        return None
    where = f"{CONFIG_FILE} in git's HEAD"
    try:
        tool = tomllib.loads(data.decode()).get("tool", {})
    except (ValueError, RecursionError) as error:
        raise _unreadable(where, str(error)[:200]) from error
    table = tool.get("vpstore") if isinstance(tool, dict) else None
    try:
        return None if table is None else CheckoutConfig.parse(table, where=f"{where}: tool.vpstore")
    except UsageError as error:
        raise _unreadable(where, f"{error.what}: {error.found or error.expected}") from error


def _lock(head: _Head, name: str) -> Lockfile | None:
    data = _files(head, name).get(name)
    try:
        return None if data is None else Lockfile.decode(data, where=f"{name} in git's HEAD")
    except VpstoreError as error:
        raise _unreadable(f"{name} in git's HEAD", f"{error.what}: {error.found}".removesuffix(": ")) from error


def _keys(head: _Head, config: CheckoutConfig) -> dict[str, bytes]:
    if config.trusted_keys is None:
        return {}
    found = _files(head, f"{config.trusted_keys}/", suffix=".pem")
    return {PurePosixPath(path).stem: data for path, data in found.items()}


def _unreadable(where: str, found: str) -> UsageError:
    return UsageError(
        "what git's HEAD has cannot be read", where=where, found=f"{where}: {found}", next_step="correct it, and commit"
    )


def _files(head: _Head, path: str, *, suffix: str = "") -> dict[str, bytes]:
    """The bytes of a file that HEAD has, or of the files of a folder (`path` ends in a slash) with this suffix.

    Raises:  UsageError: git cannot say.
    """
    found = {}
    for row in _git(head.root, "ls-tree", "-z", head.commit, "--", f"./{path}").split(b"\0")[:-1]:
        about, _, name = row.partition(b"\t")
        kind, oid = about.decode().split()[1:]
        if (text := os.fsdecode(name)).endswith(suffix) and (kind == "blob" or not path.endswith("/")):
            found[text] = _git(head.root, "cat-file", "blob", oid)
    return found


def _head(root: Path) -> _Head | None:
    """HEAD's commit; None: its branch has none yet.

    Raises:  UsageError: git cannot say, also of a damaged branch.
    """
    if found := _git(root, "rev-parse", "--verify", "--quiet", "HEAD", none=_NOT_SUCH):
        return _Head(root, found.decode().strip())
    # Of a branch whose file holds no digest `rev-parse` says the same as of one that has no commit yet; this warns.
    _git(root, "for-each-ref", is_silent=True)
    return None


def _git(root: Path, *arguments: str, none: int | None = None, is_silent: bool = False) -> bytes:
    """What git prints.

    Args:    none: the exit code that means that there is no such thing; is_silent: a warning is a failure, too.
    Raises:  UsageError: it is not installed, refused or failed.
    """
    # A replacement of an object is this clone's own, and nothing that was committed.
    command = ["git", "--no-replace-objects", "--literal-pathspecs", "-C", str(root), *arguments]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, timeout=_TIMEOUT, env={**git_environment(), "LC_ALL": "C"}
        )
    except FileNotFoundError:
        raise _refusal(root, "it is not installed", "install git") from None
    except OSError as error:
        raise _refusal(root, str(error.strerror), "give this user access to git") from error
    except subprocess.TimeoutExpired as error:
        raise _refusal(root, f"no answer in {_TIMEOUT} seconds", f"git -C {root} status") from error
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode == none and not said:
        return b""
    if done.returncode != 0 or (is_silent and said):
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        first = (lines or [f"exit code {done.returncode}"])[0].removeprefix("fatal: ").removeprefix("warning: ")
        remedy = next((line for line in lines if line.startswith("git config")), f"git -C {root} status shows more")
        raise _refusal(root, first, remedy)
    return done.stdout


def _refusal(root: Path, found: str, next_step: str) -> UsageError:
    return UsageError("git does not say what is committed", where=str(root), found=f"git: {found}", next_step=next_step)
