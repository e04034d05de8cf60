"""A directory as a remote, on disks that fail and with things in it that do not belong there."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from remote_places import PART, S3Place, S3Server

from vpstore.errors import BlobMissing, RemoteFailure, VpstoreError
from vpstore.schema.digest import Digest
from vpstore.storage import atomic, system
from vpstore.storage.remotes.base import blob_name
from vpstore.storage.remotes.directory import DirectoryRemote
from vpstore.storage.stamps import Stamps
from vpstore.storage.store import Store

REPOSITORY = Path(__file__).resolve().parents[2]
CALLS = ("write", "fsync", "rename", "link", "unlink", "mkdir")
LARGE = 5 << 20


class Killed(BaseException):
    """The end of the process, as far as the code under test can tell."""


class FailingDisk(system.Disk):
    """Fails at the n-th of the calls that change a disk; a process that was killed makes no further ones."""

    def __init__(self, at: int, failure: Callable[[], BaseException]) -> None:
        self.at, self.failure, self.calls = at, failure, 0

    def count(self) -> None:
        self.calls += 1
        failure = self.failure()
        if self.calls == self.at or (isinstance(failure, Killed) and self.calls > self.at):
            raise failure


def _counted(name: str) -> Callable[..., Any]:
    def call(self: FailingDisk, *arguments: Any) -> Any:
        self.count()
        return getattr(system.Disk, name)(self, *arguments)

    return call


for _name in CALLS:
    setattr(FailingDisk, _name, _counted(_name))

FAILURES: dict[str, Callable[[], BaseException]] = {
    "killed": Killed,
    "full": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "broken": lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
}


def ignore(count: int) -> None:
    pass


@pytest.fixture
def remote(tmp_path: Path) -> DirectoryRemote:
    return DirectoryRemote(tmp_path / "remote", "shelf")


def failing(at: int, kind: str, transfer: Callable[[], None]) -> BaseException | None:
    """Run a transfer on a disk that fails at one call; the failure, or None if there were not so many calls."""
    disk = FailingDisk(at, FAILURES[kind])
    caught: BaseException | None = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "disk", disk)
        try:
            transfer()
        except (Killed, OSError, VpstoreError) as error:
            caught = error
    assert (caught is None) == (disk.calls < at)
    return caught


@pytest.mark.parametrize("kind", sorted(FAILURES))
def test_an_upload_that_fails_at_any_call_leaves_nothing_wrong_and_a_retry_converges(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    data = os.urandom(atomic.CHUNK + 1000)
    source.write_bytes(data)
    digest = Digest.of(data)
    for at in itertools.count(1):
        root = tmp_path / f"remote-{at}"
        target = root / "vpstore" / blob_name(digest)
        upload = partial(DirectoryRemote(root, "shelf").upload, blob_name(digest), source, digest, moved=ignore)
        failure = failing(at, kind, upload)
        assert failure is None or isinstance(failure, Killed if kind == "killed" else RemoteFailure)
        assert not target.exists() or target.read_bytes() == data
        if failure is None:
            break
        upload()
        assert target.read_bytes() == data
        assert target.stat().st_mode & 0o777 == 0o444
        left = list((root / "vpstore" / "tmp").iterdir())
        # A killed process may leave the empty file with which it tried whether the file system shares bytes.
        assert left == [] or (kind == "killed" and [path.stat().st_size for path in left] == [0])
    assert at > 12  # folders, two writes, the fsyncs, the rename


@pytest.mark.parametrize("kind", sorted(FAILURES))
@pytest.mark.parametrize("damaged", [False, True])
def test_a_download_that_fails_at_any_call_leaves_nothing_wrong_and_a_retry_converges(
    kind: str, damaged: bool, tmp_path: Path
) -> None:
    data = os.urandom(1000)
    digest = Digest.of(data)

    def chunks(start: int) -> Iterator[bytes]:
        yield from (data[at : at + 400] for at in range(start, len(data), 400))

    for at in itertools.count(1):
        store = Store.create(tmp_path / f"store-{at}", stamps=Stamps(tmp_path / "stamps"))
        if damaged:
            store.blobs.put_bytes(data)
            store.blobs.path(digest).chmod(0o644)
            store.blobs.path(digest).write_bytes(b"damaged")
        receive = partial(store.blobs.receive, digest, len(data), chunks, moved=ignore)
        failure = failing(at, kind, receive)
        assert not store.blobs.has(digest) or damaged or store.blobs.is_whole(digest, full=True)
        assert store.blobs.has(digest) or not damaged
        if failure is None:
            break
        receive()
        assert store.blobs.read(digest) == data
        assert list((store.root / "tmp" / "partial").iterdir()) == []
        assert not damaged or {path.read_bytes() for path in (store.root / "quarantine").iterdir()} == {b"damaged"}
    assert at > 8


def test_a_failed_fsync_is_never_built_upon(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """After it the kernel may have forgotten bytes that it still shows: they must come again."""
    data = os.urandom(1000)
    asked: list[int] = []

    def chunks(start: int) -> Iterator[bytes]:
        asked.append(start)
        yield data[start:]

    def fail(self: system.Disk, descriptor: int) -> None:
        raise OSError(errno.EIO, "on purpose")

    with monkeypatch.context() as patch:
        (store.root / "tmp" / "partial").mkdir()
        patch.setattr(system.Disk, "fsync", fail)
        with pytest.raises(OSError, match="on purpose"):
            store.blobs.receive(Digest.of(data), 1000, chunks, moved=ignore)
    store.blobs.receive(Digest.of(data), 1000, chunks, moved=ignore)
    assert asked == [0, 0]


def test_the_file_is_durable_before_it_has_its_name(
    remote: DirectoryRemote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 1000)
    digest = Digest.of(b"x" * 1000)
    remote.write("keys/first", b"")  # the folders are there
    (tmp_path / "remote" / "vpstore" / blob_name(digest)).parent.mkdir(parents=True)
    trace: list[str] = []

    class Tracing(system.Disk):
        def write(self, descriptor: int, data: memoryview) -> int:
            trace.append("write")
            return super().write(descriptor, data)

        def fsync(self, descriptor: int) -> None:
            trace.append("fsync of the folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "fsync")
            super().fsync(descriptor)

        def rename(self, source: Path, target: Path) -> None:
            trace.append("rename")
            super().rename(source, target)

    monkeypatch.setattr(system, "disk", Tracing())
    remote.upload(blob_name(digest), source, digest, moved=ignore)
    # Before the first byte, folders that were found are made durable.
    assert trace[trace.index("write") :] == ["write", "fsync", "rename", "fsync of the folder"]


def test_short_writes_are_continued(remote: DirectoryRemote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(system.Disk):
        def write(self, descriptor: int, data: memoryview) -> int:
            return super().write(descriptor, data[:7])

    source = tmp_path / "source"
    source.write_bytes(os.urandom(100))
    digest = Digest.of(source.read_bytes())
    monkeypatch.setattr(system, "disk", Short())
    remote.upload(blob_name(digest), source, digest, moved=ignore)
    assert remote.read(blob_name(digest), limit=100) == source.read_bytes()


def test_links_and_folders_are_no_objects(remote: DirectoryRemote, tmp_path: Path) -> None:
    remote.write("keys/ab/real", b"{}")
    folder = tmp_path / "remote" / "vpstore" / "keys" / "ab"
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    assert list(remote.list("keys/")) == [("keys/ab/real", 2)]
    for name in ("link", "folder", "pipe", "gone", "real/inside"):
        assert remote.size(f"keys/ab/{name}") is None
        with pytest.raises(BlobMissing):
            remote.read(f"keys/ab/{name}", limit=10)
    remote.write("keys/ab/link", b"mine")
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert remote.read("keys/ab/link", limit=10) == b"mine"


def test_a_link_in_the_place_of_an_unfinished_upload_is_not_followed(remote: DirectoryRemote, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 10)
    digest = Digest.of(b"x" * 10)
    remote.write("keys/first", b"")
    (tmp_path / "victim").write_bytes(b"")
    (tmp_path / "remote" / "vpstore" / "tmp" / f"{digest.hex}.part").symlink_to(tmp_path / "victim")
    with pytest.raises(RemoteFailure):
        remote.upload(blob_name(digest), source, digest, moved=ignore)
    assert (tmp_path / "victim").read_bytes() == b""


def test_a_shared_copy_is_digested_before_it_is_named(
    remote: DirectoryRemote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file system shares bytes between files, nothing is written; here the sharing is a copy."""

    def clone(source: Path, target: Path) -> bool:
        target.write_bytes(source.read_bytes())
        target.chmod(0o444)
        return True

    monkeypatch.setattr(atomic, "clone", clone)
    source = tmp_path / "source"
    source.write_bytes(os.urandom(LARGE))
    digest, went = Digest.of(source.read_bytes()), []
    remote.upload(blob_name(digest), source, digest, moved=went.append)
    assert remote.size(blob_name(digest)) == sum(went) == LARGE
    other = Digest.of(b"another")
    with pytest.raises(VpstoreError, match="does not match its digest"):
        remote.upload(blob_name(other), source, other, moved=ignore)
    assert remote.size(blob_name(other)) is None
    assert list((tmp_path / "remote" / "vpstore" / "tmp").iterdir()) == []


