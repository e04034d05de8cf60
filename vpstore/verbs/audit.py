"""audit: from an artifact back to its donors, every link held against everything that is known about it.

Place in the path: the reviewer's verb. Trusts no stamp and no earlier run; the project's own code is asked only what is
stale, in a process apart, after all else is judged.
Invariants: reads only and stops at nothing, so that the faults are all there are; parents are judged before their
children; equal stores and checkouts give equal reports.

Example:
    report = audit(work, parse_ref("vpMoE"), Strictness()); report.is_ok, report.faults
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vpstore.errors import BadManifest, UsageError
from vpstore.evidence import anchors, contents, registry
from vpstore.evidence.committed import read_committed
from vpstore.evidence.declarations import check_declarations, check_families
from vpstore.evidence.dossier import LOCK, MISSING, STALE, Dossier, Finding
from vpstore.evidence.readings import Readings
from vpstore.evidence.statements import check_statements
from vpstore.lineage import Lineage, find_artifact, walk
from vpstore.schema.digest import Digest
from vpstore.schema.lockfile import Profile
from vpstore.schema.manifest import Manifest
from vpstore.schema.ref import Ref
from vpstore.signatures import load_trusted_keys
from vpstore.stale import ask
from vpstore.workspace import Workspace

Verdict = Literal["sound", "stale", "differs", "FAULTY", "missing"]


@dataclass(frozen=True)
class Strictness:
    """What counts as a fault besides what contradicts itself."""

    worktree: bool = False  # staleness, and a lock, its place or a key that is not the committed one
    locked: bool = False  # every artifact that is not exactly the lock's
    other_machine: bool = False  # not even other bytes under the key of the lock, or of the committed one
    signed: bool = False  # an artifact that no trusted and committed key signed

    def __post_init__(self) -> None:
        """Refuse what contradicts itself.

        Raises:  UsageError.
        """
        if self.locked and self.other_machine:
            raise UsageError(
                "--locked and --other-machine contradict each other", expected="one of them", next_step="leave out one"
            )

    def asks(self, options: Iterable[str]) -> bool:
        """Whether one of these was asked for."""
        return any(getattr(self, option) for option in options)

    def counts(self, dossier: Dossier) -> bool:
        """Whether the artifact's standing to the lock is a fault.

        One that differs through its parents alone is none, unless asked for: the fault is the parent's.
        """
        if self.locked:
            return dossier.standing != "same"
        return dossier.standing == "record" or (dossier.standing == "bytes" and not self.other_machine)


@dataclass(frozen=True)
class Link:
    """The verdict on one artifact of the chain."""

    dossier: Dossier
    verdict: Verdict

    @property
    def name(self) -> str:
        """object@stage, as far as it is known."""
        return str(self.dossier.manifest.ref) if self.dossier.manifest is not None else self.dossier.named

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should read beside the verdict."""
        dossier = self.dossier
        standing = {
            "bytes": "the lock's key, other bytes",
            "inputs": "the lock's but for its parents",
            "record": "another build than the lock's",
        }.get(dossier.standing)
        signed = f"signed by {', '.join(dossier.signers)}" if dossier.signers else None
        relocked = "the committed lock's key, other bytes" if dossier.relocked and dossier.standing == "same" else None
        uncounted = f"signed by {', '.join(dossier.uncounted)}, not as committed" if dossier.uncounted else None
        stale = f"changed since: {'; '.join(dossier.stale)}" if dossier.stale else None
        return tuple(text for text in (standing, relocked, stale, signed, uncounted) if text)

    def to_json(self) -> dict[str, Any]:
        """The link as `audit --json` prints it."""
        manifest, dossier = self.dossier.manifest, self.dossier
        return {
            "artifact": dossier.artifact,
            "object": manifest.object if manifest else None,
            "stage": manifest.stage if manifest else None,
            "key": manifest.build.key() if manifest else None,
            "verdict": self.verdict,
            "inputs": [row._asdict() for row in manifest.build.inputs] if manifest else [],
            "lock": dossier.standing,
            "stale": list(dossier.stale),
            "signed_by": list(dossier.signers),
            "vouched": dossier.vouched,
            "faults": len(dossier.faults),
            "remarks": sorted(dossier.remarks),
        }


