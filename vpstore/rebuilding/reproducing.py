"""reproduce: build an artifact again from what it records, and say tensor by tensor whether it is the same.

Place in the path: manifest -> scratch folder -> recipe -> **verdict** -> attestation. A reviewer's verb: it asks no
lock, no pointer and no build cache what should come out, and it uses the recorded recipe files, never the checked-out.
Invariants: the store gets nothing but the attestation, whatever the verdict; an attempt that did not come to an end
leaves nothing at all.

Example:
    done = reproduce(work, manifest, Wish(sample=20)); done.findings.verdict, done.findings.share
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from vpstore.errors import Interrupted, NoSuchRef, UsageError, VpstoreError
from vpstore.rebuilding.comparing import Comparer, rebuilt
from vpstore.rebuilding.findings import Findings, Verdict
from vpstore.rebuilding.ingredients import Task, lay_out
from vpstore.rebuilding.running import run
from vpstore.rebuilding.sampling import choose
from vpstore.rebuilding.scratch import scratch_folder
from vpstore.rebuilding.worker import Job
from vpstore.rebuilding.worker import Result as JobResult
from vpstore.runner import Selection
from vpstore.schema.attestation import BuildFacts
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Manifest
from vpstore.schema.reproduction import Outcome, Reproduction, Result, Subject
from vpstore.surroundings import UNKNOWN, Stopwatch
from vpstore.verbs.cache import build_statement
from vpstore.workspace import Workspace

_RESULTS: Final[dict[Verdict, Result]] = {"identical": "PASSED", "within": "WARNED", "different": "FAILED"}


@dataclass(frozen=True)
class Wish:
    """How an artifact is to be reproduced."""

    sample: int | None = None  # so many tensors of a plan
    tensors: tuple[str, ...] = ()  # these tensors of a plan
    seed: int | None = None  # of the sample; drawn if None
    with_intermediates: bool = False  # for a part: compute what many tensors need, too, instead of taking it as given
    epsilon: float | None = None  # differences up to it are no fault
    keep: Path | None = None  # where what is rebuilt is left

    @property
    def is_part(self) -> bool:
        """Whether only some tensors are computed."""
        return self.sample is not None or bool(self.tensors)

    def check(self) -> None:
        """Refuse what has no meaning.

        Raises:  UsageError.
        """
        faults = {
            "--sample and --tensor are two ways to choose": self.sample is not None and bool(self.tensors),
            "a sample has at least one tensor": self.sample is not None and self.sample < 1,
            "a seed is for --sample": self.seed is not None and self.sample is None,
            "a seed is a whole number from 0 to 2**53 - 1": self.seed is not None and not 0 <= self.seed < 1 << 53,
            "--with-intermediates is for --sample and --tensor": self.with_intermediates and not self.is_part,
            "an epsilon is a finite number, 0 or more": self.epsilon is not None
            and not (math.isfinite(self.epsilon) and self.epsilon >= 0),
        }
        for what, is_so in faults.items():
            if is_so:
                raise UsageError(what, next_step="vpstore reproduce --help")


@dataclass(frozen=True)
class Reproduced:
    """One attempt: either what was found, or why the recipe did not come to an end."""

    manifest: Manifest
    findings: Findings | None = None
    statement: Reproduction | None = None
    attestation: Digest | None = None  # of the statement, as the store has it
    error: VpstoreError | None = None

    @property
    def verdict(self) -> Verdict | None:
        """The worst that was found; None if nothing came out."""
        return None if self.findings is None else self.findings.verdict

    def is_good(self, *, epsilon: float | None) -> bool:
        """Whether this is no fault: identical, or within the epsilon that was asked for."""
        return self.verdict == "identical" or (epsilon is not None and self.verdict == "within")


def reproduce(work: Workspace, manifest: Manifest, wish: Wish) -> Reproduced:
    """Build one artifact, or some of its tensors, again.

    Raises:  UsageError; BlobMissing, DigestMismatch: the artifact, a parent or a recipe file is not here;
             RecipeRefused, GateMissed: the recorded recipe refuses; Interrupted: Ctrl-C.
    """
    wish.check()
    task = Task.of(manifest)
    comparer = Comparer(work, manifest, wish.epsilon)
    seed = secrets.randbits(32) if wish.sample is not None and wish.seed is None else wish.seed
    names = _names(comparer, wish, seed)
    watch = Stopwatch()
    try:
        with scratch_folder(work, "reproduce", task, keep=wish.keep) as folder:
            job = lay_out(work, task, folder)
            given = {part.name: work.store.blobs.path(part.digest) for part in manifest.intermediates}
            if wish.is_part:
                job = replace(job, selection=Selection(names, None if wish.with_intermediates else given))
            result = _run(work, job, manifest)
            if wish.is_part:
                findings = comparer.part(result.staged, names)
            else:
                findings = comparer.whole(rebuilt(task, result.staged))
            facts = watch.facts(work.checkout.root, result.environment)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was recorded", where=str(manifest.ref)) from None
    outcome = _outcome(findings, wish, given=tuple(given) if not wish.with_intermediates else (), seed=seed)
    return _record(work, manifest, findings, outcome, facts)


def reproduce_chain(work: Workspace, manifest: Manifest, wish: Wish) -> Iterator[Reproduced]:
    """Build an artifact and all its ancestors again, parents first, each from the parents that it records.

    One that does not come to an end is a result with an error; the others are built all the same.

    Raises:  UsageError: a part of a chain; BlobMissing, DigestMismatch, BadManifest: an ancestor's manifest is not
             here; Interrupted.
    """
    if wish.is_part:
        raise UsageError(
            "a chain is reproduced whole",
            expected="--chain without --sample and --tensor",
            next_step="vpstore reproduce each ref with --sample",
        )
    wish.check()
    chain = ancestors(work, manifest)
    for number, link in enumerate(chain):
        work.narrator.note(f"{number + 1}/{len(chain)} {link.ref} {link.digest.short}")
        keep = None if wish.keep is None else wish.keep / f"{link.ref}-{link.digest.short}"
        try:
            yield reproduce(work, link, replace(wish, keep=keep))
        except Interrupted:
            raise
        except VpstoreError as error:
            yield Reproduced(link, error=error)


def ancestors(work: Workspace, manifest: Manifest) -> list[Manifest]:
    """The manifests of an artifact and all that it was made from, parents first, each once.

    Raises:  BlobMissing, DigestMismatch, BadManifest: naming who needs the missing one.
    """
    found: dict[Digest, Manifest] = {}
    order: dict[Digest, None] = {}
    waiting = [(manifest, False)]
    while waiting:
        link, is_done = waiting.pop()
        if is_done:
            order[link.digest] = None
        elif link.digest not in found:
            found[link.digest] = link
            waiting.append((link, True))
            for row in link.build.inputs:
                if row.artifact not in found:
                    waiting.append((_parent(work, link, row.role, row.artifact), False))
    return [found[digest] for digest in order]


def _parent(work: Workspace, child: Manifest, role: str, artifact: Digest) -> Manifest:
    try:
        return work.store.manifest(artifact)
    except VpstoreError as error:
        error.where = f"input {role} of {child.ref}, {error.where}"
        error.next_step = (
            f"vpstore pull {child.ref} brings it from a remote; vpstore resolve {child.ref} --rebuild makes it again"
        )
        raise


def advice(work: Workspace, manifest: Manifest) -> str:
    """What to do when this checkout's runner and the recorded recipe do not go together."""
    statement = build_statement(work, manifest)
    commit = statement.facts.git.get("commit") if statement is not None else None
    if commit in (None, UNKNOWN):
        return "check out the state of the repository in which it was built, and try there"
    return f"git checkout {commit}, in which it was built, and try there"


