"""Commands for the reviewer: audit, graph, why, diff.

Place in the path: each parses, calls one function of `vpstore.api` and prints.
Invariants: names that come out of manifests and shards are printed with every control character escaped.

Example:
    vpstore audit vpMoE
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from vpstore.cli.group import command, complete_ref, leave, workspace
from vpstore.cli.printing import print_json, print_table, size_text
from vpstore.errors import BadManifest, FaultsFound, UsageError
from vpstore.narration import printable

if TYPE_CHECKING:
    from vpstore.api.auditing import Graph, LockExplanation
    from vpstore.lineage import TreeLine
    from vpstore.verbs.audit import Audit
    from vpstore.verbs.diff import Difference, TensorPair
    from vpstore.verbs.why import Explanation, Reason, Step

_SHOWN: Final = 8  # names of a list that a person gets to see without --all


@command("audit", example="vpstore audit vpMoE", codes=(3, 10, 11))
@click.argument("ref", shell_complete=complete_ref)
@click.option("--worktree", is_flag=True, help="Staleness and an uncommitted vpstore.lock are faults, too.")
@click.option("--locked", is_flag=True, help="Whatever in the chain is not exactly the lock's is a fault.")
@click.option("--other-machine", is_flag=True, help="Other bytes under the lock's own key are no fault.")
@click.option("--signed", is_flag=True, help="What no trusted key signed is a fault, too.")
def audit(ref: str, *, profile: str | None, as_json: bool, **strict: bool) -> None:
    """Hold an artifact and all that it was made from against everything that is known about them."""
    from vpstore.api import auditing as api

    strictness = api.Strictness(**strict)
    found = api.audit(ref, work=workspace(profile), strictness=strictness)
    if as_json:
        print_json(
            {
                "ok": found.is_ok,
                "faults": [fault.to_json() for fault in found.faults],
                "remarks": list(found.remarks),
                "chain": [link.to_json() for link in found.links.values()],
                "blobs": found.blobs,
                "commit": found.commit or None,
                "read_bytes": found.read_bytes,
            }
        )
    else:
        _print_audit(found)
    if not found.is_ok:
        leave((BadManifest if any(fault.kind == "claim" for fault in found.faults) else FaultsFound).exit_code)


@command("graph", example="vpstore graph vpMoE --dot | dot -Tsvg > lineage.svg", codes=(10, 11, 14))
@click.argument("ref", shell_complete=complete_ref)
@click.option("--dot", "as_dot", is_flag=True, help="For Graphviz.")
def graph(ref: str, *, as_dot: bool, profile: str | None, as_json: bool) -> None:
    """Show what an artifact was made from, back to the donors."""
    from vpstore.api import auditing as api

    if as_dot and as_json:
        raise UsageError("graph prints one form", expected="--dot or --json", next_step="vpstore graph --help")
    found = api.graph(ref, work=workspace(profile))
    if as_json:
        print_json(found.document())
    elif as_dot:
        click.echo(found.dot(), nl=False)
    else:
        _print_graph(found)


@command("why", example="vpstore why vpDense --lock", codes=(10, 11, 12, 13, 14))
@click.argument("before", metavar="A", shell_complete=complete_ref)
@click.argument("after", metavar="[B]", required=False, shell_complete=complete_ref)
@click.option("--lock", is_flag=True, help="Compare what vpstore.lock names with A, instead of A with B.")
@click.option("--diff", "with_diff", is_flag=True, help="Show how the recipe files differ, line by line.")
def why(before: str, after: str | None, *, lock: bool, with_diff: bool, profile: str | None, as_json: bool) -> None:
    """Say what makes two artifacts different, back to where it began."""
    from vpstore.api import auditing as api

    work = workspace(profile)
    found = api.why(before, after, work=work, lock=lock)
    if isinstance(found, api.LockExplanation):
        _print_lock_explanation(found, as_json=as_json)
        return
    diffs = {step.roles: api.why_recipe(step, work=work) if with_diff else [] for step in found.roots}
    if as_json:
        print_json(found.to_json(diffs))
    else:
        _print_explanation(found, diffs)


@command("diff", example="vpstore diff vpDense@expand vpDense@wake-up", codes=(10, 11, 12, 13, 14))
@click.argument("before", metavar="A", shell_complete=complete_ref)
@click.argument("after", metavar="[B]", required=False, shell_complete=complete_ref)
@click.option("--lock", is_flag=True, help="Compare what vpstore.lock names with A, instead of A with B.")
@click.option("--all", "everything", is_flag=True, help="List what is identical, too.")
def diff(before: str, after: str | None, *, lock: bool, everything: bool, profile: str | None, as_json: bool) -> None:
    """Compare two artifacts tensor by tensor and file by file."""
    from vpstore.api import auditing as api

    found = api.diff(before, after, work=workspace(profile), lock=lock)
    tensors = [pair for pair in found.tensors if everything or pair.status != "identical"]
    files = [pair for pair in found.files if everything or pair.status != "identical"]
    if as_json:
        print_json(
            {
                "identical": found.is_identical,
                "before": {"name": str(found.before.ref), "artifact": found.before.digest},
                "after": {"name": str(found.after.ref), "artifact": found.after.digest},
                "tensors": [pair.to_json() for pair in tensors],
                "files": [pair.to_json() for pair in files],
            }
        )
        return
    _print_difference(found, tensors)
    if files:
        click.echo()
        sizes = [[size_text(side.size_bytes) if side else "-" for side in (pair.before, pair.after)] for pair in files]
        rows = [(pair.path, pair.status, *pair_sizes) for pair, pair_sizes in zip(files, sizes, strict=True)]
        print_table(("file", "status", "A", "B"), rows)


def _print_audit(found: Audit) -> None:
    for line in found.lineage.tree() if found.lineage is not None else ():
        link = found.links[line.node.artifact]
        notes = "".join(f"  {note}" for note in link.notes)
        click.echo(printable(f"{_place(line, link.name)}  {link.verdict}{notes}{_above(line)}"))
    for title, lines in (("faults", found.faults), ("remarks", found.remarks)):
        if lines:
            click.echo(f"\n{title}")
        for fault in lines:
            if isinstance(fault, str):
                click.echo(f"  {printable(fault)}")
                continue
            tensor = f", tensor {fault.tensor}" if fault.tensor else ""
            click.echo(f"  {printable(fault.where + tensor)}")
            click.echo(f"    expected  {printable(fault.expected)}\n    found     {printable(fault.found)}")
    count = "no faults" if found.is_ok else f"{len(found.faults)} fault{'s'[: len(found.faults) > 1]}"
    click.echo(
        f"\n{len(found.links)} artifacts, {found.blobs} blobs, {size_text(found.read_bytes)} read again: {count}"
    )
    if found.commit:
        click.echo(f"lock and keys as git's HEAD has them, {found.commit[:12]}")


def _place(line: TreeLine, name: str) -> str:
    """Where a line stands, whose it is, and the digest, which is all that is known where a manifest is not."""
    return line.indent + "  ".join(text for text in (line.role, name, line.node.artifact.short) if text)


def _above(line: TreeLine) -> str:
    return f"  ({', '.join(line.above)}: above)" if line.above else ""


def _print_graph(found: Graph) -> None:
    for line in found.lineage.tree():
        manifest = line.node.manifest
        size = size_text(manifest.size_bytes) if manifest is not None else line.node.reason
        recipe = f"  {manifest.build.entry}" if manifest is not None else ""
        name = line.node.name if manifest is not None else ""
        click.echo(printable(f"{_place(line, name)}  {size}{recipe}{_above(line)}"))


def _print_explanation(found: Explanation, diffs: dict[tuple[str, ...], list[str]]) -> None:
    if not found.steps:
        click.echo("the same artifact")
        return
    top = found.steps[0]
    click.echo(f"{_side(top, 'before')}  ->  {_side(top, 'after')}")
    if found.relation:
        click.echo(f"  {found.relation}")
    for what, names in (("tensors", top.tensors), ("files", top.files)):
        if names is not None:
            click.echo(f"  {len(names)} {what} differ{_names(names)}")
    for step in found.roots:
        place = " of ".join(reversed(step.roles))
        click.echo(f"\nbecause of {place + ': ' if place else ''}{_side(step, 'before')}  ->  {_side(step, 'after')}")
        _print_reasons(step.reasons)
        if step.files is None:
            click.echo("  what lies behind it cannot be told (vpstore pull has what the lock names from a remote)")
        for line in diffs[step.roles]:
            click.echo(f"    {printable(line)}")


def _print_reasons(reasons: Sequence[Reason]) -> None:
    if any(reason.kind == "bytes" for reason in reasons):
        click.echo("  same build key, other bytes:")
        if not any(reason.kind in ("environment", "unknown") for reason in reasons):
            click.echo("  the attested environments are equal: the build does not reproduce, or one of them is forged")
    for kind in dict.fromkeys(reason.kind for reason in reasons if reason.kind != "bytes"):
        rows = [reason for reason in reasons if reason.kind == kind]
        for reason in rows[:_SHOWN]:
            before, after = (
                "(none)" if reason.absent == side else _value(getattr(reason, side)) for side in ("before", "after")
            )
            click.echo(printable(f"  {kind:<11} {reason.name}  {before}  ->  {after}"))
        if len(rows) > _SHOWN:
            click.echo(f"  {kind:<11} and {len(rows) - _SHOWN} more (--json lists them)")


def _side(step: Step, side: str) -> str:
    node = getattr(step, side)
    return " ".join(dict.fromkeys((node.name, node.artifact.short)))  # of an unknown one the name is the digest's


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    is_digest = text.startswith("blake3:")
    return text[7:19] if is_digest else text if len(text) <= 60 else text[:57] + "..."


def _names(names: Iterable[str]) -> str:
    shown = [printable(name) for name in names]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return (": " + ", ".join(shown[:_SHOWN]) + more) if shown else ""


def _print_lock_explanation(found: LockExplanation, *, as_json: bool) -> None:
    if as_json:
        print_json(found.to_json())
        return
    click.echo(f"lock {found.entry.artifact.short}  ->  {found.top.ref} {found.top.digest.short}")
    click.echo("  the lock's artifact is not here: what went into it is known, what came out is not (vpstore pull)")
    for step in found.steps:
        lead = "because of " if step.is_root else "  and so "
        agreed = step.entry.artifact.short if step.entry is not None else "-"
        click.echo(f"{lead}{step.node.name}  {agreed}  ->  {step.node.artifact.short}  {step.found.words}")


def _print_difference(found: Difference, tensors: Sequence[TensorPair]) -> None:
    sides = [f"{manifest.ref} {manifest.digest.short}" for manifest in (found.before, found.after)]
    click.echo("  ->  ".join(sides))
    same = sum(pair.status == "identical" for pair in found.tensors)
    alike = sum(pair.status == "identical" for pair in found.files)
    click.echo(f"{same} of {len(found.tensors)} tensors and {alike} of {len(found.files)} files are identical")
    if tensors:
        click.echo()
        head = ("tensor", "dtype", "shape", "status", "max |A-B|", "max rel", "‖A‖", "‖B‖", "‖A-B‖")
        print_table(head, [_tensor_row(pair) for pair in tensors])


def _tensor_row(pair: TensorPair) -> tuple[str, ...]:
    rows = [row for row in (pair.before, pair.after) if row is not None]
    dtypes = " / ".join(dict.fromkeys(row.dtype for row in rows))
    shapes = " / ".join(dict.fromkeys("x".join(map(str, row.shape)) or "scalar" for row in rows))
    found = pair.difference
    figures = (
        (None,) * 5
        if found is None
        else (found.max_abs, found.max_rel, found.norm_before, found.norm_after, found.norm_difference)
    )
    return (pair.name, dtypes, shapes, pair.status, *("-" if x is None else f"{x:.4g}" for x in figures))
