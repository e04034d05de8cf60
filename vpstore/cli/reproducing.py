"""The command that builds again to prove: reproduce.

Place in the path: parses, calls one function of `vpstore.api` and prints.

Example:
    vpstore reproduce vpMoE@upcycle --sample 20
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vpstore.cli.group import command, complete_ref, leave, workspace
from vpstore.cli.printing import print_json, seconds_text, size_text
from vpstore.errors import FaultsFound

if TYPE_CHECKING:
    from vpstore.api.reproducing import Reproduced
    from vpstore.rebuilding.findings import Findings, TensorFinding, Verdict

_SHOWN = 20  # findings of a kind


@command("reproduce", example="vpstore reproduce vpMoE@upcycle --sample 20", codes=(3, 10, 11, 12, 13, 14, 20))
@click.argument("ref", shell_complete=complete_ref)
@click.option("--chain", is_flag=True, help="Every ancestor too, parents first, each from its recorded parents.")
@click.option("--sample", type=int, metavar="N", help="Only N tensors of a plan, spread over its shards.")
@click.option("--seed", type=int, metavar="S", help="Which sample; drawn, and said, if not given.")
@click.option("--tensor", "tensors", multiple=True, metavar="NAME", help="Only this tensor of a plan; may be repeated.")
@click.option("--with-intermediates", is_flag=True, help="For a part: compute what many tensors need again, too.")
@click.option("--epsilon", type=float, metavar="ABS", help="Differences up to this are no fault.")
@click.option("--keep", type=click.Path(path_type=Path), metavar="DIR", help="Leave what was rebuilt in this folder.")
@click.option("--dry-run", is_flag=True, help="Say what would be rebuilt, and from what; run and write nothing.")
def reproduce(ref: str, *, chain: bool, epsilon: float | None, **rest: Any) -> None:
    """Build an artifact again from its recorded recipe and inputs, and compare tensor by tensor."""
    from vpstore.api import reproducing as api

    work, as_json = workspace(rest["profile"]), rest["as_json"]
    if rest["dry_run"]:
        _print_plan(ref, work, chain=chain, as_json=as_json)
        return
    names = ("sample", "seed", "tensors", "with_intermediates", "keep")
    wish = api.Wish(epsilon=epsilon, **{name: rest[name] for name in names})
    done = api.reproduce(ref, wish, work=work, chain=chain)
    is_good = all(row.is_good(epsilon=epsilon) for row in done)
    if as_json:
        print_json({"ok": is_good, "reproductions": [_document(row) for row in done]})
    for row in done if not as_json else ():
        _print(row)
    if not is_good:
        leave(FaultsFound.exit_code)


def _print_plan(ref: str, work: Any, *, chain: bool, as_json: bool) -> None:
    from vpstore.api import reproducing as api

    rows = api.reproduction_plan(ref, work=work, chain=chain)
    if as_json:
        plan = [
            {"ref": str(stage), "artifact": artifact, "from": [vars(origin) for origin in origins]}
            for stage, artifact, origins in rows
        ]
        print_json({"dry_run": True, "reproductions": plan})
        return
    for stage, artifact, origins in rows:
        click.echo(f"{stage}  {artifact.short}  would be built again from")
        for origin in origins:
            click.echo(f"  {origin.what}: {origin.place}")


def _document(row: Reproduced) -> dict[str, Any]:
    from vpstore.cli.printing import error_document

    found, statement = row.findings, row.statement
    document: dict[str, Any] = {
        "ref": str(row.manifest.ref),
        "artifact": row.manifest.digest,
        "key": row.manifest.build.key(),
        "verdict": row.verdict,
        "error": None if row.error is None else error_document(row.error)["error"],
    }
    if found is None or statement is None:
        return document
    outcome = statement.outcome
    return {
        **document,
        "rebuilt": found.rebuilt,
        "method": outcome.method,
        "seed": outcome.seed,
        "given_intermediates": list(outcome.given_intermediates),
        "proved_bytes": found.proved_bytes,
        "total_bytes": found.total_bytes,
        "tensors_total": found.tensors_total,
        "tensors": [tensor.to_json() for tensor in found.tensors],
        "files": [file.to_json() for file in found.files],
        "not_compared": list(found.not_compared),
        "seconds": statement.facts.duration_seconds,
        "attestation": row.attestation,
    }


def _print(row: Reproduced) -> None:
    manifest, found, statement = row.manifest, row.findings, row.statement
    if found is None or statement is None:
        click.echo(f"{manifest.ref}  {manifest.digest.short}  NOT REPRODUCED")
        click.echo("\n".join(f"  {line}" for line in str(row.error).splitlines()))
        return
    word = {"identical": "identical", "within": "within epsilon", "different": "DIFFERENT"}[found.verdict]
    is_sample = statement.outcome.method == "sample"
    click.echo(f"{manifest.ref}  {manifest.digest.short}  {word}{', as far as was sampled' * is_sample}")
    click.echo(f"  {_counts(found)}")
    for tensor in [tensor for tensor in found.tensors if tensor.verdict != "identical"][:_SHOWN]:
        click.echo(f"  {tensor.verdict:<10} {tensor.name}, {tensor.shard}: {_distance(tensor)}")
    for file in [file for file in found.files if file.verdict != "identical"][:_SHOWN]:
        click.echo(f"  {file.verdict:<10} {file.path}" + (f": {file.note}" if file.note else ""))
    if is_sample:
        _print_scope(row, found)
    if found.total_bytes:
        proved = f"{size_text(found.proved_bytes)} of {size_text(found.total_bytes)}, {found.share:.1%}"
        click.echo(f"  proved     {proved}")
    attested = row.attestation.short if row.attestation else "?"
    click.echo(f"  took       {seconds_text(statement.facts.duration_seconds)}; attestation {attested}")


def _print_scope(row: Reproduced, found: Findings) -> None:
    outcome = row.statement.outcome if row.statement is not None else None
    if outcome is not None and outcome.seed is not None:
        click.echo(f"  seed       {outcome.seed} chooses the same tensors again")
    if outcome is not None and outcome.given_intermediates:
        click.echo(f"  given      {len(outcome.given_intermediates)} intermediates, taken from the artifact")
    if found.not_compared:
        click.echo(f"  left out   {', '.join(found.not_compared)}")


def _counts(found: Findings) -> str:
    alike = sum(file.verdict == "identical" for file in found.files)
    words: tuple[tuple[Verdict, str], ...] = (
        ("identical", "identical"), ("within", "within epsilon"), ("different", "different"),
    )  # fmt: skip
    counts = [f"{found.count(verdict)} {word}" for verdict, word in words if found.count(verdict)]
    if not found.tensors_total and not found.tensors:
        return f"no tensors; {alike} of {len(found.files)} files identical"
    tensors = f"{found.compared} of {found.tensors_total} tensors compared: {', '.join(counts) or 'none'}"
    return f"{tensors}; {alike} of {len(found.files)} other files identical"


def _distance(tensor: TensorFinding) -> str:
    if tensor.note or tensor.max_abs is None:
        return tensor.note or "other bytes, of a dtype without arithmetic here"
    relative = "" if tensor.max_rel is None else f", relative {tensor.max_rel:.3g}"
    return f"max abs {tensor.max_abs:.6g}{relative}"
