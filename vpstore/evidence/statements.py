"""Statements: whether the attestations of an artifact are sound, about it, and signed by somebody who is trusted.

Place in the path: evidence from builders and signers. A bare statement proves no more than that somebody who could
write into the store said so; a trusted signature is the one witness besides the lock.
Invariants: a build statement must say exactly what the manifest says, apart from time, environment and commit; an
unsigned artifact is no fault, a signature that claims a trusted key and is not its own is one.

Example:
    check_statements(dossier, manifest, work.store.attestations, keys)
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from vpstore.errors import VpstoreError
from vpstore.evidence.dossier import Dossier
from vpstore.schema.attestation import Statement
from vpstore.schema.manifest import Manifest
from vpstore.schema.reproduction import Reproduction
from vpstore.signatures import TrustedKey, open_envelope
from vpstore.storage.attestations import ENVELOPE_SUFFIX, Attestations
from vpstore.storage.refusals import read_plain


def check_statements(
    dossier: Dossier,
    manifest: Manifest,
    attestations: Attestations,
    keys: Sequence[TrustedKey],
    *,
    uncommitted: Container[str] = (),
) -> None:
    """Read every attestation of an artifact and hold it against the manifest.

    Args:    uncommitted: the names of keys whose signatures are told and do not count.
    """
    count = 0
    signers: set[str] = set()
    for path in attestations.paths(manifest.digest):
        is_sound = _check(dossier, manifest, path, attestations)
        count += is_sound
        names = _signers(dossier, path, keys) if path.suffix == ENVELOPE_SUFFIX else ()
        if is_sound:  # a true signature under a statement about something else vouches for nothing here
            signers.update(names)
    if count == 0:
        dossier.fault("attestation", "attestations", expected="at least one sound one of a build", found="none")
    dossier.signers = tuple(sorted(name for name in signers if name not in uncommitted))
    dossier.uncounted = tuple(sorted(name for name in signers if name in uncommitted))


def _signers(dossier: Dossier, path: Path, keys: Sequence[TrustedKey]) -> tuple[str, ...]:
    try:
        return open_envelope(read_plain(path, "reading an attestation"), keys, where=path.name).signers
    except (VpstoreError, OSError) as error:
        _refuse(dossier, f"signature {path.name[:12]}", error, kind="signature")
        return ()


def _check(dossier: Dossier, manifest: Manifest, path: Path, attestations: Attestations) -> bool:
    """Hold one attestation against the manifest.

    Returns: whether it is a sound statement of a build.
    """
    what = f"attestation {path.name[:12]}{path.suffix if path.suffix == ENVELOPE_SUFFIX else ''}"
    try:
        found = attestations.read(path)
    except (VpstoreError, OSError) as error:
        _refuse(dossier, what, error, kind="attestation")
        return False
    if isinstance(found, Reproduction):
        _check_reproduction(dossier, manifest, found, what)
        return False
    expected = Statement.of(manifest, found.facts).document
    faults = list(differing(expected, found.document))
    for place, said, meant in faults:
        dossier.fault("attestation", f"{what}, {place}", expected=meant, found=said)
    return not faults


def _check_reproduction(dossier: Dossier, manifest: Manifest, found: Reproduction, what: str) -> None:
    if found.key != manifest.build.key():
        dossier.fault("attestation", f"{what}, build key", expected=manifest.build.key(), found=found.key)
    if found.subject.name != str(manifest.ref):
        dossier.fault("attestation", f"{what}, subject", expected=str(manifest.ref), found=found.subject.name)
    outcome = found.outcome
    if outcome.result != "PASSED":
        gave = f", it gave {outcome.rebuilt.short}" if outcome.rebuilt is not None else ""
        dossier.remark(f"a reproduction {found.facts.finished_on} came out {outcome.result}{gave}")


def _refuse(dossier: Dossier, what: str, error: VpstoreError | OSError, *, kind: str) -> None:
    if isinstance(error, VpstoreError):
        expected, found = error.expected or "a sound one", error.found or error.what
        dossier.fault(kind, f"{what}, {error.what}", expected=expected, found=found)
    else:
        dossier.fault(kind, what, expected="a readable file", found=str(error.strerror))


def differing(meant: Any, said: Any, place: str = "") -> Iterator[tuple[str, str, str]]:
    """Where two JSON values differ: the dotted place, what is said there and what is meant; both cut short."""
    if isinstance(meant, dict) and isinstance(said, dict):
        for name in sorted(meant.keys() | said.keys()):
            yield from differing(meant.get(name), said.get(name), f"{place}.{name}" if place else name)
    elif isinstance(meant, list) and isinstance(said, list) and len(meant) == len(said):
        for number, (left, right) in enumerate(zip(meant, said, strict=True)):
            yield from differing(left, right, f"{place}[{number}]")
    elif meant != said or isinstance(meant, bool) != isinstance(said, bool):
        yield place, _text(said), _text(meant)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} entries"
    return "nothing" if value is None else str(value)[:120]
