"""The order of writes, read off the recorded calls of a run."""

from __future__ import annotations

from collections.abc import Collection, Sequence

# What may come right before each, leaving out everything that is not one of these. A root may stand alone: a view of a
# parent is shown, and held, before the recipe runs.
BEFORE = {
    "blob": {"", "blob", "root", "pointer"},
    "manifest": {"", "blob", "root", "pointer"},
    "attestation": {"manifest"},
    "key": {"attestation"},
    "root": {"", "key", "root", "pointer"},
    "artifact of the pointer": {"key", "root"},
    "pointer": {"key", "root", "artifact of the pointer"},
}
_PARTS = {
    ".artifact": "artifact of the pointer",
    "/roots/running/": "running root",
    "/attestations/": "attestation",
    "/keys/": "key",
    "/roots/": "root",
    "/refs/": "pointer",
}


def faults_of_order(calls: Sequence[tuple[str, str, str]], manifests: Collection[str]) -> list[str]:
    """Everything in a run that was done too early.

    Args:    calls: operation, path, second path; manifests: the ends of the paths of blobs that are manifests.
    """
    return [*_renames(calls), *_ranks(calls, manifests)]


def _renames(calls: Sequence[tuple[str, str, str]]) -> list[str]:
    """Bytes are durable before they have a name, and the name before anything else is done."""
    found = []
    synced: set[str] = set()
    for number, (operation, path, target) in enumerate(calls):
        if operation == "write":
            synced.discard(path)
        elif operation == "fsync":
            synced.add(path)
        elif operation == "rename":
            if path not in synced and ".changed-" not in target:
                found.append(f"{target} was named before its bytes were durable")
            folder = target.rpartition("/")[0]
            if calls[number + 1 : number + 2] != [("fsync", folder, "")]:
                found.append(f"something was done before {folder} was durable")
    return found


def _ranks(calls: Sequence[tuple[str, str, str]], manifests: Collection[str]) -> list[str]:
    """Nothing has a name before what it leads to."""
    found, last = [], ""
    for operation, _, target in calls:
        kind = _kind(target, manifests) if operation == "rename" else ""
        if kind not in BEFORE:
            continue
        if last not in BEFORE[kind]:
            found.append(f"{kind} after {last}: {target}")
        last = kind
    return found


def _kind(target: str, manifests: Collection[str]) -> str:
    if "/blobs/" in target:
        return "manifest" if any(target.endswith(end) for end in manifests) else "blob"
    return next((kind for part, kind in _PARTS.items() if part in target), "")
