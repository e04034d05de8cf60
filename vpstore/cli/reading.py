"""Commands that read: resolve, ls, show, verify, doctor, completion.

Place in the path: each parses, calls one function of `vpstore.api` and prints.

Example:
    path=$(vpstore resolve vpDense)
"""

from __future__ import annotations

import os
from typing import Any

import click

from vpstore.cli.group import cli, command, complete_ref, leave, workspace
from vpstore.cli.printing import outcome_text, print_json, print_table, seconds_text, size_text
from vpstore.errors import BadManifest, BlobMissing, DigestMismatch, FaultsFound, UsageError
from vpstore.narration import printable, printable_lines


@command("resolve", example="path=$(vpstore resolve vpDense)", codes=(10, 11, 12, 13, 14, 15, 16, 20))
@click.argument("ref", shell_complete=complete_ref)
@click.option("--locked", is_flag=True, help="Refuse what is not exactly what vpstore.lock says.")
@click.option("--full", is_flag=True, help="Read every byte again, whatever was verified before.")
@click.option("--rebuild", is_flag=True, help="If it is not whole here, run recipes again; only equal bytes count.")
@click.option("--fetch", is_flag=True, help="Have what is missing of it from a DVC remote; else nothing is fetched.")
@click.option("-r", "--remote", metavar="REMOTE", help="With --fetch: another DVC remote than the default one.")
def resolve(ref: str, *, locked: bool, full: bool, rebuild: bool, as_json: bool, **rest: Any) -> None:
    """Verify an artifact and print the path of the directory that shows it."""
    from vpstore.api import reading as api

    if rest["remote"] is not None and not rest["fetch"]:
        raise UsageError("a remote is named, and nothing is to be fetched", next_step="add --fetch")
    work = workspace(rest["profile"], create=rebuild or rest["fetch"])
    try:
        found = api.resolve(ref, work=work, locked=locked, full=full, fetch=rest["remote"] or rest["fetch"])
    except (BlobMissing, DigestMismatch):
        if not rebuild:
            raise
        from vpstore.api import reproducing

        reproducing.rebuild(ref, work=work)
        found = api.resolve(ref, work=work, locked=locked, full=full)
    if as_json:
        print_json(found.to_json())
    else:
        click.echo(os.fsencode(found.path))  # the path itself, whatever the locale makes of its letters


@command("ls", example="vpstore ls --json", codes=(10, 14))
def ls(*, profile: str | None, as_json: bool) -> None:
    """List what is built, and how it stands to vpstore.lock."""
    from vpstore.api import reading as api

    work = workspace(profile)
    rows = api.ls(work=work)
    if as_json:
        print_json({"objects": [row.to_json() for row in rows]})
        return
    cells = [(str(row.ref), row.artifact.short, row.key.short, size_text(row.size_bytes), row.locked) for row in rows]
    print_table(("object@stage", "artifact", "key", "size", "lock"), cells)
    if not rows:
        click.echo(
            f"nothing is built yet under profile {work.checkout.profile}: vpstore pull has what the lock names from a "
            "remote, vpstore build --all makes it here",
            err=True,
        )


