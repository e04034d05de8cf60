"""doctor: is everything here that the other commands need, and what to do if not.

Place in the path: beside it; every check stands alone, none leaves anything changed.

Example:
    for check in examine(Path.cwd(), profile=None).checks: print(check.name, check.ok)
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vpstore.checkout import Checkout
from vpstore.errors import VpstoreError
from vpstore.evidence.committed import read_committed
from vpstore.preparation import prepare
from vpstore.runner import load_runner
from vpstore.storage.access import cure, is_of_group, shut_out
from vpstore.storage.leftovers import Clock, leftovers
from vpstore.storage.modes import owner_name
from vpstore.storage.stamps import cache_directory
from vpstore.storage.store import Store, locate
from vpstore.storage.trial import try_out
from vpstore.workspace import Workspace

_LOW_SPACE: Final = 2 << 30
_OLD: Final = 7 * 24 * 3600
_NAMES: Final = 3  # of what is missing


@dataclass(frozen=True)
class Check:
    """One question and its answer."""

    name: str
    ok: bool
    detail: str = ""
    next_step: str = ""


@dataclass
class Diagnosis:
    """All answers."""

    store: str | None = None
    checkout: str | None = None
    profile: str | None = None
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The document as `doctor --json` prints it."""
        return {
            "ok": self.ok,
            "store": self.store,
            "checkout": self.checkout,
            "profile": self.profile,
            "checks": [vars(check) for check in self.checks],
        }

    def ask(self, name: str, question: Callable[[], tuple[bool, str, str]]) -> bool:
        """Put one question; an error of ours is an answer."""
        try:
            ok, detail, next_step = question()
        except VpstoreError as error:
            found = ": ".join(part for part in (error.what, error.where, error.found) if part)
            ok, detail, next_step = False, found, error.next_step
        except OSError as error:
            ok, detail, next_step = False, str(error), "give this user access to the path"
        self.checks.append(Check(name, ok, detail, "" if ok else next_step or "see docs/DESIGN.md"))
        return ok


def examine(start: Path, *, profile: str | None) -> Diagnosis:
    """Ask everything that can be asked, as far as the answers allow."""
    found = Diagnosis()
    root = locate(start)
    found.store = str(root) if root is not None else None
    if found.ask("store", lambda: _store(start)) and root is not None:
        if found.ask("store is writable", lambda: _writable(root / "tmp")):
            found.ask("file system of the store", lambda: _able(root / "tmp"))
        found.ask("space", lambda: _space(root))
        found.ask("sharing", lambda: _sharing(root))
        found.ask("readable", lambda: _readable(root))
        found.ask("leftovers", lambda: _leftovers(Store.open(root)))
    elif root is not None and root.is_dir() and os.access(root, os.R_OK | os.X_OK):
        found.ask("sharing", lambda: _sharing(root))
        found.ask("readable", lambda: _readable(root))  # a part that somebody shut is why it cannot be opened
    found.ask("stat stamps", lambda: _stamps(cache_directory()))
    found.ask("git", lambda: _git(start, profile))
    if _has_dvc(start.absolute()):
        found.ask("command", _command)
    if not found.ask("checkout", lambda: (True, str(Checkout.find(start, profile=profile).root), "")):
        return found
    checkout = Checkout.find(start, profile=profile)
    found.checkout, found.profile = str(checkout.root), checkout.profile
    if os.access(checkout.root, os.W_OK | os.X_OK):
        found.ask("file system of the checkout", lambda: _able_below(checkout))
    found.ask("lock", lambda: (True, f"{len(checkout.lock().profiles)} profiles", ""))
    if found.ask("objects", lambda: (True, f"{len(checkout.objects.order)} stages", "")):
        _examine_project(found, checkout, is_asked=profile is not None)
    return found


def _examine_project(found: Diagnosis, checkout: Checkout, *, is_asked: bool) -> None:
    if not found.ask("runner", lambda: _runner(checkout)) or not found.checks[0].ok:
        return  # without a store there is nothing more to look at
    work = Workspace(checkout, Store.open(Path(str(found.store))))
    found.ask("recipes", lambda: _recipes(work))
    found.ask("pointers", lambda: _pointers(work))
    found.ask("lock entries", lambda: _agreed(work))
    if is_asked:  # a profile that is named is one that is about to be built
        found.ask("preflight", lambda: _preflight(found, work))


def _preflight(found: Diagnosis, work: Workspace) -> tuple[bool, str, str]:
    """What the project's runner has to say before its builds."""
    said = load_runner(work.checkout).preflight(work.checkout, work.store.root)
    found.checks += [Check(one.name, one.ok, one.detail, "" if one.ok else one.next_step) for one in said]
    return True, f"{len(said)} findings" if said else "the runner has none", ""


def _git(start: Path, profile: str | None) -> tuple[bool, str, str]:
    """Whether git says of this checkout what is committed."""
    if shutil.which("git") is None:
        return False, "", "install git: attestations name the commit, and audit compares with what was committed"
    try:
        checkout = Checkout.find(start, profile=profile)
    except VpstoreError:
        return True, "", ""  # the next question says what is wrong with the checkout
    committed = read_committed(checkout)
    if committed.fault is not None:
        raise committed.fault
    if not committed.is_repository:
        dvc = (
            "; dvc repro wants `git init`, or `dvc config --local core.no_scm true`" if _has_dvc(checkout.root) else ""
        )
        return True, f"the checkout is in no git repository: audit has no committed lock to compare with{dvc}", ""
    has = "HEAD has the lock" if committed.lock is not None else "HEAD has no lock: audit has none to compare with"
    return True, has, ""


