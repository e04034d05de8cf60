"""build, import, lock, pipeline: the functions that make something.

Place in the path: composes verbs into what a person calls; the command line is a skin over it.

Example:
    vpstore.build("vpDense@expand")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpstore.api.targets import plain, targets
from vpstore.building import Built, Planned, Relocation, planned
from vpstore.building import build as build_stage
from vpstore.checkout import Checkout
from vpstore.pipeline import render
from vpstore.schema.ref import StageRef
from vpstore.storage import atomic
from vpstore.verbs.importing import pin, relocate
from vpstore.verbs.lock import LockChange, LockFault, check_lock, lock_refs
from vpstore.verbs.reports import summary_value
from vpstore.workspace import Workspace


@dataclass(frozen=True)
class SummaryRow:
    """One line of the table that `build --all` ends with."""

    built: Built
    is_new: bool  # built in this run, or since the moment that was given
    figure: Any  # of [summary] in objects.toml; None if there is none

    def to_json(self) -> dict[str, Any]:
        """The row as `build --all --json` prints it."""
        return {**self.built.to_json(), "new": self.is_new, "figure": self.figure}


@dataclass(frozen=True)
class PipelineText:
    """What dvc.yaml should say, and what became of the file."""

    text: str
    path: Path
    changed: bool | None  # whether the file was, or in a dry run would be, written; None if nobody asked for that

    def to_json(self) -> dict[str, Any]:
        """The document as `pipeline --json` prints it."""
        return {"text": self.text, "changed": self.changed}


def build(*refs: str, work: Workspace | None = None, force: bool = False) -> list[Built]:
    """Build stages in the order given.

    The recipe runs in the caller's process: one that ends it by `os._exit` or C's `exit` ends the caller, with its
    code. The command `vpstore build` makes a failure of that.

    Args:    refs: an object alone means its default stage, or all its stages if objects.toml says `build_all`.
    Raises:  NoSuchRef, RecipeRefused, GateMissed, Interrupted.
    """
    work = work or Workspace.find(Path.cwd(), create=True)
    return [build_stage(work, stage, force=force) for stage in targets(work, refs)]


def build_all(*, work: Workspace | None = None, force: bool = False, since: float | None = None) -> list[SummaryRow]:
    """Build every stage in topological order.

    Args:    since: a Unix time; builds that were attested from then on count as new, too.
    Returns: one row a stage, in that order, after all of them are built, as the figures come from reports.
    """
    work = work or Workspace.find(Path.cwd(), create=True)
    done = [build_stage(work, stage, force=force) for stage in work.checkout.objects.order]
    summary = work.checkout.objects.summary
    rows = []
    for built in done:
        is_new = not built.is_cached or (since is not None and built.finished_unix >= int(since))
        rows.append(SummaryRow(built, is_new, None if summary is None else summary_value(work, built.ref, summary)))
    return rows


def plan(*refs: str, work: Workspace | None = None) -> list[Planned]:
    """What `build` would do with each stage; without refs, with every one."""
    work = work or Workspace.find(Path.cwd())
    stages = targets(work, refs) if refs else list(work.checkout.objects.order)
    return [planned(work, stage) for stage in stages]


def import_donor(
    name: str, path: Path, *, work: Workspace | None = None, force: bool = False, pins: bool = False
) -> Built:
    """Build an object from files in a folder of the person's choice, held against the pinned SHA-256 as ever.

    The function of the command `import`, which is a word that Python keeps for itself.

    Args:    name: the object, or object@stage; path: the folder with the files; pins: write the provenance file first,
             so that what lies in the folder now is what is pinned.
    Raises:  UsageError, RecipeRefused.
    """
    work = work or Workspace.find(Path.cwd(), create=True)
    stage = work.checkout.objects.find(plain(name))
    if pins:
        pin(work, stage, path.expanduser().absolute())
    return build_stage(work, stage, force=force, relocate=_from_folder(stage, path))


def plan_import(name: str, path: Path, *, work: Workspace | None = None) -> Planned:
    """What `import_donor` would do; the files are read and held against their pins, nothing is built.

    Raises:  UsageError, RecipeRefused.
    """
    work = work or Workspace.find(Path.cwd())
    stage = work.checkout.objects.find(plain(name))
    return planned(work, stage, relocate=_from_folder(stage, path))


def _from_folder(stage: StageRef, path: Path) -> Relocation:
    folder = path.expanduser().absolute()
    return lambda prepared: relocate(prepared, folder, ref=stage)


def lock(
    *refs: str, work: Workspace | None = None, is_dry_run: bool = False, history: bool = False
) -> list[LockChange]:
    """Accept what is built; without refs, everything.

    Args:    history: also what differs from the agreed artifact by its history alone.
    """
    work = work or Workspace.find(Path.cwd())
    return list(lock_refs(work, targets(work, refs), is_dry_run=is_dry_run, history=history))


def lock_check(*, work: Workspace | None = None) -> list[LockFault]:
    """Hold the working tree's code and params against the lock."""
    return list(check_lock(work or Workspace.find(Path.cwd())))


def pipeline(*, profile: str | None = None, write: bool = False, is_dry_run: bool = False) -> PipelineText:
    """The dvc.yaml that objects.toml, profiles and recipe closures call for.

    Args:    write: put it there if it says something else; is_dry_run: only say whether it does.
    Raises:  UsageError, RecipeRefused: a configuration or a recipe that cannot be read.
    """
    found = Checkout.find(Path.cwd(), profile=profile)
    text = render([Checkout.find(Path.cwd(), profile=name) for name in found.profiles()])
    path, data = found.root / "dvc.yaml", text.encode()
    if is_dry_run:
        return PipelineText(text, path, not path.is_file() or path.read_bytes() != data)
    if not write:
        return PipelineText(text, path, None)
    with atomic.disk_errors(path, "writing dvc.yaml"), found.opened_file(path) as place:
        return PipelineText(text, path, atomic.write_if_different(place, data))