@dataclass(frozen=True)
class Audit:
    """The report on a chain."""

    lineage: Lineage | None  # None: the ref leads to no artifact
    links: Mapping[Digest, Link]  # parents first
    faults: tuple[Finding, ...]
    remarks: tuple[str, ...]  # worth knowing, and no fault
    blobs: int = 0  # read, each once
    read_bytes: int = 0
    commit: str = ""  # git's HEAD, whose lock and keys were believed; "" if there is none

    @property
    def is_ok(self) -> bool:
        """Whether nothing at all is wrong."""
        return not self.faults


def audit(work: Workspace, ref: Ref, strictness: Strictness) -> Audit:
    """Audit what a ref is now, and everything that it was made from.

    Raises:  NoSuchRef: nothing is built or locked under this name; UsageError: a configuration that cannot be read.
    """
    agreed, lock_fault = registry.read_lock(work.checkout)
    general = [Finding(work.checkout.config.lock, "a sound lock", lock_fault, kind="registry")] if lock_fault else []
    try:
        top = find_artifact(work, ref)
    except BadManifest as error:
        entry = agreed.get(work.checkout.objects.find(ref)) if ref.prefix is None else None
        if entry is None:
            expected, found = error.expected or "a sound pointer", error.found or error.what
            general.append(Finding(error.where, expected, found, kind="registry"))
            return Audit(None, {}, tuple(sorted(general)), ())
        top = entry.artifact  # what is wrong with the pointer is found again on the way
    return _Run(work, walk(work.store, top), agreed, strictness).report(ref, general)


