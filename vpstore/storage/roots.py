"""Roots: what must not be collected, because a checkout shows it or a process is at work on it.

Place in the path: a pointer write first records its artifact here; builds and pulls say here what they need while they
run; `gc` starts from here. Nobody has to keep a list: checkouts register themselves.
On disk: `roots/<id>.json`, one a checkout, and `roots/running/<pid>-<random>.json`, one a process at work, which the
process holds locked for as long as it lives.
Invariants: a root is durable before anything relies on it; a checkout that cannot be read keeps what it had; a root of
a process that died is known by its free lock.

Example:
    with store.roots.running(artifacts=parents): ...
    store.roots.hold(checkout.root, "tiny/vpMoE@smoke", artifact)
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vpstore.errors import BadManifest
from vpstore.schema.canonical import parse_strict, readable_bytes
from vpstore.schema.digest import Digest
from vpstore.schema.fields import Fields
from vpstore.storage import atomic

FORMAT: Final = 1
_RUNNING: Final = "running"


@dataclass(frozen=True)
class CheckoutRoot:
    """What one checkout holds."""

    checkout: Path
    artifacts: Mapping[str, Digest]  # profile/object@stage -> artifact

    def encode(self) -> bytes:
        """The bytes of the file."""
        return readable_bytes({"format": FORMAT, "checkout": str(self.checkout), "artifacts": dict(self.artifacts)})

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> CheckoutRoot:
        """Read the file.

        Raises:  BadManifest: not such a document.
        """
        fields = Fields(parse_strict(data, where=where), where=where)
        fields.format(FORMAT)
        checkout = Path(fields.text("checkout"))
        table = fields.take("artifacts", dict)
        fields.done()
        return cls(checkout, {name: Digest.parse(value, where=f"{where}: {name}") for name, value in table.items()})


@dataclass(frozen=True)
class RunningRoot:
    """What one process needs while it is at work."""

    path: Path
    artifacts: frozenset[Digest] = frozenset()
    blobs: frozenset[Digest] = field(default=frozenset())


@dataclass(frozen=True)
class Roots:
    """The roots of one store."""

    root: Path
    tmp: Path
    locks: Path

    def path(self, checkout: Path) -> Path:
        """The file of one checkout."""
        return self.root / f"{Digest.of(os.fsencode(checkout.absolute())).hex[:32]}.json"

    def hold(self, checkout: Path, name: str, artifact: Digest) -> None:
        """Record that a checkout now has `artifact` under `name`; durable when this returns."""
        path = self.path(checkout)
        with self._exclusively(path):
            before = self._read(path) if path.exists() else CheckoutRoot(checkout.absolute(), {})
            if before.artifacts.get(name) == artifact:
                return
            after = CheckoutRoot(checkout.absolute(), {**before.artifacts, name: artifact})
            atomic.write_file(path, after.encode(), folder=self.tmp, mode=0o644)

    def forget(self, checkout: Path) -> bool:
        """Drop a checkout that is gone for good.

        Returns: whether it was registered.
        """
        path = self.path(checkout)
        with self._exclusively(path):
            was_there = path.exists()
            atomic.remove(path)
        return was_there

    def checkouts(self) -> tuple[CheckoutRoot, ...]:
        """Every registered checkout, by path.

        Raises:  BadManifest: a root file is damaged; collecting must not go on then.
        """
        return tuple(sorted((self._read(path) for path in self.root.glob("*.json")), key=lambda root: root.checkout))

    @contextmanager
    def running(self, *, artifacts: Collection[Digest] = (), blobs: Collection[Digest] = ()) -> Iterator[None]:
        """Say, for as long as the context lasts, that artifacts and blobs are needed, whether or not they are here."""
        folder = self.root / _RUNNING
        atomic.make_directory(folder)
        path = atomic.temporary_name(folder).with_suffix(".json")
        data = readable_bytes({"format": FORMAT, "artifacts": sorted(artifacts), "blobs": sorted(blobs)})
        with atomic.TemporaryFile(self.tmp) as out:
            out.write(data)
            descriptor = os.open(out.path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # of the file, before it has its name: never seen unlocked
            try:
                out.commit(path, mode=0o644)
                yield
            finally:
                atomic.remove(path)
                os.close(descriptor)

    def at_work(self) -> tuple[RunningRoot, ...]:
        """What living processes need; the files of dead ones are removed.

        Raises:  BadManifest: the file of a living process cannot be read.
        """
        found = []
        for path in sorted((self.root / _RUNNING).glob("*.json")):
            if not _is_held(path):
                atomic.remove(path)
                continue
            try:
                fields = Fields(parse_strict(path.read_bytes(), where=str(path)), where=str(path))
            except FileNotFoundError:  # it finished meanwhile
                continue
            fields.format(FORMAT)
            artifacts, blobs = (
                frozenset(Digest.parse(text, where=str(path)) for text in fields.take(name, list))
                for name in ("artifacts", "blobs")
            )
            fields.done()
            found.append(RunningRoot(path, artifacts, blobs))
        return tuple(found)

    def _read(self, path: Path) -> CheckoutRoot:
        try:
            return CheckoutRoot.decode(path.read_bytes(), where=str(path))
        except BadManifest as error:
            error.next_step = "if the checkout still exists, remove this file and run `vpstore build --all` in it"
            raise

    @contextmanager
    def _exclusively(self, path: Path) -> Iterator[None]:
        descriptor = os.open(self.locks / f"root-{path.stem}.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _is_held(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)
