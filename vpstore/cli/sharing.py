"""Commands that move bytes between stores: push, pull, repair.

Place in the path: each parses, calls one function of `vpstore.api` and prints.

Example:
    vpstore pull -r shared -j 16
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vpstore.cli.group import command, complete_ref, leave, trial_workspace, workspace
from vpstore.cli.printing import error_document, print_json, size_text
from vpstore.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vpstore.errors import VpstoreError
    from vpstore.sharing.mending import Repaired
    from vpstore.sharing.report import Report

_refs = click.argument("refs", metavar="[REF...]", nargs=-1, shell_complete=complete_ref)
_remote = click.option("-r", "--remote", metavar="REMOTE", help="A DVC remote, instead of the default one.")
_jobs = click.option("-j", "--jobs", type=click.IntRange(1, 256), default=8, show_default=True, help="Blobs at once.")
_dry_run = click.option("--dry-run", is_flag=True, help="Say what would move; change nothing.")


@command("push", example="vpstore push vpDense -r shared", codes=(10, 11, 12, 13, 14, 16))
@_refs
@_remote
@_jobs
@_dry_run
def push(
    refs: tuple[str, ...], *, remote: str | None, jobs: int, dry_run: bool, profile: str | None, as_json: bool
) -> None:
    """Send what a DVC remote lacks of artifacts and all they were built from; without refs, everything built."""
    from vpstore.api import sharing as api

    report = api.push(*refs, work=workspace(profile), remote=remote, jobs=jobs, is_dry_run=dry_run)
    _print_report(report, verb="push", way="to", as_json=as_json)


@command("pull", example="vpstore pull -j 16", codes=(10, 11, 12, 13, 14, 15, 16))
@_refs
@_remote
@_jobs
@_dry_run
def pull(
    refs: tuple[str, ...], *, remote: str | None, jobs: int, dry_run: bool, profile: str | None, as_json: bool
) -> None:
    """Fetch artifacts and all they were built from; without refs, everything that vpstore.lock names."""
    from vpstore.api import sharing as api

    work = trial_workspace(profile) if dry_run else workspace(profile, create=True)
    report = api.pull(*refs, work=work, remote=remote, jobs=jobs, is_dry_run=dry_run)
    _print_report(report, verb="pull", way="from", as_json=as_json)


@command("repair", example="vpstore repair vpDense --from shared", codes=(10, 11, 12, 13, 14, 15, 16))
@_refs
@click.option("--from", "source", metavar="REMOTE", help="A DVC remote that has healthy copies; else the default one.")
@click.option("--from-store", type=click.Path(path_type=Path), help="Another store, or a checkout with one.")
@click.option("--to-remote", metavar="REMOTE", help="Mend this DVC remote from the store, instead of the store.")
@_jobs
@_dry_run
def repair(refs: tuple[str, ...], *, source: str | None, from_store: Path | None, **rest: Any) -> None:
    """Replace what is damaged or missing by healthy copies; the damaged files are kept in quarantine."""
    from vpstore.api import sharing as api

    if sum(option is not None for option in (source, from_store, rest["to_remote"])) > 1:
        raise UsageError("repair wants one of --from, --from-store and --to-remote", next_step="vpstore repair --help")
    repaired = api.repair(
        *refs,
        work=workspace(rest["profile"]),
        source=from_store if from_store is not None else source,
        to_remote=rest["to_remote"],
        jobs=rest["jobs"],
        is_dry_run=rest["dry_run"],
    )
    _print_repaired(repaired, as_json=rest["as_json"])


def _print_report(report: Report, *, verb: str, way: str, as_json: bool) -> None:
    if as_json:
        print_json({**report.to_json(), "failures": _documents(report.failures)})
    else:
        done = f"would {verb}" if report.is_dry_run else f"{verb}ed"
        for row in report.moved if report.is_dry_run else ():
            click.echo(f"{row.name}  {size_text(row.size_bytes)}")
        for shared in report.artifacts:
            if not shared.is_complete:
                click.echo(f"incomplete: {shared.label}  {shared.artifact.short}")
            elif shared.lacks:
                click.echo(
                    f"lineage incomplete: {shared.label}  {shared.artifact.short}, lacks {', '.join(shared.lacks)}"
                )
        moved = f"{len(report.moved)} objects, {size_text(report.moved_bytes)}"
        click.echo(f"{done} {moved}, {way} {report.remote}; {report.present} were there")
    for text in report.refused:
        click.echo(f"warning: {text}", err=True)
    _end(report.failures, report.exit_code)


def _print_repaired(repaired: Repaired, *, as_json: bool) -> None:
    if as_json:
        print_json({**repaired.to_json(), "failures": _documents(repaired.failures)})
    else:
        for row in repaired.rows:
            word = row.action if row.action == "lost" or not repaired.is_dry_run else f"would be {row.action}"
            click.echo(f"{word}  {row.where}\n  object    {row.name}\n  found     {row.found}")
            if row.next_step:
                click.echo(f"  next      {row.next_step}")
        lost = sum(row.action == "lost" for row in repaired.rows)
        done = "would mend" if repaired.is_dry_run else "mended"
        click.echo(f"{done} {len(repaired.rows) - lost} objects of {repaired.target}; {lost} have no healthy copy")
    _end(repaired.failures, repaired.exit_code)


def _documents(failures: Sequence[VpstoreError]) -> list[dict[str, Any]]:
    return [error_document(error)["error"] for error in failures]


def _end(failures: Sequence[VpstoreError], code: int) -> None:
    for error in failures:
        click.echo(str(error), err=True)
    if code:
        leave(code)
