"""reproduce, rebuild: the functions that build again, to prove an artifact or to have its bytes back.

Place in the path: composes verbs into what a person calls; the command line is a skin over it.

Example:
    [done] = api.reproduce("vpDense@expand", Wish(sample=20)); done.verdict
"""

from __future__ import annotations

from pathlib import Path

from vpstore.rebuilding.ingredients import Origin, Task, origins
from vpstore.rebuilding.reproducing import Reproduced, Wish, ancestors, reproduce_chain
from vpstore.rebuilding.reproducing import reproduce as reproduce_artifact
from vpstore.rebuilding.restoring import Restoration, wanted
from vpstore.schema.digest import Digest
from vpstore.schema.ref import StageRef, parse_ref
from vpstore.verbs.resolve import resolve as resolve_ref
from vpstore.workspace import Workspace

__all__ = ["Reproduced", "Wish", "rebuild", "reproduce", "reproduction_plan"]


def reproduce(
    ref: str, wish: Wish | None = None, *, work: Workspace | None = None, chain: bool = False
) -> list[Reproduced]:
    """Build an artifact again from what it records, and record what came out as an attestation.

    Args:    chain: every ancestor too, parents first.
    Returns: one result; with `chain`, one an artifact, also for those whose recipe did not come to an end.
    Raises:  UsageError; as `resolve`; RecipeRefused, GateMissed: the recorded recipe refuses; Interrupted.
    """
    work, wish = work or Workspace.find(Path.cwd()), wish or Wish()
    wish.check()
    manifest = resolve_ref(work, parse_ref(ref)).manifest
    return list(reproduce_chain(work, manifest, wish)) if chain else [reproduce_artifact(work, manifest, wish)]


def reproduction_plan(
    ref: str, *, work: Workspace | None = None, chain: bool = False
) -> list[tuple[StageRef, Digest, list[Origin]]]:
    """What `reproduce` would build again, and where each ingredient would come from; nothing is run or written."""
    work = work or Workspace.find(Path.cwd())
    manifest = resolve_ref(work, parse_ref(ref)).manifest
    links = ancestors(work, manifest) if chain else [manifest]
    return [(link.ref, link.digest, list(origins(work, Task.of(link)))) for link in links]


def rebuild(ref: str, *, work: Workspace | None = None) -> Digest:
    """Make sure that the artifact of a ref is whole here, running recipes again where it is not.

    Returns: the artifact's digest, which is what was asked for; anything else is not published.
    Raises:  NoSuchRef; BlobMissing: nothing says how it was made; DigestMismatch: the recipes give something else;
             RecipeRefused, GateMissed; Interrupted.
    """
    work = work or Workspace.find(Path.cwd(), create=True)
    return Restoration(work).restore(*wanted(work, parse_ref(ref))).digest
