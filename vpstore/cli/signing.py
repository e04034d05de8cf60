"""Commands that sign and hand out: attest, export.

Place in the path: each parses, calls one function of `vpstore.api` and prints.

Example:
    vpstore attest vpMoE --key release.pem -o vpMoE.sig
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vpstore.cli.group import command, complete_ref, leave, workspace
from vpstore.cli.printing import print_json, size_text
from vpstore.errors import FaultsFound, UsageError
from vpstore.narration import printable

if TYPE_CHECKING:
    from vpstore.api.signing import CheckedExport


@command("attest", example="vpstore attest vpMoE --key release.pem -o vpMoE.sig", codes=(10, 11, 12, 13, 14))
@click.argument("ref", shell_complete=complete_ref)
@click.option(
    "--key",
    required=True,
    metavar="PEM",
    type=click.Path(path_type=Path),
    help="Private key: ECDSA or Ed25519; the passphrase of an encrypted one in VPSTORE_KEY_PASSWORD.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also write an OpenSSF Model Signing bundle of the directory that `resolve` prints (ECDSA only).",
)
@click.option("--dry-run", is_flag=True, help="Sign, to see that it can be done, but write nothing.")
def attest(ref: str, *, key: Path, output: Path | None, dry_run: bool, profile: str | None, as_json: bool) -> None:
    """Sign an artifact's build statement into the store, and on request its files for other tools."""
    from vpstore.api import signing as api

    done = api.attest(ref, key=key, out=output, work=workspace(profile), is_dry_run=dry_run)
    if as_json:
        print_json({**done.to_json(), "dry_run": dry_run})
        return
    said = "would sign" if dry_run else "signed"
    click.echo(f"{said} {done.ref}\n  artifact  {done.artifact}\n  key       {done.keyid}  {done.algorithm}")
    click.echo(f"  envelope  {done.envelope}" + ("" if done.is_new else "  (there already)"))
    if done.bundle is not None:
        click.echo(f"  bundle    {done.bundle}\n  of        {done.view}")


@command("export", example="vpstore export vpMoE /tmp/vpMoE", codes=(3, 10, 11, 12, 13, 14, 20))
@click.argument("ref", shell_complete=complete_ref, required=False)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path), required=False)
@click.option(
    "--to",
    default="dir",
    show_default=True,
    metavar="FORMAT",
    help="The artifact's own files, or a format that the project offers.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be written; write nothing.")
@click.option(
    "--check",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Hold an exported directory against its record and a fresh export; without REF and DIR.",
)
def export(ref: str | None, directory: Path | None, *, check: Path | None, as_json: bool, **rest: Any) -> None:
    """Copy an artifact's files into a plain directory, absent or empty so far, and print its path."""
    from vpstore.api import signing as api

    to, dry_run, profile = rest["to"], rest["dry_run"], rest["profile"]
    if check is not None:
        if ref is not None:
            raise UsageError("export --check takes one directory", where=ref, next_step="vpstore export --check DIR")
        _tell_checked(api.export_check(check, work=workspace(profile)), as_json=as_json)
        return
    if ref is None or directory is None:
        raise UsageError("export wants a ref and a directory", next_step="vpstore export REF DIR, or --check DIR")
    done = api.export(ref, directory, to=to, work=workspace(profile), is_dry_run=dry_run)
    if as_json:
        print_json({**done.to_json(), "dry_run": dry_run})
    elif dry_run:
        click.echo(f"would write {done.files} files, {size_text(done.size_bytes)}, to {done.path}")
    else:
        click.echo(done.path)


def _tell_checked(found: CheckedExport, *, as_json: bool) -> None:
    """Print what a check has found, and leave with 3 if that is something."""
    if as_json:
        print_json(found.to_json())
    else:
        for fault in found.faults:
            where, found_text = printable(fault.where), printable(fault.found)  # a stranger may have named the file
            click.echo(f"{where}\n  expected  {printable(fault.expected)}\n  found     {found_text}")
        count = len(found.faults)
        click.echo(f"{count or 'no'} {'fault' if count == 1 else 'faults'} in {found.path}, {found.ref} for {found.to}")
    if not found.is_ok:
        leave(FaultsFound.exit_code)
