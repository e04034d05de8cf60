"""What the refs on a command line mean, for every function of the API that takes several.

Example:
    targets(work, ["vpDense", "reports"])
"""

from __future__ import annotations

from collections.abc import Sequence

from vpstore.errors import UsageError
from vpstore.schema.ref import Ref, StageRef, parse_ref
from vpstore.workspace import Workspace


def targets(work: Workspace, refs: Sequence[str]) -> list[StageRef]:
    """Every stage the refs mean, each once: all of a `build_all` object named alone."""
    return list(dict.fromkeys(stage for ref in refs for stage in work.checkout.objects.targets(plain(ref))))


def plain(text: str) -> Ref:
    """A ref that is a name.

    Raises:  UsageError: a digest prefix.
    """
    ref = parse_ref(text)
    if ref.prefix is not None:
        raise UsageError(
            "this command wants a name, not a digest",
            where=text,
            expected="object[.mode][@stage]",
            next_step=f"name the stage: {ref.object}, or {ref.object}@STAGE",
        )
    return ref
