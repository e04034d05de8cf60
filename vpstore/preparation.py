"""A stage prepared: what would go into its build now, from the working tree, without building it.

Place in the path: config -> **recipe** -> key. Build makes the key from it; resolve and lock compare it with what a
manifest records, to say what is stale.
Invariants: reads config and code only; no input has to be built and no source has to be there.

Example:
    preparation = prepare(work, ref); preparation.record(inputs).key()
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from vpstore.code import closure
from vpstore.runner import Prepared
from vpstore.schema.digest import Digest, parse_sha256
from vpstore.schema.manifest import BuildRecord, InputRecord, Manifest, RecipeFile, SourceRecord
from vpstore.schema.ref import StageRef
from vpstore.workspace import Workspace


@dataclass(frozen=True)
class Preparation:
    """One stage as the working tree would build it."""

    ref: StageRef
    prepared: Prepared
    recipe_files: tuple[RecipeFile, ...]

    def record(self, inputs: Iterable[InputRecord]) -> BuildRecord:
        """The build record with these parents.

        Raises:  BadManifest: params without a canonical form, a malformed SHA-256, a role that appears twice.
        """
        return BuildRecord(
            entry=self.prepared.recipe_entry,
            recipe_files=self.recipe_files,
            params=dict(self.prepared.params),
            inputs=tuple(inputs),
            sources=tuple(
                SourceRecord(source.role, parse_sha256(source.sha256, where=source.role), source.size_bytes)
                for source in self.prepared.sources
            ),
            tokenizer=self.prepared.tokenizer,
        )

    def with_prepared(self, prepared: Prepared) -> Preparation:
        """The same with sources that lie elsewhere."""
        return replace(self, prepared=prepared)


def prepare(work: Workspace, ref: StageRef) -> Preparation:
    """Ask the runner and read the closure.

    Raises:  UsageError, RecipeRefused.
    """
    prepared = work.runner.prepare(work.checkout, ref.object, ref.stage)
    files = closure(
        work.checkout.root, prepared.recipe_entry, always=prepared.code_always, exclude=prepared.code_exclude
    )
    return Preparation(ref, prepared, files)


def staleness(work: Workspace, manifest: Manifest) -> tuple[str, ...]:
    """What differs between an artifact's build and the working tree, in words; empty if nothing does.

    Raises:  UsageError, RecipeRefused: the working tree cannot be prepared.
    """
    now = prepare(work, manifest.ref).record(manifest.build.inputs)
    reasons = []
    if now.code_digest() != manifest.build.code_digest():
        reasons.append("code: " + _differing_files(manifest.build, now))
    if now.params_digest() != manifest.build.params_digest():
        names = sorted(
            name
            for name in now.params.keys() | manifest.build.params.keys()
            if now.params.get(name) != manifest.build.params.get(name)
        )
        reasons.append("params: " + ", ".join(names))
    if now.sources != manifest.build.sources:
        reasons.append("sources")
    if now.tokenizer != manifest.build.tokenizer:
        reasons.append("tokenizer")
    reasons.extend(f"input {role}" for role in _moved_inputs(work, manifest))
    return tuple(reasons)


def _differing_files(before: BuildRecord, now: BuildRecord) -> str:
    differing = sorted({row.path for row in set(before.recipe_files) ^ set(now.recipe_files)})
    return ", ".join(differing) if differing else f"entry {before.entry} -> {now.entry}"


def _moved_inputs(work: Workspace, manifest: Manifest) -> list[str]:
    """Roles whose parent the checkout's pointers now give another artifact."""
    built: dict[str, Digest] = {row.role: row.artifact for row in manifest.build.inputs}
    declared = work.checkout.objects.stage(manifest.ref).inputs
    moved = sorted(declared.keys() ^ built.keys())
    for role in sorted(declared.keys() & built.keys()):
        pointer = work.checkout.pointers.read(declared[role])
        if pointer is not None and pointer.artifact != built[role]:
            moved.append(role)
    return moved
