"""Breakages on purpose: each takes one promise out of the program, and the sweep must say so.

Each function is called in the child before the scenario runs, with the faulty disk, and changes the program there only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faulty_disk import FaultyDisk

import vpstore.building as building
from vpstore.schema.digest import Digest
from vpstore.storage import atomic, system
from vpstore.storage.blobs import Blobs
from vpstore.storage.pointers import Pointer, Pointers
from vpstore.storage.roots import CheckoutRoot, Roots
from vpstore.storage.store import Store
from vpstore.workspace import Workspace


def no_file_fsync(disk: FaultyDisk) -> None:
    """Files get their names before their bytes are durable."""

    def settle(self: atomic.TemporaryFile, *, mode: int = atomic.READ_ONLY) -> None:
        os.fchmod(self._file.fileno(), mode)
        self._file.close()

    atomic.TemporaryFile.settle = settle  # type: ignore[method-assign]
    atomic.fsync_file = lambda path: None


def no_directory_fsync(disk: FaultyDisk) -> None:
    """Names are never made durable."""
    atomic.fsync_directory = lambda path, within=None: None


def rename_before_fsync(disk: FaultyDisk) -> None:
    """Each file is renamed first and made durable afterwards."""
    no_file_fsync(disk)

    def rename(source: Path, target: Path) -> None:
        system.disk.rename(source, target)
        descriptor = os.open(target, os.O_RDONLY)
        system.disk.fsync(descriptor)
        os.close(descriptor)
        atomic.fsync_directory(target.parent)

    atomic.rename = rename


def nothing_found_is_settled(disk: FaultyDisk) -> None:
    """A blob that another process wrote is taken as durable."""
    Store.settle = lambda self: None  # type: ignore[method-assign]


def pointer_before_manifest(disk: FaultyDisk) -> None:
    """The pointer is written first, the manifest last."""
    put, finish, late = Blobs.put_bytes, building._finish, []

    def put_bytes(self: Blobs, data: bytes) -> Digest:
        if data.startswith(b'{"build":'):
            late.append(data)
            return Digest.of(data)
        return put(self, data)

    def finish_first(work: Any, manifest: Any, **rest: Any) -> Any:
        work.checkout.pointers.write(Pointer(manifest.ref, manifest.digest, manifest.build.key()))
        while late:
            put(work.store.blobs, late.pop())
        return finish(work, manifest, **rest)

    Blobs.put_bytes = put_bytes  # type: ignore[method-assign]
    building._finish = finish_first


def pointer_in_place(disk: FaultyDisk) -> None:
    """The pointer's file is overwritten where it lies."""

    def write(self: Pointers, pointer: Pointer) -> bool:
        path = self.path(pointer.ref)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as out:
            system.disk.write(out.fileno(), memoryview(pointer.encode()))
            system.disk.fsync(out.fileno())
        return True

    Pointers.write = write  # type: ignore[method-assign]


def no_digest_check(disk: FaultyDisk) -> None:
    """Whatever has a blob's name is taken for the blob."""
    Blobs.is_whole = lambda self, digest, full=False: self.has(digest)  # type: ignore[method-assign]
    Blobs.ensure = lambda self, digest, what, full=False: None  # type: ignore[method-assign]


def nobody_reads(disk: FaultyDisk) -> None:
    """verify takes every blob for what its name says, too."""
    import vpstore.evidence.verification as verifying

    no_digest_check(disk)
    verifying._fault_of = lambda found, digest: ""


def any_attestation(disk: FaultyDisk) -> None:
    """What an attestation said once is believed for ever."""
    from vpstore.storage.attestations import Attestations

    real, known = Attestations.read, {}

    def read(self: Attestations, path: Path) -> Any:
        if path not in known:
            known[path] = real(self, path)
        return known[path]

    Attestations.read = read  # type: ignore[method-assign]


def tracebacks(disk: FaultyDisk) -> None:
    """The operating system's refusals reach the person as they are."""

    @contextmanager
    def bare(where: Path | str, doing: str) -> Iterator[None]:
        yield

    atomic.disk_errors = bare


