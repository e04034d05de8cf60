"""attest, export, export --check: the functions that sign an artifact and hand it out.

Place in the path: composes verbs into what a person calls; the command line is a skin over it.

Example:
    api.attest("vpMoE", key=Path("release.pem"), out=Path("vpMoE.sig"))
    api.export("vpMoE", Path("/tmp/vpMoE"))
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vpstore.errors import UsageError
from vpstore.runner import LoadedRunner, ResolvedInput, load_runner
from vpstore.schema.digest import Digest
from vpstore.schema.export_record import ExportRecord
from vpstore.schema.fault import Fault
from vpstore.schema.ref import Ref, StageRef, parse_ref
from vpstore.signatures import load_signing_key
from vpstore.verbs.attest import (
    refuse_for_bundle,
    refuse_place,
    sign_build,
    sign_files,
    store_envelope,
    write_bundle,
)
from vpstore.verbs.export import aside, convert, fill, refuse_target
from vpstore.verbs.export import export as export_artifact
from vpstore.verbs.export_check import PLAIN, differing, folder_faults, read_record
from vpstore.verbs.materialize import materialize, view_path
from vpstore.verbs.resolve import resolve as resolve_ref
from vpstore.workspace import Workspace


@dataclass(frozen=True)
class Attested:
    """What was signed, with which key, and where the signatures lie."""

    ref: StageRef
    artifact: Digest
    keyid: str
    algorithm: str
    envelope: Path  # in the store
    is_new: bool  # False: this key had signed the same statement before
    bundle: Path | None  # the Model Signing bundle, if one was asked for
    view: Path  # the directory that the bundle is about

    def to_json(self) -> dict[str, Any]:
        """The document as `attest --json` prints it."""
        return {
            "ref": str(self.ref),
            "artifact": self.artifact,
            "keyid": self.keyid,
            "algorithm": self.algorithm,
            "envelope": str(self.envelope),
            "is_new": self.is_new,
            "bundle": None if self.bundle is None else str(self.bundle),
            "view": str(self.view),
        }


@dataclass(frozen=True)
class CheckedExport:
    """An exported folder and everything that is wrong with it."""

    ref: StageRef
    artifact: Digest
    path: Path
    to: str
    is_known: bool  # the artifact is in the store: the folder was held against it, not against its own record alone
    faults: tuple[Fault, ...]  # sorted

    @property
    def is_ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """The document as `export --check --json` prints it."""
        head = {
            "ok": self.is_ok,
            "ref": str(self.ref),
            "artifact": self.artifact,
            "to": self.to,
            "path": str(self.path),
        }
        return {**head, "is_known": self.is_known, "faults": [fault.to_json() for fault in self.faults]}


@dataclass(frozen=True)
class Exported:
    """An artifact and the plain directory that now holds it."""

    ref: StageRef
    artifact: Digest
    path: Path
    files: int  # with artifact.json
    size_bytes: int  # without it
    to: str  # the format; of others than plain files, a dry run counts those of the artifact

    def to_json(self) -> dict[str, Any]:
        """The document as `export --json` prints it."""
        return {
            "ref": str(self.ref),
            "artifact": self.artifact,
            "to": self.to,
            "path": str(self.path),
            "files": self.files,
            "size_bytes": self.size_bytes,
        }


def attest(
    ref: str, *, key: Path, out: Path | None = None, work: Workspace | None = None, is_dry_run: bool = False
) -> Attested:
    """Sign what is known of an artifact's build, and with `out` also its files as a Model Signing bundle.

    Args:    key: a private key as PEM; out: where the bundle goes, outside store and views; is_dry_run: sign, to see
             that it can be done, but write nothing.
    Raises:  UsageError: the key or the place will not do; as `resolve`.
    """
    work = work or Workspace.find(Path.cwd())
    signing_key = load_signing_key(key)
    if key.stat().st_mode & 0o077:
        work.narrator.warn(f"others have access to the private key {key}; chmod 600 it")
    if out is not None:
        refuse_for_bundle(signing_key)
        refuse_place(work, out, key=key)
    found = resolve_ref(work, parse_ref(ref))
    envelope = sign_build(work, found.manifest, signing_key)
    view = view_path(work, found.manifest) if out is None or is_dry_run else materialize(work, found.manifest)
    bundle = None if out is None else sign_files(work, found.manifest, signing_key, view=view)
    path = work.store.attestations.envelope_path(found.artifact, envelope)
    is_new = not path.exists()
    if not is_dry_run:
        store_envelope(work, found.manifest, envelope)
        if out is not None and bundle is not None:
            write_bundle(out, bundle)
    return Attested(
        found.ref, found.artifact, signing_key.id, signing_key.algorithm, path, is_new, out, view
    )  # fmt: skip


def export(
    ref: str, directory: Path, *, to: str = PLAIN, work: Workspace | None = None, is_dry_run: bool = False
) -> Exported:
    """Write an artifact as a directory of real files, whole or not at all.

    Args:    directory: absent or empty. to: plain files, or a format that the project's runner offers.
    Raises:  UsageError: something is there, it lies in the store or among the views, or nobody offers that format;
             RecipeRefused: the artifact is not what the format is for; as `resolve`.
    """
    work = work or Workspace.find(Path.cwd())
    target = Path(os.path.abspath(directory))
    runner = None if to == PLAIN else _offering(work, to)
    refuse_target(work, target)
    found = resolve_ref(work, parse_ref(ref))
    manifest = found.manifest
    files, size_bytes = len(manifest.files) + 1, manifest.size_bytes
    if runner is not None and not is_dry_run:
        source = ResolvedInput("source", str(manifest.ref), manifest.digest, materialize(work, manifest))
        progress = work.narrator.progress
        write = partial(runner.export, to, source, progress=progress)
        record = convert(work, manifest, target, write, to=to)
        files, size_bytes = len(record.files) + 1, sum(row.size_bytes for row in record.files.values())
    elif not is_dry_run:
        export_artifact(work, manifest, target)
    return Exported(found.ref, found.artifact, target, files, size_bytes, to)


def export_check(directory: Path, *, work: Workspace | None = None) -> CheckedExport:
    """Hold an exported folder against its record, and against a fresh export of the same artifact.

    Without the artifact in the store only the record speaks, and the narrator says so.
    Raises:  UsageError: no folder that `export` wrote; BadManifest: a record that is not of its form; as `export`.
    """
    work = work or Workspace.find(Path.cwd())
    folder = Path(os.path.abspath(directory))
    record = read_record(folder)
    faults = folder_faults(folder, record)
    is_known = work.store.blobs.has(record.artifact)
    if not is_known:
        work.narrator.warn(f"{record.ref}, {record.artifact.short} is not in this store: the record alone was held")
    elif record.to != PLAIN:
        known = {fault.where for fault in faults}
        faults += [fault for fault in differing(record, _again(work, record)) if fault.where not in known]
    return CheckedExport(record.ref, record.artifact, folder, record.to, is_known, tuple(sorted(faults)))


def _again(work: Workspace, record: ExportRecord) -> ExportRecord:
    """The record of a fresh export, which is made among the store's unfinished files and removed again."""
    runner = _offering(work, record.to)
    found = resolve_ref(work, Ref(record.ref.object, prefix=record.artifact.hex))
    source = ResolvedInput("source", str(found.ref), found.artifact, materialize(work, found.manifest))
    write = partial(runner.export, record.to, source, progress=work.narrator.progress)
    with aside(work, found.manifest) as fresh:
        return fill(fresh, found.manifest, write, to=record.to)


def _offering(work: Workspace, to: str) -> LoadedRunner:
    runner = load_runner(work.checkout)
    offered = {PLAIN: "the artifact's own files", **runner.exporters()}
    if to not in offered:
        raise UsageError(
            "nobody exports to that format",
            where=f"--to {to}",
            expected="; ".join(f"{name} ({what})" for name, what in sorted(offered.items())),
            next_step="name one of these; others come from `exporters` of the project's runner",
        )
    return runner