class _Run:
    """One audit at work."""

    def __init__(self, work: Workspace, lineage: Lineage, agreed: Profile, strictness: Strictness) -> None:
        self.work, self.lineage, self.agreed, self.strictness = work, lineage, agreed, strictness
        self.readings = Readings(work.store, work.narrator.progress)
        self.refs = {manifest.digest: manifest.ref for manifest in lineage.manifests}
        self.keys = load_trusted_keys(work.checkout)
        self.committed = read_committed(work.checkout)
        self.uncommitted = anchors.uncommitted_keys(self.keys, self.committed)
        self.doubts = tuple(anchors.doubts(work.checkout, self.committed, self.keys))
        self.dossiers = {node.artifact: Dossier(node.artifact, "", node.manifest) for node in lineage}

    def report(self, ref: Ref, general: list[Finding]) -> Audit:
        """Read everything, then judge it."""
        self._label(ref)
        manifests = self.lineage.manifests
        self.readings.read(digest for manifest in manifests for digest in contents.blobs_of(manifest))
        self.readings.read_tables(digest for manifest in manifests for digest in contents.shards_of(manifest))
        for node in self.lineage:
            dossier = self.dossiers[node.artifact]
            if node.manifest is None:
                self._check_unknown(dossier, node.reason)
            else:
                self._check(dossier, node.manifest)
        check_families(self.dossiers.values())
        self._check_top(ref)
        self._check_worktree()
        links = {artifact: Link(dossier, _verdict(dossier)) for artifact, dossier in self.dossiers.items()}
        faults = set(general).union(*(dossier.faults for dossier in self.dossiers.values()))
        faults |= {doubt.finding for doubt in self.doubts if self.strictness.asks(doubt.options)}
        return Audit(
            self.lineage,
            links,
            tuple(sorted(faults)),
            tuple(sorted(self._remarks())),
            len(self.readings),
            self.readings.read_bytes,
            self.committed.commit,
        )

    def _label(self, ref: Ref) -> None:
        """object@stage; with the digest's beginning where two artifacts of the chain are of one object and stage."""
        counts = Counter(self.refs.values())
        for node in self.lineage:
            if node.manifest is not None:
                is_alone = counts[node.manifest.ref] == 1
                self.dossiers[node.artifact].label = node.name if is_alone else f"{node.name}#{node.artifact.short}"
        top = self.dossiers[self.lineage.top]
        top.label, top.named = top.label or str(ref), str(ref)
        for node in self.lineage:
            for row in node.inputs:
                parent = self.dossiers[row.artifact]
                parent.label = parent.label or f"{self.dossiers[node.artifact].label}, input {row.role}"

    def _check_unknown(self, dossier: Dossier, reason: str) -> None:
        for ref, entry in self.agreed.items():
            if entry.artifact == dossier.artifact:  # whatever is wrong with it here, it is what was agreed
                dossier.standing, dossier.named = "same", str(ref)
        fault = self.readings.fault(dossier.artifact)
        kind = MISSING if fault == MISSING else "manifest"
        dossier.fault(kind, "manifest", expected=dossier.artifact, found=fault or reason, blob=dossier.artifact)

    def _check(self, dossier: Dossier, manifest: Manifest) -> None:
        work = self.work
        contents.check_contents(dossier, manifest, self.readings)
        check_declarations(dossier, manifest, self.dossiers, work.checkout)
        registry.check_lock(dossier, manifest, self.agreed, self.refs)
        if self.strictness.counts(dossier):
            registry.standing_fault(dossier, manifest, self.agreed, self.refs, work.store)
        registry.check_pointer(dossier, manifest, work)
        registry.check_key(dossier, manifest, work.store)
        check_statements(dossier, manifest, work.store.attestations, self.keys, uncommitted=self.uncommitted)
        dossier.vouched = registry.vouched(dossier, manifest, self.agreed, work.store)
        if self.strictness.signed and not dossier.signers:
            reasons = "; ".join(f"by {name}, but {self.uncommitted[name]}" for name in dossier.uncounted)
            dossier.fault("signature", "signatures", expected="one by a trusted key", found=reasons or "none")
        if not self._check_committed(dossier, manifest) and self.strictness.worktree:
            dossier.fault(STALE, self.work.checkout.config.lock, expected="the committed entry", found="another")

    def _check_worktree(self) -> None:
        """Ask what is stale: last, as the project's own code runs then, and may do anything."""
        for artifact, answer in ask(self.work, [manifest.digest for manifest in self.lineage.manifests]).items():
            dossier = self.dossiers[artifact]
            if answer.unknown:
                dossier.remark(f"whether it is stale cannot be told: {answer.unknown}")
            # Other sources or another tokenizer than the checkout declares are faults whatever the working tree is for.
            dossier.stale = tuple(reason for reason in answer.reasons if reason not in ("sources", "tokenizer"))
            for reason in dossier.stale if self.strictness.worktree else ():
                dossier.fault(STALE, "working tree", expected="what it was built from", found=f"other {reason}")

    def _check_committed(self, dossier: Dossier, manifest: Manifest) -> bool:
        """Hold the artifact and its lock entry against git's HEAD.

        Returns: whether nothing differs that is not listed as a fault already.
        """
        if self.committed.lock is None:
            return True
        profile = self.work.checkout.profile
        is_committed = anchors.check_committed(dossier, manifest, self.agreed, profile, self.committed.lock)
        if dossier.relocked is None or self.strictness.other_machine:
            return is_committed
        anchors.relocked_fault(dossier, dossier.relocked, manifest, self.work.store)
        return True

    def _check_top(self, ref: Ref) -> None:
        """What was asked for must be what was found."""
        top = self.dossiers[self.lineage.top]
        if ref.prefix is None and top.manifest is not None:
            stage = self.work.checkout.objects.find(ref)
            if top.manifest.ref != stage:
                top.fault("registry", f"pointer of {stage}", expected=str(stage), found=str(top.manifest.ref))

    def _remarks(self) -> Iterator[str]:
        yield from (doubt.remark for doubt in self.doubts)
        for dossier in self.dossiers.values():
            yield from dossier.remarks
        dossiers = [dossier for dossier in self.dossiers.values() if dossier.manifest is not None]
        unsigned = [dossier for dossier in dossiers if not dossier.signers]
        if self.keys and unsigned:
            yield f"{len(unsigned)} of {len(dossiers)} artifacts carry no signature of a trusted key"
        for dossier in dossiers:
            if dossier.standing == "bytes" or dossier.relocked:
                yield (
                    f"{dossier.label}: other bytes under the lock's key come from another arithmetic, from a "
                    "build that does not reproduce, or from a forger; vpstore reproduce shows what this machine makes"
                )
        top = self.dossiers[self.lineage.top]
        if top.standing != "same" and not top.signers:
            yield f"{top.label}: nothing outside the store vouches for it: not the lock's, and not signed"


def _verdict(dossier: Dossier) -> Verdict:
    """The worst that is known."""
    kinds = {fault.kind for fault in dossier.faults}
    if kinds - {LOCK, STALE, MISSING}:
        return "FAULTY"
    if MISSING in kinds:
        return "missing"
    if dossier.standing not in ("same", "absent") or LOCK in kinds:
        return "differs"
    return "stale" if dossier.stale else "sound"