def litter(disk: FaultyDisk) -> None:
    """Temporary files stay when something fails."""
    atomic.TemporaryFile.__exit__ = lambda self, *error: self._file.close()  # type: ignore[method-assign]


def short_writes(disk: FaultyDisk) -> None:
    """One write is taken for all of it."""

    def write(self: atomic.TemporaryFile, data: bytes) -> int:
        system.disk.write(self._file.fileno(), memoryview(data).cast("B"))
        self._state.update(data)
        self.size_bytes += len(data)
        return len(data)

    atomic.TemporaryFile.write = write  # type: ignore[method-assign, assignment]


def unchecked_short_writes(disk: FaultyDisk) -> None:
    """As before, and the size is not held against what was written."""
    short_writes(disk)

    def settle(self: atomic.TemporaryFile, *, mode: int = atomic.READ_ONLY) -> None:
        os.fchmod(self._file.fileno(), mode)
        system.disk.fsync(self._file.fileno())
        self._file.close()

    atomic.TemporaryFile.settle = settle  # type: ignore[method-assign]


def blobs_before_keys(disk: FaultyDisk) -> None:
    """gc removes blobs first, and then the keys that lead to them."""
    import vpstore.verbs.gc as collecting

    real = collecting._Sweep.carry_out

    def carry_out(self: Any) -> None:
        for path in (*map(self.store.blobs.path, self.plan.manifests), *self.plan.blobs):
            atomic.remove(path)
        self.plan.manifests.clear()
        self.plan.blobs.clear()
        real(self)

    collecting._Sweep.carry_out = carry_out


def pointers_before_blobs(disk: FaultyDisk) -> None:
    """pull writes the pointers first, and then fetches what they name."""
    receive, done = Blobs.receive, []

    def receive_late(self: Blobs, *arguments: Any, **rest: Any) -> None:
        if not done:
            done.append(True)
            work = Workspace.find(Path.cwd())
            for ref, entry in work.checkout.lock().profiles["tiny"].items():
                work.checkout.pointers.add(Pointer(ref, entry.artifact, entry.key))
        receive(self, *arguments, **rest)

    Blobs.receive = receive_late  # type: ignore[method-assign, assignment]


def undurable_root(disk: FaultyDisk) -> None:
    """What a checkout has is recorded, and never made durable."""

    def write(self: Roots, record: CheckoutRoot) -> None:
        target = self.path(record.checkout, record.identity)
        with target.with_suffix(".new").open("wb", buffering=0) as out:
            system.disk.write(out.fileno(), memoryview(record.encode()))
        system.disk.rename(target.with_suffix(".new"), target)

    Roots._write = write  # type: ignore[method-assign]


# Which sweep must find it: the scenario, the kind of fault, which calls (part of a path), and what it is accused of.
CONTROLS = {
    "no_file_fsync": ("pointer update", "power cut", "", "lost in a power cut"),
    "no_directory_fsync": ("pointer update", "kill after", "", "lost in a power cut"),
    "rename_before_fsync": ("pointer update", "power cut, names kept", "", "does not resolve"),
    "nothing_found_is_settled": (
        "first build, store included",
        "kill after",
        "/blobs/blake3/",
        "missing|lost in a power cut",
    ),
    "pointer_before_manifest": ("publish of two artifacts", "kill after", "/refs/", "does not resolve|not here"),
    "pointer_in_place": ("pointer update", "kill before", "", "does not resolve"),
    "no_digest_check": ("blobs over damaged ones", "kill before", "", "verify: store: blob"),
    "blobs_before_keys": ("gc", "kill after", "", "a key leads to what is not here"),
    "pointers_before_blobs": (
        "pull to a fresh clone",
        "kill after",
        "/partial/",
        "a pointer leads to what is not here",
    ),
    "undurable_root": ("first build, store included", "power cut", "/tiny/refs/", "no root keeps|BadManifest"),
    "tracebacks": ("pointer update", "EIO", "", "traceback"),
    "litter": ("pointer update", "EIO", "", "left behind"),
    "short_writes": ("pointer update", "short write", "", "not continued"),
    "unchecked_short_writes": ("pointer update", "short write", "", "does not resolve|JSON"),
}