def _run(work: Workspace, job: Job, manifest: Manifest) -> JobResult:
    """Run the recorded recipe; what a runner says of REF is about this artifact, whose name it is not told."""
    try:
        return run(job, work.narrator, advice=advice(work, manifest))
    except VpstoreError as error:
        error.next_step = re.sub(r"\bREF\b", str(manifest.ref), error.next_step)
        raise


def _names(comparer: Comparer, wish: Wish, seed: int | None) -> tuple[str, ...]:
    if not wish.is_part:
        return ()
    known = {row.name for table in comparer.tables.values() for row in table.tensors}
    if not known:
        raise UsageError(
            "this artifact has no tensors to sample",
            where=str(comparer.recorded.ref),
            next_step=f"vpstore reproduce {comparer.recorded.ref}",
        )
    if strangers := sorted(set(wish.tensors) - known):
        raise NoSuchRef(
            "no such tensor",
            where=str(comparer.recorded.ref),
            found=", ".join(strangers[:5]),
            next_step=f"vpstore show {comparer.recorded.ref} --tensors",
        )
    if wish.sample is None:
        return tuple(dict.fromkeys(wish.tensors))
    return choose(comparer.tables, count=wish.sample, seed=seed or 0)


def _outcome(findings: Findings, wish: Wish, *, given: tuple[str, ...], seed: int | None) -> Outcome:
    passed = findings.names("identical") if wish.is_part else ("artifact",) * (findings.verdict == "identical")
    return Outcome(
        result=_RESULTS[findings.verdict],
        method="sample" if wish.is_part else "whole",
        tensors=findings.compared,
        tensors_total=findings.tensors_total,
        proved_bytes=findings.proved_bytes,
        total_bytes=findings.total_bytes,
        rebuilt=findings.rebuilt,
        given_intermediates=given if wish.is_part else (),
        seed=seed if wish.sample is not None else None,
        epsilon=wish.epsilon,
        tests={"passed": passed, "warned": findings.names("within"), "failed": findings.names("different")},
    )


def _record(work: Workspace, manifest: Manifest, findings: Findings, outcome: Outcome, facts: BuildFacts) -> Reproduced:
    subject = Subject(str(manifest.ref), manifest.digest, manifest.build.key())
    statement = Reproduction.of(subject, outcome, facts)
    digest = work.store.attestations.add(statement)
    return Reproduced(manifest, findings, statement, digest)
