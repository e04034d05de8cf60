"""Computes some of a plan's tensors again, on their own: a spot check of a large artifact is a matter of seconds.

Place in the path: beside execute, for `vpstore reproduce --sample` and `--tensor`. No build
calls it, so it is not part of a code closure.

Invariants: the shards have the size and the header of the whole plan; only the tensors that were asked for are written,
the rest are holes; no gate is held, as a gate needs all tensors.

Example:
    >>> made = recompute(job, ["model.embed_tokens.weight"], given={}, progress=progress)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from recipes.execute import Made, compute, compute_intermediates, staged_files
from recipes.job import Job
from recipes.recipe import PlanRecipe, Progress, Report
from vpstore.errors import UsageError


def recompute(job: Job, names: Sequence[str], *, given: Mapping[str, Path] | None, progress: Progress) -> Made:
    """Compute the named tensors and write the plan's other files.

    Args:    names: those the plan does not have are left out, and so missing in the shards' headers; given: the
             intermediates by name, or None to compute them.
    Raises:  UsageError: the recipe is a run, or copies files and has no tensors; RecipeRefused.
    """
    recipe = job.recipe()
    if not isinstance(recipe, PlanRecipe):
        raise _whole_only(job, "this recipe runs in one piece: its tensors cannot be computed one by one")
    computed = compute_intermediates(recipe, job, progress) if given is None else {}
    job = replace(job, intermediates=computed if given is None else given)
    plan = recipe.plan(job.context(progress))
    if not plan.tensors:
        raise _whole_only(job, "this recipe copies files and computes no tensors")
    from recipes.shards import ShardWriter

    writer = ShardWriter(job.scratch / "shards", plan.tensors)
    writer.prepare()
    known = {tensor.name for tensor in plan.tensors}
    compute(plan, writer, [name for name in names if name in known], progress)
    return Made(staged_files(job, plan, writer), computed, Report())


def _whole_only(job: Job, what: str) -> UsageError:
    return UsageError(
        what, where=job.entry, next_step="vpstore reproduce REF without --sample and --tensor builds all of it again"
    )