@command("show", example="vpstore show vpMoE", codes=(10, 11, 12, 13, 14))
@click.argument("ref", shell_complete=complete_ref)
@click.option("--tensors", is_flag=True, help="List its tensors instead: name, dtype, shape, digest.")
def show(ref: str, *, tensors: bool, profile: str | None, as_json: bool) -> None:
    """Show an artifact: its files, what it was built from, and who attested it."""
    from vpstore.api import reading as api

    shown = api.show(ref, work=workspace(profile), tensors=tensors)
    if as_json:
        print_json(shown.to_json())
        return
    if shown.tensors is not None:
        cells = [
            (row.name, row.dtype, "x".join(map(str, row.shape)) or "scalar", row.digest.short)
            for _, row in shown.tensors
        ]
        print_table(("tensor", "dtype", "shape", "digest"), cells)
        return
    manifest = shown.manifest
    click.echo(f"{manifest.ref}\n  artifact  {manifest.digest}\n  key       {manifest.build.key()}")
    click.echo(f"  recipe    {manifest.build.entry}, {len(manifest.build.recipe_files)} files")
    for row in shown.inputs:
        click.echo(f"  input     {row['role']} = {row['ref'] or '?'}  {row['artifact']}")
    for source in manifest.build.sources:
        click.echo(f"  source    {source.role}  sha256 {source.sha256}")
    for file in manifest.files:
        click.echo(f"  file      {file.path}  {size_text(file.size_bytes)}  {file.digest.short}")
    for statement in shown.attestations:
        facts = statement.facts
        commit = f"git {name}" if (name := facts.git.get("commit")) else "no git"
        click.echo(printable(f"  attested  {facts.finished_on}, {seconds_text(facts.duration_seconds)}, {commit}"))
    for signed in shown.signatures:
        unknown = f"nobody trusted here, key {', '.join(keyid[:12] for keyid in signed.keyids)}"
        by = "by " + (", ".join(signed.signers) or unknown)
        click.echo(f"  signed    {by if signed.fault is None else f'FAULTY: {signed.fault.what}'}")
    for again in shown.reproductions:
        click.echo(f"  rebuilt   {again.facts.finished_on}, {outcome_text(again.outcome)}")


@command("verify", example="vpstore verify --all", codes=(3, 10, 11, 14, 16))
@click.argument("refs", metavar="[REF...]", nargs=-1, shell_complete=complete_ref)
@click.option("--all", "everything", is_flag=True, help="Every ref, and all else that lies in the store.")
@click.option("--full/--quick", default=True, help="Every byte; or believe the stat stamps of unchanged blobs.")
@click.option("--remote", is_flag=True, help="Read back what a DVC remote has, instead of the store.")
@click.option("-r", "name", metavar="REMOTE", help="With --remote: another one than the default.")
def verify(refs: tuple[str, ...], *, everything: bool, full: bool, as_json: bool, **rest: Any) -> None:
    """Read everything again and list all damage, down to the tensor; without refs, every ref."""
    from vpstore.api import reading as api

    if everything and refs:
        raise UsageError("verify wants refs or --all", expected="one of them", next_step="vpstore verify --help")
    if rest["name"] is not None and not rest["remote"]:
        raise UsageError("a remote is named, and the store is to be verified", next_step="add --remote")
    remote = rest["name"] or rest["remote"]
    found = api.verify(*refs, work=workspace(rest["profile"]), everything=everything, quick=not full, remote=remote)
    if as_json:
        print_json(found.to_json())
    else:
        for fault in found.faults:
            tensor = f", tensor {fault.tensor}" if fault.tensor else ""
            click.echo(f"{fault.where}{tensor}\n  expected  {fault.expected}\n  found     {fault.found}")
        count = len(found.faults)
        click.echo(f"{count or 'no'} {'fault' if count == 1 else 'faults'} in {found.place}")
    if not found.is_ok:
        leave((BadManifest if any(fault.is_claim for fault in found.faults) else FaultsFound).exit_code)


@command("doctor", example="vpstore doctor", codes=(20,))
def doctor(*, profile: str | None, as_json: bool) -> None:
    """Check that everything is here that the other commands need, and say what to do if not."""
    from vpstore.api import reading as api

    found = api.doctor(profile=profile)
    if as_json:
        print_json(found.to_json())
    for check in found.checks if not as_json else ():
        mark = "ok  " if check.ok else "FAIL"
        click.echo(printable_lines(f"{mark}  {check.name}" + (f": {check.detail}" if check.detail else "")))
        if check.next_step:
            click.echo(printable_lines(f"      next: {check.next_step}"))
    if not found.ok:
        leave(1)


@command("completion", example='eval "$(vpstore completion bash)"')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str, *, profile: str | None, as_json: bool) -> None:
    """Print the script that completes commands and refs in a shell."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise UsageError("no completion for this shell", found=shell, next_step="vpstore completion --help")
    script = kind(cli, {}, "vpstore", "_VPSTORE_COMPLETE").source()
    if as_json:
        print_json({"shell": shell, "profile": profile, "script": script})
    else:
        click.echo(script)
