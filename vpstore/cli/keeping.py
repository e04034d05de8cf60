"""Commands that keep and delete: gc.

Place in the path: parses, calls one function of `vpstore.api` and prints.

Example:
    vpstore gc --dry-run
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vpstore.cli.group import command, leave, workspace
from vpstore.cli.printing import print_json, size_text
from vpstore.errors import BadManifest

if TYPE_CHECKING:
    from vpstore.collecting.judging import Collection, Verdict


@command("gc", example="vpstore gc --dry-run", codes=(10, 14))
@click.option("--dry-run", is_flag=True, help="Say of each thing why it stays or goes; delete nothing.")
@click.option("--grace", default="1d", show_default=True, metavar="TIME", help="Keep what is younger: 12h, 2w, 0.")
@click.option(
    "--forget",
    multiple=True,
    metavar="CHECKOUT",
    type=click.Path(path_type=Path, readable=False),
    help="A checkout that is gone for good.",
)
@click.option("--quarantine", is_flag=True, help="Delete what was kept aside for longer than --grace, too.")
@click.option("--despite-damage", is_flag=True, help="Go on though a needed manifest is damaged or lost.")
@click.option("--verbose", "-v", is_flag=True, help="List each thing, as --dry-run does.")
def gc(*, grace: str, forget: tuple[Path, ...], verbose: bool, profile: str | None, as_json: bool, **rest: Any) -> None:
    """Delete what no checkout and no running process needs."""
    from vpstore.api import keeping as api

    terms = api.Terms(
        grace_seconds=api.duration(grace),
        is_dry_run=rest["dry_run"],
        despite_damage=rest["despite_damage"],
        quarantine=rest["quarantine"],
    )
    done = api.gc(terms, forget=forget, work=workspace(profile))
    if as_json:
        print_json(done.to_json())
    else:
        if verbose or terms.is_dry_run:
            _print_each(done.verdicts)
        _print_checkouts(done)
        _print_totals(done)
    if done.is_refused:
        leave(BadManifest.exit_code)


def _print_each(verdicts: list[Verdict]) -> None:
    widths = max((len(size_text(row.size_bytes)) for row in verdicts), default=0)
    for row in verdicts:
        name = re.sub(r"[0-9a-f]{13,}", lambda digits: digits[0][:12], row.name)  # --json has all digits
        size = size_text(row.size_bytes).rjust(widths)
        click.echo(f"{'goes' if row.goes else 'stays':<5}  {row.kind:<11}  {size}  {name}  {row.why}")


def _print_checkouts(done: Collection) -> None:
    from vpstore.collecting.marking import shown

    for path in done.forgotten:
        click.echo(f"checkout  {path}: forgotten")
    for row in done.marks.checkouts:
        what = {"read": "", "unregistered": " (not registered)"}.get(row.state, f" ({row.state})")
        click.echo(f"checkout  {shown(row.record.checkout)}{what}: keeps {_count(row.held, 'artifact')}")
        if row.detail:
            click.echo(f"          {row.detail}; it keeps what it had")
        if not row.is_there:
            click.echo(f"          if it is gone for good: vpstore gc --forget {shown(row.record.checkout)}")
    if done.marks.processes:
        click.echo(f"at work   {_count(done.marks.processes, 'process', 'processes')}")
    if done.marks.absent:
        number = _count(len(done.marks.absent), "artifact")
        click.echo(f"absent    {number} that a lock or pointer names and this store never had: nothing to keep")
    for obstacle in done.marks.obstacles:
        click.echo(f"DAMAGE    {obstacle}")


def _print_totals(done: Collection) -> None:
    for goes, word in ((False, "stays"), (True, "goes" if done.terms.is_dry_run else "gone")):
        rows = [row for row in done.verdicts if row.goes == goes]
        sums: dict[tuple[str, str], tuple[int, int]] = {}
        for row in rows:
            count, size = sums.get((row.ground, row.kind), (0, 0))
            sums[row.ground, row.kind] = (count + 1, size + row.size_bytes)
        for (ground, kind), (count, size) in sorted(sums.items()):
            many = {"process": "processes", "quarantine": "quarantined", "scratch": "scratch"}.get(kind, f"{kind}s")
            click.echo(f"{word:<8}  {count:>6} {many:<12}  {size_text(size):>10}  {ground}")
    count, size = done.total(goes=True)
    verb = "would free" if done.terms.is_dry_run else "freed"
    click.echo(f"{verb} {size_text(size)}" if count else "nothing to delete")
    if done.is_refused:
        click.echo(f"damage hides what is needed: gc deletes nothing before that is mended ({done.way_out})")


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