def test_trouble_with_the_local_disk_is_not_called_the_remotes(remote: DirectoryRemote, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(VpstoreError) as caught:
        remote.upload("blobs/x", tmp_path / "folder", Digest.of(b""), moved=ignore)
    assert caught.type is VpstoreError
    assert caught.value.where == str(tmp_path / "folder")


MEASURED = """
import sys
from pathlib import Path
from vpstore.schema.digest import Digest
from vpstore.storage.store import Store
from vpstore.storage.stamps import Stamps
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024
{recipe}
def both(path):
    digest = Digest(path.name)
    name = "blobs/" + digest.hex
    remote.upload(name, path, digest, moved=lambda count: None)
    store.blobs.receive(digest, path.stat().st_size, lambda start: remote.chunks(name, start=start), moved=len_of)
def len_of(count):
    pass
store = Store.create(Path({store!r}), stamps=Stamps(Path({store!r}) / "stamps"))
both(Path({small!r}))
before = peak()
both(Path({large!r}))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_memory_does_not_grow_with_the_blob(kind: str, tmp_path: Path, s3_server: S3Server) -> None:
    paths = []
    for size in (16 << 20, 48 << 20):
        data = bytes(size)
        paths.append(tmp_path / Digest.of(data))
        paths[-1].write_bytes(data)
    recipe = (
        "from vpstore.storage.remotes.directory import DirectoryRemote as R; "
        f"remote = R(Path({str(tmp_path / 'remote')!r}), 'shelf')"
    )
    if kind == "s3":
        recipe = S3Place(tmp_path, s3_server).recipe().replace(f"part_size={PART}", "part_size=1 << 20")
    code = MEASURED.format(recipe=recipe, store=str(tmp_path / "store"), small=str(paths[0]), large=str(paths[1]))
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 12  # MiB, for 32 MiB more of blob
