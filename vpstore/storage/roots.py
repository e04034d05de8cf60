"""Roots: what must not be collected, because a checkout has it or a process is at work on it.

Place in the path: whoever makes a pointer, a view or a lock entry first records its artifact here; builds and pulls say
here what they need while they run; `gc` starts from here. Nobody has to keep a list: checkouts register themselves.
On disk: `roots/<id>.json`, one a checkout, and `roots/running/<pid>-<random>.json`, one a process at work, which the
process holds locked for as long as it lives.
Invariants: a root is durable before anything relies on it, and none appears while `gc` sweeps; what a checkout has now
is read from the checkout, these files say where it is and what to keep if it cannot be read; a root of a process that
died is known by its free lock.

Example:
    with store.roots.running(artifacts=parents): ...
    with store.changing(): store.roots.hold(checkout.root, "tiny/vpMoE@smoke", artifact); pointers.write(...)
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpstore.errors import BadManifest, VpstoreError
from vpstore.schema.canonical import parse_strict, readable_bytes
from vpstore.schema.digest import Digest
from vpstore.schema.fields import Fields
from vpstore.storage import atomic
from vpstore.storage.locks import STORE, Locks, is_taken, release, take

FORMAT: Final = 1
_RUNNING: Final = "running"
_AS_BYTES: Final = "bytes:"


@dataclass(frozen=True)
class CheckoutRoot:
    """What one checkout was last known to have."""

    checkout: Path
    artifacts: Mapping[str, Digest]  # profile/object@stage, or a view or lock entry -> artifact
    identity: str = ""  # tells checkouts at one path apart (containers, hosts); empty where that cannot be

    def encode(self) -> bytes:
        """The bytes of the file; they name their own digest, as one flipped bit could make `gc` keep too little."""
        document = {"checkout": _path_text(self.checkout), "identity": self.identity, "artifacts": dict(self.artifacts)}
        return readable_bytes({"format": FORMAT, **document, "digest": Digest.of(readable_bytes(document))})

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> CheckoutRoot:
        """Read the file.

        Raises:  BadManifest: not such a document.
        """
        fields = Fields(parse_strict(data, where=where), where=where)
        fields.format(FORMAT)
        checkout = _path_of(fields.text("checkout"), where=where)
        identity = fields.optional("identity", str) or ""
        table = fields.take("artifacts", dict)
        stated = fields.optional_digest("digest")  # absent from files of the first versions
        fields.done()
        artifacts = {name: Digest.parse(value, where=f"{where}: {name}") for name, value in table.items()}
        record = cls(checkout, artifacts, identity)
        if stated is not None and record.encode() != data:
            raise BadManifest("a root file does not match its own digest", where=where, expected=stated)
        return record


@dataclass(frozen=True)
class RunningRoot:
    """What one process needs while it is at work."""

    path: Path
    artifacts: frozenset[Digest] = frozenset()
    blobs: frozenset[Digest] = frozenset()

    @property
    def label(self) -> str:
        """The process, for messages."""
        return f"process {self.path.name.partition('-')[0]}"


@dataclass(frozen=True)
class Roots:
    """The roots of one store."""

    root: Path
    tmp: Path
    locks: Locks

    @property
    def is_writable(self) -> bool:
        """Whether this user may record anything here."""
        return os.access(self.root, os.W_OK)

    def path(self, checkout: Path, identity: str = "") -> Path:
        """The file of one checkout."""
        name = os.fsencode(checkout.absolute()) + (b"\0" + identity.encode() if identity else b"")
        return self.root / f"{Digest.of(name).hex[:32]}.json"

    def hold(self, checkout: Path, name: str, artifact: Digest) -> None:
        """As `hold_all`, for one name of a checkout that is known by its path alone."""
        self.hold_all(checkout, {name: artifact})

    def hold_all(self, checkout: Path, artifacts: Mapping[str, Digest], *, identity: str = "") -> None:
        """Record that a checkout now has these artifacts; durable when this returns.

        Whoever calls it keeps `Store.changing()` until the pointer, view or lock itself is there: `gc` goes by those.
        """
        path = self.path(checkout, identity)
        with self.locks.shared(STORE), self.locks.exclusive(f"root-{path.stem}"):
            before = self._read(path) if path.exists() else CheckoutRoot(checkout.absolute(), {}, identity)
            after = CheckoutRoot(before.checkout, {**before.artifacts, **artifacts}, identity)
            if after.artifacts == before.artifacts:
                atomic.fsync_directory(self.root)  # who wrote it may have died before that
            else:
                self._write(after)

    def holds(self, checkout: Path, artifacts: Mapping[str, Digest], *, identity: str = "") -> bool:
        """Whether all of this is recorded; changes nothing, and works in a store that can only be read."""
        path = self.path(checkout, identity)
        return path.exists() and artifacts.items() <= self._read(path).artifacts.items()

    def replace(self, before: CheckoutRoot | None, after: CheckoutRoot) -> None:
        """Make the record say what the checkout has now; for `gc`, under `Store.sweeping()`."""
        if before != after:
            self._write(after)

    def drop(self, record: CheckoutRoot) -> None:
        """Remove a record; for `gc`, under `Store.sweeping()`."""
        atomic.remove(self.path(record.checkout, record.identity))
        atomic.fsync_directory(self.root)

    def forget(self, checkout: Path) -> bool:
        """Drop all records of a path whose checkout is gone for good.

        Returns: whether there was one.
        """
        with self.locks.exclusive(STORE):
            records = [record for record in self.checkouts() if record.checkout == checkout.absolute()]
            for record in records:
                self.drop(record)
        return bool(records)

    def checkouts(self) -> tuple[CheckoutRoot, ...]:
        """Every registered checkout, by path.

        Raises:  BadManifest: a root file is damaged; collecting must not go on then. VpstoreError: one is unreadable.
        """
        found = [self._read(path) for path in atomic.entries(self.root) if path.suffix == ".json"]
        return tuple(sorted(found, key=lambda record: (record.checkout, record.identity)))

    def damage(self) -> Iterator[VpstoreError]:
        """What is wrong with the files of checkouts that cannot be believed."""
        for path in [path for path in atomic.entries(self.root) if path.suffix == ".json"]:
            try:
                self._read(path)
            except VpstoreError as error:
                yield error

    @contextmanager
    def running(self, *, artifacts: Collection[Digest] = (), blobs: Collection[Digest] = ()) -> Iterator[None]:
        """Say, for as long as the context lasts, that artifacts and blobs are needed, whether or not they are here.

        It begins when no sweep is at work, so what is found afterwards stays until the end. An artifact on its way
        whose manifest is not here yet is named in `blobs` too, with all else that it needs; of one that is not, nobody
        can tell what it needs, and `gc` then keeps every blob.
        """
        folder = self.root / _RUNNING
        data = readable_bytes({"format": FORMAT, "artifacts": sorted(artifacts), "blobs": sorted(blobs)})
        path = atomic.temporary_name(folder).with_suffix(".json")
        with atomic.disk_errors(path, "registering a process"):
            descriptor = self._register(path, data)
        try:
            yield
        finally:
            try:
                with atomic.disk_errors(path, "registering a process"):
                    atomic.remove(path)
            finally:
                release(descriptor)

    def at_work(self) -> tuple[RunningRoot, ...]:
        """What living processes need.

        Raises:  BadManifest: the file of a living process cannot be read.
        """
        return tuple(root for path in self._running() if _is_held(path) and (root := _read_running(path)) is not None)

    def abandoned(self) -> tuple[Path, ...]:
        """The files of processes that died at work."""
        return tuple(path for path in self._running() if not _is_held(path))

    def _running(self) -> list[Path]:
        return [path for path in atomic.entries(self.root / _RUNNING) if path.suffix == ".json"]

    def _register(self, path: Path, data: bytes) -> int:
        """Write the file of a process at work; the descriptor that keeps it locked."""
        with self.locks.shared(STORE), atomic.TemporaryFile(self.tmp) as out:
            atomic.make_directory(path.parent)
            out.write(data)
            descriptor = out.lease()
            try:
                take(descriptor, fcntl.LOCK_EX)  # before the file has its name: it is never seen unlocked
                out.commit(path, mode=0o644)
            except BaseException:
                atomic.remove(path)
                release(descriptor)
                raise
        return descriptor

    def _write(self, record: CheckoutRoot) -> None:
        target = self.path(record.checkout, record.identity)
        atomic.write_file(target, record.encode(), folder=self.tmp, mode=0o644)

    def _read(self, path: Path) -> CheckoutRoot:
        with atomic.disk_errors(path, "reading what a checkout has"):
            data = path.read_bytes()
        try:
            record = CheckoutRoot.decode(data, where=str(path))
            if self.path(record.checkout, record.identity).name != path.name:
                raise BadManifest("a root file is about another checkout", where=str(path), found=str(record.checkout))
        except BadManifest as error:
            error.next_step = (
                "remove this file, then run `vpstore build --all` in the checkout that it names, if that still exists"
            )
            raise
        return record


def _path_text(path: Path) -> str:
    """A path as text, whatever the locale; one that is not UTF-8 by its bytes, which then is no absolute path."""
    data = os.fsencode(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return _AS_BYTES + data.hex()


def _path_of(text: str, *, where: str) -> Path:
    try:
        is_text = not text.startswith(_AS_BYTES)
        return Path(os.fsdecode(text.encode() if is_text else bytes.fromhex(text.removeprefix(_AS_BYTES))))
    except ValueError:
        raise BadManifest("not a path", where=where, found=repr(text)[:80]) from None


def _read_running(path: Path) -> RunningRoot | None:
    """The file of a living process; None if it finished meanwhile."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    fields = Fields(parse_strict(data, where=str(path)), where=str(path))
    fields.format(FORMAT)
    artifacts, blobs = (
        frozenset(Digest.parse(text, where=str(path)) for text in fields.take(name, list))
        for name in ("artifacts", "blobs")
    )
    fields.done()
    return RunningRoot(path, artifacts, blobs)


def _is_held(path: Path) -> bool:
    """Whether the process that wrote the file lives; a moment's shared lock disturbs nobody."""
    with atomic.disk_errors(path, "asking whether a process is at work"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
    is_free = is_taken(descriptor, fcntl.LOCK_SH)
    release(descriptor)
    return not is_free
