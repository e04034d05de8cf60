"""A stage prepared: what would go into its build now, from the working tree, without building it.

Place in the path: config -> **recipe** -> key. Build makes the key from it; resolve and lock compare it with what a
manifest records, to say what is stale. Only resolve, which warns and decides nothing, may take a remembered outline.
Invariants: reads config and code only; no input has to be built and no source has to be there; a key is never made from
anything remembered.

Example:
    preparation = prepare(work, ref); preparation.record(inputs).key()
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import vpstore
from vpstore.errors import UsageError
from vpstore.repository import module_places
from vpstore.schema.digest import Digest, parse_sha256
from vpstore.schema.manifest import BuildRecord, InputRecord, Manifest, Pin, RecipeFile, SourceRecord, Variable
from vpstore.schema.record import TOKENIZER, tokenizer_attributes
from vpstore.schema.ref import StageRef
from vpstore.schema.typed import is_other, plain
from vpstore.storage.memory import Memory
from vpstore.storage.observing import Observation, begun_ns
from vpstore.workspace import Workspace

if TYPE_CHECKING:
    from vpstore.runner import Prepared, TokenizerRecord

# Variables that change from one command to the next and that no runner goes by.
_CHANGING: Final = frozenset({"_", "PWD", "OLDPWD", "SHLVL", "COLUMNS", "LINES"})


@dataclass(frozen=True)
class Preparation:
    """One stage as the working tree would build it."""

    ref: StageRef
    prepared: Prepared
    recipe: Mapping[RecipeFile, bytes]  # the closure's files, each with what stood in it when it was read
    by_artifact: frozenset[str] = frozenset()  # roles of inputs

    def input(self, role: str, artifact: Digest, content: Digest) -> InputRecord:
        """A parent as this stage takes it."""
        return InputRecord(role, artifact, content, "artifact" if role in self.by_artifact else "content")

    def record(self, inputs: Iterable[InputRecord]) -> BuildRecord:
        """The build record with these parents.

        Raises:  UsageError: params that no key can have, by name; BadManifest: a malformed SHA-256, a role that appears
                 twice.
        """
        prepared, where = self.prepared, f"params of {self.ref}"
        tokenizer = () if prepared.tokenizer is None else (_pin_of(prepared.tokenizer),)
        return BuildRecord(
            entry=self.prepared.recipe_entry,
            recipe_files=tuple(self.recipe),
            params=plain(prepared.params, where=where),
            inputs=tuple(inputs),
            sources=tuple(
                SourceRecord(source.role, parse_sha256(source.sha256, where=source.role), source.size_bytes)
                for source in self.prepared.sources
            ),
            pins=tuple(
                pin._replace(attributes=plain(pin.attributes, where=where)) for pin in (*prepared.pins, *tokenizer)
            ),
            variables=tuple(Variable(name, str(value)) for name, value in prepared.variables.items()),
        )

    def with_prepared(self, prepared: Prepared) -> Preparation:
        """The same with sources that lie elsewhere."""
        return replace(self, prepared=prepared)


def prepare(work: Workspace, ref: StageRef) -> Preparation:
    """Ask the runner and read the closure.

    Raises:  UsageError, RecipeRefused.
    """
    from vpstore.code import read_closure

    prepared = work.runner.prepare(work.checkout, ref.object, ref.stage)
    _refuse_ignored(work, ref, prepared)
    recipe = read_closure(
        work.checkout.root, prepared.recipe_entry, always=prepared.code_always, exclude=prepared.code_exclude
    )
    return Preparation(ref, prepared, recipe, work.checkout.objects.stage(ref).by_artifact)


def _pin_of(tokenizer: TokenizerRecord) -> Pin:
    return Pin(TOKENIZER, tokenizer.digest, tokenizer_attributes(tokenizer.family, tokenizer.padded_vocab))


def _refuse_ignored(work: Workspace, ref: StageRef, prepared: Prepared) -> None:
    """Let no declared source be left out of the key: nobody would notice when it changes."""
    for role, path in work.checkout.objects.stage(ref).sources.items():
        if not any(source.role == role or source.role.startswith(f"{role}/") for source in prepared.sources):
            raise UsageError(
                "the runner passes a declared source over",
                where=f"{work.checkout.config.objects}: {ref}, sources.{role}",
                expected=f"a source {role}, or sources {role}/..., among those that `prepare` returns",
                found=", ".join(source.role for source in prepared.sources)[:200] or "none",
                next_step=f"let the runner's prepare read {path}, or take the role out of `sources`",
            )


class Outline(NamedTuple):
    """What of a preparation staleness compares: small, and JSON, so that it can be remembered."""

    entry: str
    code: str  # digest
    params_digest: str
    params: dict[str, Any]
    files: dict[str, str]  # recipe file -> what the key covers of it
    sources: list[list[Any]]
    pins: list[list[Any]]
    variables: list[list[str]]

    @classmethod
    def of(cls, record: BuildRecord) -> Outline:
        """The outline of a record, from a manifest or from the working tree."""
        return cls(
            entry=record.entry,
            code=record.code_digest(),
            params_digest=record.params_digest(),
            params=record.params,
            files={row.path: row.code or row.digest for row in record.recipe_files},
            sources=[list(row) for row in record.sources],
            pins=[list(row) for row in record.pins],
            variables=[list(row) for row in record.variables],
        )


def staleness(work: Workspace, manifest: Manifest, *, remembered: bool = False) -> tuple[str, ...]:
    """What differs between an artifact's build and the working tree, in words; empty if nothing does.

    Args:    remembered: an outline that was worked out before will do if nothing that decided it has changed since.
    Raises:  UsageError, RecipeRefused: the working tree cannot be prepared.
    """
    then = Outline.of(manifest.build)
    now = _remembered_outline(work, manifest.ref) if remembered else Outline.of(prepare(work, manifest.ref).record(()))
    reasons = []
    if now.code != then.code:
        reasons.append("code: " + _differing_files(then, now))
    if now.params_digest != then.params_digest:
        names = now.params.keys() | then.params.keys()
        reasons.append(
            "params: " + ", ".join(sorted(n for n in names if is_other(now.params.get(n), then.params.get(n))))
        )
    if now.sources != then.sources:
        reasons.append("sources")
    for name in sorted({row[0] for row in (*now.pins, *then.pins)}):
        if [row for row in now.pins if row[0] == name] != [row for row in then.pins if row[0] == name]:
            reasons.append(name)
    if now.variables != then.variables:
        reasons.append("environment variables")
    reasons.extend(f"input {role}" for role in _moved_inputs(work, manifest))
    return tuple(reasons)


def _remembered_outline(work: Workspace, ref: StageRef) -> Outline:
    """The outline of a stage, from memory if every file that decided it is as it was."""
    memory, question = Memory(), _question(work, ref)
    known = memory.recall(question)
    if known is not None:
        return Outline(*known)
    with Observation() as seen:
        outline = Outline.of(prepare(work, ref).record(()))
    checkout = work.checkout
    paths = seen.witnesses(checkout.root, outside=checkout.outputs)
    if paths is not None:
        # These were read before the observation began.
        paths |= {
            str(path) for path in (checkout.root / "pyproject.toml", checkout.objects_path, checkout.profile_path)
        }
        memory.remember(question, outline, paths=paths, since_ns=begun_ns() or 0)
    return outline


def _question(work: Workspace, ref: StageRef) -> str:
    """Everything besides files that a runner's answer may depend on; time and chance may not."""
    checkout = work.checkout
    environment = {name: value for name, value in os.environ.items() if name not in _CHANGING}
    own = [str(place) for place in module_places(checkout.root)]  # loading the runner adds them
    path = [folder for folder in sys.path if folder not in own]
    return repr((
        vpstore.__version__, str(checkout.root), checkout.config, checkout.profile, str(ref), os.getcwd(),
        sys.version, tuple(sys.flags), sys.prefix, path, sorted(environment.items()),
    ))  # fmt: skip


def _differing_files(then: Outline, now: Outline) -> str:
    differing = sorted({path for path, _ in then.files.items() ^ now.files.items()})
    return ", ".join(differing) if differing else f"entry {then.entry} -> {now.entry}"


def _moved_inputs(work: Workspace, manifest: Manifest) -> list[str]:
    """Roles whose parent the checkout's pointers now give another content, or artifact where that decides."""
    built = {row.role: row for row in manifest.build.inputs}
    declared = work.checkout.objects.stage(manifest.ref).inputs
    moved = sorted(declared.keys() ^ built.keys())
    for role in sorted(declared.keys() & built.keys()):
        pointer = work.checkout.pointers.read(declared[role])
        if pointer is None or pointer.artifact == built[role].artifact:
            continue
        if built[role].by == "artifact" or pointer.content is None or pointer.content != built[role].content:
            moved.append(role)
    return moved
