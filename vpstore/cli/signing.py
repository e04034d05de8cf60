"""Commands that sign and hand out: attest, export.

Place in the path: each parses, calls one function of `vpstore.api` and prints.

Example:
    vpstore attest vpMoE --key release.pem -o vpMoE.sig
"""

from __future__ import annotations

from pathlib import Path

import click

from vpstore.cli.group import command, complete_ref, workspace
from vpstore.cli.printing import print_json, size_text


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


@command("export", example="vpstore export vpMoE /tmp/vpMoE", codes=(10, 11, 12, 13, 14, 20))
@click.argument("ref", shell_complete=complete_ref)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--to",
    default="dir",
    show_default=True,
    metavar="FORMAT",
    help="The artifact's own files, or a format that the project offers.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be written; write nothing.")
def export(ref: str, directory: Path, *, to: str, dry_run: bool, profile: str | None, as_json: bool) -> None:
    """Copy an artifact's files into a plain directory, absent or empty so far, and print its path."""
    from vpstore.api import signing as api

    done = api.export(ref, directory, to=to, work=workspace(profile), is_dry_run=dry_run)
    if as_json:
        print_json({**done.to_json(), "dry_run": dry_run})
    elif dry_run:
        click.echo(f"would write {done.files} files, {size_text(done.size_bytes)}, to {done.path}")
    else:
        click.echo(done.path)
