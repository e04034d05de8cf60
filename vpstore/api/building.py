"""build, import, lock: the functions that make something.

Place in the path: composes verbs into what a person calls; the command line is a skin over it.

Example:
    vpstore.build("vpDense@expand")
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpstore.api.targets import targets
from vpstore.building import Built, planned_key
from vpstore.building import build as build_stage
from vpstore.schema.digest import Digest
from vpstore.schema.ref import StageRef, parse_ref
from vpstore.verbs.importing import relocate
from vpstore.verbs.lock import LockChange, LockFault, check_lock, lock_refs
from vpstore.verbs.reports import summary_value
from vpstore.workspace import Workspace


@dataclass(frozen=True)
class SummaryRow:
    """One line of the table that `build --all` ends with."""

    built: Built
    is_new: bool  # built in this run, or since the moment that was given
    figure: Any  # of [summary] in objects.toml; None if there is none


def build(*refs: str, work: Workspace | None = None, force: bool = False) -> list[Built]:
    """Build stages in the order given.

    Args:    refs: an object alone means its default stage, or all its stages if objects.toml says `build_all`.
    Raises:  NoSuchRef, RecipeRefused, GateMissed, Interrupted.
    """
    work = work or Workspace.find(Path.cwd(), create=True)
    return [build_stage(work, stage, force=force) for stage in targets(work, refs)]


def build_all(
    *, work: Workspace | None = None, force: bool = False, since: float | None = None
) -> Iterator[SummaryRow]:
    """Build every stage in topological order.

    Args:    since: a Unix time; builds that were attested from then on count as new, too.
    Returns: one row a stage, in that order, after all of them are built, as the figures come from reports.
    """
    work = work or Workspace.find(Path.cwd(), create=True)
    done = [build_stage(work, stage, force=force) for stage in work.checkout.objects.order]
    summary = work.checkout.objects.summary
    for built in done:
        is_new = not built.is_cached or (since is not None and built.finished_unix >= int(since))
        yield SummaryRow(built, is_new, None if summary is None else summary_value(work, built.ref, summary))


def plan(*refs: str, work: Workspace | None = None) -> list[tuple[StageRef, Digest, bool]]:
    """What `build` would do: each stage, its key, and whether the cache has its result."""
    work = work or Workspace.find(Path.cwd())
    stages = targets(work, refs) if refs else list(work.checkout.objects.order)
    return [(stage, *planned_key(work, stage)) for stage in stages]


def import_donor(name: str, path: Path, *, work: Workspace | None = None, force: bool = False) -> Built:
    """Build an object from files in a folder of the person's choice, held against the pinned SHA-256 as ever.

    Args:    name: the object, or object@stage; path: the folder with the files.
    Raises:  UsageError, RecipeRefused.
    """
    work = work or Workspace.find(Path.cwd(), create=True)
    stage = work.checkout.objects.find(parse_ref(name))
    folder = path.expanduser().absolute()
    return build_stage(work, stage, force=force, relocate=lambda prepared: relocate(prepared, folder))


def lock(*refs: str, work: Workspace | None = None, is_dry_run: bool = False) -> list[LockChange]:
    """Accept what is built; without refs, everything."""
    work = work or Workspace.find(Path.cwd())
    return list(lock_refs(work, targets(work, refs), is_dry_run=is_dry_run))


def lock_check(*, work: Workspace | None = None) -> list[LockFault]:
    """Hold the working tree's code and params against the lock."""
    return list(check_lock(work or Workspace.find(Path.cwd())))