def _has_dvc(root: Path) -> bool:
    return any((folder / ".dvc").is_dir() for folder in (root, *root.parents))


def _command() -> tuple[bool, str, str]:
    """Whether a shell finds this environment's `vpstore`, as the commands of dvc.yaml want it."""
    own = Path(sys.prefix, "bin")
    found = shutil.which("vpstore")
    if found is not None and (Path(found).parent.samefile(own) or not (own / "vpstore").exists()):
        return True, found, ""
    return False, f"a shell finds {found or 'none'}", f'PATH="{own}:$PATH" dvc repro, or activate the environment'


def _runner(checkout: Checkout) -> tuple[bool, str, str]:
    load_runner(checkout)
    return True, checkout.objects.runner, ""


def _store(start: Path) -> tuple[bool, str, str]:
    store = Store.find(start)
    return True, f"{store.root}, {(store.root / 'format').read_text().strip()}", ""


def _writable(folder: Path) -> tuple[bool, str, str]:
    return os.access(folder, os.W_OK | os.X_OK), str(folder), f"give this user write access to {folder}"


def _able(folder: Path) -> tuple[bool, str, str]:
    """Whether a file system does what will be asked of it: tried on a folder that is gone afterwards."""
    faults = try_out(folder)
    detail = "; ".join(faults) or "writes, renames, locks and makes durable"
    return (
        not faults,
        detail,
        "set VPSTORE_ROOT, or put the checkout, on a file system that can do it; some need a mount option",
    )


def _able_below(checkout: Checkout) -> tuple[bool, str, str]:
    """The same where views, pointers and their locks are made."""
    with checkout.opened(checkout.views if checkout.views.is_dir() else checkout.root) as place:
        return _able(place)


def _stamps(folder: Path) -> tuple[bool, str, str]:
    if folder.is_relative_to(os.devnull):
        detail = "this user has no home, so all that is used is read every time"
        return False, detail, "set HOME or XDG_CACHE_HOME to a folder that this user can write"
    return _writable(_nearest(folder))


def _nearest(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _space(root: Path) -> tuple[bool, str, str]:
    free = shutil.disk_usage(root).free
    return free > _LOW_SPACE, f"{free / (1 << 30):.1f} GiB free", "free space, or move the store with VPSTORE_ROOT"


def _sharing(root: Path) -> tuple[bool, str, str]:
    """Whether a store that belongs to a group is one for what this user adds to it, too."""
    if not is_of_group(root):
        return True, "one user writes to this store", ""
    if not root.stat().st_mode & stat.S_ISGID:
        return False, "the store's folder gives its group to nothing that is made in it", f"chmod g+s {root}"
    umask = os.umask(0o077)
    os.umask(umask)
    return not umask & 0o070, f"a group writes to this store; umask {umask:03o}", "umask 002, in the shell's profile"


def _readable(root: Path) -> tuple[bool, str, str]:
    """Whether this user can use all of the store: a file or folder may be of somebody with another umask."""
    shut = shut_out(root)
    if not shut:
        return True, "all that the store keeps", ""
    owners = ", ".join(sorted({owner_name(path.lstat().st_uid) for path in shut})[:_NAMES])
    detail = f"this user cannot use {len(shut)} files or folders of the store, which belong to {owners}: {shut[0]}"
    return False, detail, f"{owners}, or root: {cure(root, shut)}"


def _leftovers(store: Store) -> tuple[bool, str, str]:
    """What killed processes left long ago, and what repairs and rebuilds kept aside."""
    clock = Clock(time.time(), _OLD)
    found = list(leftovers(store))
    old = [row for row in found if row.kind != "quarantine" and not clock.is_young(row.path)]
    aside = [row for row in found if row.kind == "quarantine"]
    said = [f"{len(old)} older than a week, {sum(row.size_bytes for row in old)} bytes"] if old else []
    if aside:
        said.append(f"{len(aside)} damaged blobs in quarantine, {sum(row.size_bytes for row in aside)} bytes")
    return not old, "; ".join(said) or "none", "vpstore gc removes what is nobody's"


def _recipes(work: Workspace) -> tuple[bool, str, str]:
    for ref in work.checkout.objects.order:
        prepare(work, ref)
    return True, "every stage's config and code can be read", ""


def _pointers(work: Workspace) -> tuple[bool, str, str]:
    wrong = []
    built = 0
    for ref in work.checkout.objects.order:
        pointer = work.checkout.pointers.read(ref)
        built += pointer is not None
        if pointer is not None and not work.store.blobs.has(pointer.artifact):
            wrong.append(str(ref))
    if wrong:
        return False, "the store does not hold " + ", ".join(wrong), "vpstore pull, or vpstore build --all"
    return True, f"{built} of {len(work.checkout.objects.order)} stages built", ""


def _agreed(work: Workspace) -> tuple[bool, str, str]:
    """What the lock names and `resolve` would refuse: it is neither built nor pulled here."""
    entries = work.checkout.lock().profiles.get(work.checkout.profile, {})
    lacking = [
        ref
        for ref in work.checkout.objects.order
        if ref in entries
        and not work.checkout.pointers.path(ref).exists()
        and not work.store.blobs.has(entries[ref].artifact)
    ]
    if not lacking:
        return True, f"{len(entries)} of profile {work.checkout.profile}, none missing here", ""
    names = ", ".join(map(str, lacking[:_NAMES])) + (f" and {len(lacking) - _NAMES} more" if lacking[_NAMES:] else "")
    detail = f"{len(lacking)} of {len(entries)} are neither built nor pulled here: {names}"
    return False, detail, "vpstore pull has them from a remote; vpstore build --all makes them here"
