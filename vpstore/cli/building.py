"""Commands that make something: build, import, lock, pipeline.

Place in the path: each parses, calls one function of `vpstore.api` and prints.

Example:
    vpstore build vpDense@expand
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vpstore.cli.group import command, complete_ref, leave, trial_workspace, workspace
from vpstore.cli.printing import figure_text, print_json, print_table, seconds_text, size_text
from vpstore.errors import NotLocked, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vpstore.api.building import SummaryRow
    from vpstore.building import Built, Planned


@command("build", example="vpstore build vpDense@expand", codes=(10, 11, 12, 13, 14, 20))
@click.argument("refs", metavar="REF...", nargs=-1, shell_complete=complete_ref)
@click.option("--all", "everything", is_flag=True, help="Every object@stage, parents first; ends with a table.")
@click.option("--force", is_flag=True, help="Run the recipe even if the build cache has its result.")
@click.option("--since", type=float, metavar="EPOCH", help="With --all: count builds from this Unix time on as new.")
@click.option("--dry-run", is_flag=True, help="Say what would be built, and its key; change nothing.")
def build(refs: tuple[str, ...], *, everything: bool, force: bool, since: float | None, **rest: Any) -> None:
    """Build a stage from its config, inputs and recipe, or take it from the build cache."""
    from vpstore.api import building as api

    if everything == bool(refs):
        raise UsageError("build wants refs or --all", expected="one of them", next_step="vpstore build --help")
    if since is not None and not everything:
        raise UsageError(
            "--since counts rows of the table that only --all prints",
            expected="--all --since EPOCH",
            next_step="leave out --since, or build --all",
        )
    if rest["dry_run"]:
        _print_plan(api.plan(*refs, work=trial_workspace(rest["profile"])), as_json=rest["as_json"])
        return
    work = workspace(rest["profile"], create=True)
    if everything:
        rows = api.build_all(work=work, force=force, since=since)
        summary = work.checkout.objects.summary
        _print_summary(rows, as_json=rest["as_json"], figure=None if summary is None else summary.key.split(".")[-1])
        return
    done = api.build(*refs, work=work, force=force)
    if rest["as_json"]:
        print_json({"builds": [built.to_json() for built in done]})
        return
    for built in done:
        _print_built(built)


@command("import", example="vpstore import qwen3-0_6B ~/Downloads/Qwen3-0.6B", codes=(10, 11, 12, 13, 14, 20))
@click.argument("name", metavar="OBJECT", shell_complete=complete_ref)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--pin", is_flag=True, help="First write the provenance file: what lies in the folder is what is pinned.")
@click.option("--force", is_flag=True, help="Import even if the build cache has the artifact.")
@click.option("--dry-run", is_flag=True, help="Hold the files against their SHA-256; change nothing.")
def import_donor(
    name: str, path: Path, *, pin: bool, force: bool, dry_run: bool, profile: str | None, as_json: bool
) -> None:
    """Import a donor from a folder, held against the SHA-256 that its provenance pins."""
    from vpstore.api import building as api

    if dry_run and pin:
        raise UsageError(
            "--dry-run changes nothing, and --pin writes", where="import", next_step="leave one of them out"
        )
    if dry_run:
        _print_plan([api.plan_import(name, path, work=trial_workspace(profile))], as_json=as_json)
        return
    built = api.import_donor(name, path, work=workspace(profile, create=True), force=force, pins=pin)
    if as_json:
        print_json({"builds": [built.to_json()]})
    else:
        _print_built(built)


@command("lock", example="vpstore lock vpDense@expand", codes=(10, 11, 12, 13, 14, 15, 20))
@click.argument("refs", metavar="[REF...]", nargs=-1, shell_complete=complete_ref)
@click.option("--check", is_flag=True, help="Change nothing; fail if code or params are not the lock's.")
@click.option("--history", is_flag=True, help="Change entries, too, whose content and key are the agreed ones.")
@click.option("--dry-run", is_flag=True, help="Say what would change; change nothing.")
def lock(
    refs: tuple[str, ...], *, check: bool, history: bool, dry_run: bool, profile: str | None, as_json: bool
) -> None:
    """Accept what is built as what was agreed, in vpstore.lock; without refs, everything."""
    from vpstore.api import building as api

    if check:  # of code and params, which need no store: a fresh clone is checked before anything is built
        _print_lock_check(trial_workspace(profile), as_json=as_json)
        return
    work = workspace(profile)
    changes = api.lock(*refs, work=work, is_dry_run=dry_run, history=history)
    if as_json:
        print_json({"dry_run": dry_run, "changes": [change.to_json() for change in changes]})
        return
    for change in changes:
        artifact = change.after.artifact.short if change.after else ""
        click.echo(f"{change.word:<8} {change.ref}  {artifact}".rstrip())


@command("pipeline", example="vpstore pipeline --write", codes=(20,))
@click.option("--write", is_flag=True, help="Write dvc.yaml instead of printing it.")
@click.option("--dry-run", is_flag=True, help="Say whether --write would change dvc.yaml; change nothing.")
def pipeline(*, write: bool, dry_run: bool, profile: str | None, as_json: bool) -> None:
    """Print the dvc.yaml that objects.toml, profiles and recipe closures call for."""
    from vpstore.api import building as api

    found = api.pipeline(profile=profile, write=write, is_dry_run=dry_run)
    if as_json:
        print_json(found.to_json())
    elif dry_run:
        click.echo(f"would write {found.path}" if found.changed else f"{found.path} says this already")
    elif not write:
        click.echo(found.text, nl=False)


def _print_plan(rows: Sequence[Planned], *, as_json: bool) -> None:
    if as_json:
        print_json({"dry_run": True, "builds": [row.to_json() for row in rows]})
        return
    for row in rows:
        if row.key is None:
            click.echo(f"{row.ref}  would be built after {', '.join(map(str, row.waits_for))}, which its key covers")
        else:
            click.echo(f"{row.ref}  key {row.key.short}  {'cache hit' if row.is_cached else 'would be built'}")


def _print_lock_check(work: Any, *, as_json: bool) -> None:
    from vpstore.api import building as api

    faults = api.lock_check(work=work)
    if as_json:
        print_json({"ok": not faults, "faults": [fault.to_json() for fault in faults]})
    for fault in faults if not as_json else ():
        click.echo(
            f"{fault.ref}: {fault.part} is not the lock's\n  expected  {fault.expected}\n  found     {fault.found}"
        )
    if faults:
        leave(NotLocked.exit_code)


def _print_built(built: Built) -> None:
    how = "cache hit" if built.is_cached else f"built in {seconds_text(built.seconds)}"
    click.echo(f"{built.ref}  {built.manifest.digest}  {how}")
    click.echo(f"  {built.comparison.sentence()}")


def _print_summary(rows: list[SummaryRow], *, as_json: bool, figure: str | None) -> None:
    if as_json:
        print_json({"builds": [row.to_json() for row in rows]})
        return
    figure_head = () if figure is None else (figure,)
    lines = [
        (
            str(row.built.ref),
            row.built.manifest.digest.short,
            size_text(row.built.manifest.size_bytes),
            seconds_text(row.built.seconds) if row.is_new else "cache hit",
            *((figure_text(row.figure),) if figure is not None else ()),
            row.built.comparison.status,
        )
        for row in rows
    ]
    print_table(("object@stage", "artifact", "size", "built", *figure_head, "lock"), lines)
