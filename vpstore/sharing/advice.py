"""What to do about an artifact of which nobody at hand has a healthy copy: the next steps of repair and push.

Place in the path: under repair, push, and what mends attestations.
Invariants: what is advised is about that very artifact, not about another that its name leads to by now: an ancestor
may have been built anew since its child was built.

Example:
    f"vpstore repair {name_of(work, manifest)}; else {made_again(work, manifest)}"
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from vpstore.errors import VpstoreError
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Manifest
from vpstore.schema.ref import StageRef
from vpstore.sharing.naming import named
from vpstore.surroundings import UNKNOWN
from vpstore.workspace import Workspace

_DIGITS: Final = 12  # of a digest that is named, as far as they are enough


def is_current(work: Workspace, ref: StageRef, artifact: Digest) -> bool:
    """Whether a ref leads to an artifact: the pointer does, or the lock where there is no pointer."""
    try:
        return ref in work.checkout.objects.order and named(work, ref).artifact == artifact
    except VpstoreError:  # what cannot be read leads nowhere
        return False


def name_of(work: Workspace, manifest: Manifest) -> str:
    """What to call an artifact on the command line: its ref if that leads to it, else its digits."""
    if is_current(work, manifest.ref, manifest.digest):
        return str(manifest.ref)
    digits = manifest.digest.hex[:_DIGITS]
    is_enough = list(work.store.attestations.artifacts(digits)) == [manifest.digest]
    return f"{manifest.object}#{digits if is_enough else manifest.digest.hex}"


def made_again(work: Workspace, manifest: Manifest) -> str:
    """What makes the bytes of an artifact again whose manifest can be read."""
    if not is_current(work, manifest.ref, manifest.digest):  # a build would make what the name leads to by now
        return f"vpstore resolve {name_of(work, manifest)} --rebuild makes it again"
    return f"vpstore build {manifest.ref} --force makes it again, or vpstore resolve {manifest.ref} --rebuild"


def unread_name(work: Workspace, artifact: Digest, label: str, manifests: Iterable[Manifest] = ()) -> str:
    """What to call, on the command line, an artifact without a manifest: itself, or the child that names it.

    Args:    label: what it is called in messages; manifests: among which its children are, if it is an ancestor.
    """
    children = [child for child in manifests if any(row.artifact == artifact for row in child.build.inputs)]
    if children:
        return name_of(work, children[-1])
    ref = current_ref(work, artifact)
    return str(ref) if ref is not None else f"{re.split('[@#]', label)[0]}#{artifact.hex}"


def current_ref(work: Workspace, artifact: Digest) -> StageRef | None:
    """The ref that leads to an artifact; None if none does."""
    try:
        return next((ref for ref in work.checkout.objects.order if is_current(work, ref, artifact)), None)
    except VpstoreError:
        return None


def unread_made_again(work: Workspace, artifact: Digest) -> str:
    """What makes an artifact again whose manifest is lost: nothing else says how one was built that is not current."""
    ref = current_ref(work, artifact)
    if ref is not None:
        return f"vpstore build {ref} --force makes it again, or vpstore resolve {ref} --rebuild"
    try:
        commits = [statement.facts.git.get("commit") for statement in work.store.attestations.of(artifact)]
    except VpstoreError:
        commits = []
    known = [commit for commit in commits if commit not in (None, UNKNOWN)]
    origin = f"git checkout {known[-1]}" if known else "check out the config that made it"
    return f"nothing here says how {artifact.short} was built, so {origin} and build it there"
