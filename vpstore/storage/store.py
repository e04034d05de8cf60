"""The store: blobs, keys and attestations under one root, and the folders work is done in.

Place in the path: publish, resolve and verify are handed one. Many checkouts may share it.
Invariants: `format` is written last when a store is made, so a half-made one is no store; it says "vpstore 2" before
the first manifest of that format is there, so that a program that does not read it stops at once; only one builder
works on a key at a time; everything temporary lies on the same file system as the blobs.

Example:
    store = Store.find(Path.cwd())
    with store.lock(key): ...
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpstore.errors import NoStore
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Manifest
from vpstore.storage import atomic, beneath, modes
from vpstore.storage.attestations import Attestations
from vpstore.storage.blobs import Blobs
from vpstore.storage.keys import Keys
from vpstore.storage.locks import STORE, Locks
from vpstore.storage.roots import Roots
from vpstore.storage.stamps import Stamps

NAME: Final = ".vpstore"
FORMAT: Final = b"vpstore 2\n"
FIRST: Final = b"vpstore 1\n"  # with manifests of the first format alone; the layout is the same
ROOT_VARIABLE: Final = "VPSTORE_ROOT"
_MAKE_ONE: Final = "vpstore build makes one; vpstore pull makes one and fills it with what the lock names"
_FOLDERS: Final = ("blobs/blake3", "keys", "attestations", "roots", "tmp", "locks", "quarantine", "work")
_INNER: Final = ("roots/running", "tmp/partial")  # made when they are needed


@dataclass(frozen=True)
class Store:
    """One open store."""

    root: Path
    blobs: Blobs
    keys: Keys
    attestations: Attestations
    roots: Roots
    locks: Locks

    @classmethod
    def open(cls, root: Path, *, stamps: Stamps | None = None) -> Store:
        """Open the store at `root`.

        Raises:  NoStore: nothing there, or a format that this version does not read; VpstoreError: a folder of it is a
                 symbolic link, as git may bring one.
        """
        try:
            found = (root / "format").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise NoStore("there is no store here", where=str(root), next_step=_MAKE_ONE) from None
        except OSError as error:
            raise _unusable(root / "format", error) from error
        if found not in (FIRST, FORMAT):
            raise NoStore(
                "a store of another format",
                where=str(root / "format"),
                expected=f"{FIRST.decode().strip()} or {FORMAT.decode().strip()}",
                found=repr(found[:40]),
                next_step="use the version of vpstore that wrote it, or another VPSTORE_ROOT",
            )
        for name in _FOLDERS:  # copying tools leave out empty ones
            try:
                beneath.make_plain_directory(root / name, root)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):  # who can only read may need none
                    raise _unusable(root / name, error) from error
        for name in _INNER:
            beneath.refuse_links(root / name, root)
        tmp = root / "tmp"
        blobs = Blobs(root / "blobs" / "blake3", tmp, root / "quarantine", stamps or Stamps())
        locks = Locks(root / "locks")
        roots = Roots(root / "roots", tmp, locks)
        return cls(root, blobs, Keys(root / "keys", tmp), Attestations(root / "attestations", tmp), roots, locks)

    @classmethod
    def create(cls, root: Path, *, stamps: Stamps | None = None) -> Store:
        """Open the store at `root`, making it first if there is none.

        Raises:  NoStore: the folder holds something else.
        """
        if not (root / "format").exists():
            strangers = {path.name for path in root.iterdir()} - {"tmp", *_tops()} if root.is_dir() else set()
            if strangers:
                raise NoStore(
                    "a folder that is no store is not empty",
                    where=str(root),
                    found=", ".join(sorted(strangers)[:5]),
                    next_step="name an empty or absent folder in VPSTORE_ROOT",
                )
            try:
                for name in _FOLDERS:
                    beneath.make_plain_directory(root / name, root)
                    atomic.fsync_up((root / name).parent, root.parent)  # who made it may have died before that
            except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:  # a file, a link to nothing
                next_step = "move away what lies there, or name another folder in VPSTORE_ROOT"
                raise NoStore(
                    "a store cannot be made here", where=str(root), found=str(error), next_step=next_step
                ) from None
            with Locks(root / "locks").shared(STORE):  # makes the lock's file, which those who only read need, too
                atomic.write_file(root / "format", FORMAT, folder=root / "tmp")
        return cls.open(root, stamps=stamps)

    @classmethod
    def find(cls, start: Path, *, stamps: Stamps | None = None) -> Store:
        """Open the store that serves `start`.

        Raises:  NoStore: VPSTORE_ROOT names none, and no folder upwards has one.
        """
        root = locate(start)
        if root is None:
            raise NoStore(
                "there is no store",
                where=str(start),
                expected=f"a {NAME} folder here or upwards, or {ROOT_VARIABLE}",
                next_step=_MAKE_ONE,
            )
        return cls.open(root, stamps=stamps)

    def manifest(self, artifact: Digest, *, what: str = "") -> Manifest:
        """The manifest of an artifact, verified as it is read.

        Raises:  BlobMissing, DigestMismatch, BadManifest.
        """
        label = f"manifest of {what}" if what else "manifest"
        return Manifest.decode(self.blobs.read(artifact, what=label), where=f"{label} {artifact}")

    def read(self, digest: Digest) -> bytes:
        """The bytes of a blob, verified as they are read.

        Raises:  BlobMissing, DigestMismatch.
        """
        return self.blobs.read(digest)

    def settle(self) -> None:
        """Make durable every blob's name that was stored or found, before anything that lasts may name them."""
        self.blobs.settle()
        atomic.fsync_up(self.blobs.root.parent, self.root)

    def put_manifest(self, manifest: Manifest) -> None:
        """Store a manifest all of whose blobs are here, whoever stored them: durable, names too, when this returns."""
        self.announce(manifest)
        self.blobs.rely_on(manifest.blobs())
        self.settle()
        self.blobs.put_bytes(manifest.encoded)
        self.settle()

    def announce(self, manifest: Manifest) -> None:
        """Say, before a manifest of the second format is stored, that there are such; durable when this returns."""
        path = self.root / "format"
        if manifest.build.format > 1 and path.read_bytes() == FIRST:
            atomic.write_file(path, FORMAT, folder=self.root / "tmp")
            atomic.fsync_directory(self.root)

    def scratch(self, key: Digest) -> Path:
        """The folder in which one key is built; it survives an interruption."""
        folder = self.root / "work" / key.hex
        beneath.make_plain_directory(folder, self.root)
        return folder

    def drop_scratch(self, key: Digest) -> None:
        """Remove the folder of a build; one that this user cannot empty is set aside, for its owner's `gc`.

        Nobody else's build waits for the owner of what a killed process left there and shut.
        """
        folder = self.root / "work" / key.hex
        try:
            atomic.remove_tree(folder)
        except PermissionError:
            atomic.rename(folder, folder.with_name(f"{key.hex}-{os.urandom(8).hex()}"))

    def lock(self, key: Digest, *, waiting: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold the right to build `key`; the kernel frees it when the process ends, however it ends.

        Args:    waiting: called once if somebody else holds it.
        """
        return self.locks.exclusive(key.hex, waiting=waiting)

    def changing(self, *, waiting: Callable[[], None] = lambda: None) -> AbstractContextManager[None]:
        """Keep `gc` from sweeping while blobs are stored or found that no root leads to yet. Many may hold it."""
        return self.locks.shared(STORE, waiting=waiting)

    def sweeping(self, *, waiting: Callable[[], None] = lambda: None) -> AbstractContextManager[None]:
        """Be the only one who changes the store: for `gc`, while it marks and sweeps."""
        return self.locks.exclusive(STORE, waiting=waiting)


def locate(start: Path) -> Path | None:
    """The root of the store that serves `start`: VPSTORE_ROOT, else the nearest .vpstore upwards; None if neither."""
    named = os.environ.get(ROOT_VARIABLE)
    if named:
        return Path(named).absolute()
    for folder in (start.absolute(), *start.absolute().parents):
        if (folder / NAME).is_dir():
            return folder / NAME
    return None


def _unusable(path: Path, error: OSError) -> NoStore:
    if isinstance(error, PermissionError):
        next_step = "its owner, or root, lets this user use it; vpstore doctor lists all that is shut, and says how"
        found = "; ".join(part for part in (str(error.strerror), modes.whose(path)) if part)
        return NoStore("the store is shut to this user", where=str(path), found=found, next_step=next_step)
    return NoStore(
        "the store lacks a part that cannot be had",
        where=str(path),
        found=str(error.strerror),
        next_step="look at what lies there; a folder that is missing is made by whoever may write to the store",
    )


def _tops() -> set[str]:
    return {name.split("/")[0] for name in _FOLDERS}
