"""Google Cloud Storage and Azure: transfers that are killed, cut off, refused or fed lies."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cloud_places import CLOUD_PLACES, AzurePlace, CloudPlace, GsPlace, cloud_marks
from cloud_servers import AzureServer
from cloud_troubles import Cutter, Refusing
from fsspec.spec import AbstractBufferedFile
from remote_places import QUICK
from test_killed import CHILD, DOWNLOAD, UPLOAD, blob, killed
from test_open_remote import checkout

from vpstore.errors import DigestMismatch, RemoteFailure
from vpstore.schema.digest import Digest
from vpstore.storage.remotes.base import blob_name
from vpstore.storage.remotes.dvc import open_remote
from vpstore.storage.remotes.failures import is_refusal
from vpstore.storage.remotes.filesystem import FilesystemRemote
from vpstore.storage.store import Store

# What the plugins of DVC and their libraries say about their own dependencies is not ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SIZE = (20 << 20) + 17


@pytest.fixture(params=[pytest.param(name, marks=cloud_marks(name)) for name in CLOUD_PLACES])
def cloud(request: pytest.FixtureRequest, tmp_path: Path) -> CloudPlace:
    """Each of the two, empty."""
    kind = CLOUD_PLACES[request.param]
    return kind(tmp_path / "remote", request.getfixturevalue(kind.server_fixture))


@pytest.fixture(params=[pytest.param("gs", marks=cloud_marks("gs"))])
def gs(request: pytest.FixtureRequest, tmp_path: Path) -> GsPlace:
    return GsPlace(tmp_path / "remote", request.getfixturevalue("gs_server"))


@pytest.fixture(params=[pytest.param("azure", marks=cloud_marks("azure"))])
def azure(request: pytest.FixtureRequest, tmp_path: Path) -> AzurePlace:
    return AzurePlace(tmp_path / "remote", request.getfixturevalue("azure_server"))


def opened(cloud: CloudPlace, folder: Path, url: str = "", **options: str) -> Any:
    """The remote as DVC's configuration gives it."""
    rows = {"url": url or f"{cloud.server.scheme}://{cloud.folder}", **(options or cloud.server.options())}
    text = "\n".join(f'    {name} = "{value}"' for name, value in rows.items())
    return open_remote(checkout(folder, f"['remote \"cloud\"']\n{text}\n"), "cloud")


def test_dvcs_configuration_opens_the_general_transport(cloud: CloudPlace, tmp_path: Path) -> None:
    remote = opened(cloud, tmp_path)
    assert isinstance(remote, FilesystemRemote)
    assert remote.label == f"cloud ({cloud.server.scheme}://{cloud.folder})"
    remote.write("keys/x", b"{}")
    assert cloud.contents() == {"keys/x": b"{}"}


def test_a_killed_download_is_taken_up(cloud: CloudPlace, tmp_path: Path, store: Store) -> None:
    path, digest = blob(tmp_path, SIZE)
    name = blob_name(digest)
    cloud.remote.upload(name, path, digest, moved=lambda count: None)
    child = CHILD.format(recipe=cloud.recipe(), limit=8 << 20, digest=str(digest))
    killed(child + DOWNLOAD.format(store=str(store.root), size=SIZE))
    had = (store.root / "tmp" / "partial" / digest.hex).stat().st_size
    assert 8 << 20 <= had < SIZE
    starts: list[int] = []

    def chunks(start: int) -> Iterator[bytes]:
        starts.append(start)
        return cloud.remote.chunks(name, start=start)

    store.blobs.receive(digest, SIZE, chunks, moved=lambda count: None)
    assert starts == [had]
    assert store.blobs.is_whole(digest, full=True)


def test_of_a_killed_upload_nothing_has_a_name(cloud: CloudPlace, tmp_path: Path) -> None:
    path, digest = blob(tmp_path, SIZE)
    child = CHILD.format(recipe=cloud.recipe(), limit=8 << 20, digest=str(digest))
    killed(child + UPLOAD.format(path=str(path)))
    assert [name for name in cloud.contents() if not name.startswith("tmp/")] == []
    cloud.remote.upload(blob_name(digest), path, digest, moved=lambda count: None)
    assert cloud.contents()[blob_name(digest)] == path.read_bytes()


@pytest.mark.parametrize("kind", ["short", "long", "stale", "flipped", "empty"])
def test_wrong_bytes_are_refused(cloud: CloudPlace, store: Store, kind: str) -> None:
    data = os.urandom(300_000)
    lies = {
        "short": data[:-1],
        "long": data + b"\0",
        "stale": os.urandom(len(data)),
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "empty": b"",
    }
    digest = Digest.of(data)
    name = blob_name(digest)
    cloud.server.put(f"{cloud.folder}/vpstore/{name}", lies[kind])
    with pytest.raises(DigestMismatch):
        store.blobs.receive(
            digest, len(data), lambda start: cloud.remote.chunks(name, start=start), moved=lambda count: None
        )
    assert not store.blobs.has(digest)
    assert list((store.root / "tmp" / "partial").iterdir()) == []


def test_a_connection_that_breaks_in_a_body_does_no_harm(cloud: CloudPlace, tmp_path: Path, store: Store) -> None:
    path, digest = blob(tmp_path, SIZE)
    name = blob_name(digest)
    cloud.remote.upload(name, path, digest, moved=lambda count: None)
    with Cutter(cloud.server.port, after=6 << 20, times=2) as cutter:
        remote = FilesystemRemote(cloud.server.client(cutter.port), cloud.folder, "cut", patience=QUICK)
        store.blobs.receive(digest, SIZE, lambda start: remote.chunks(name, start=start), moved=lambda count: None)
    assert cutter.times == 0
    assert store.blobs.is_whole(digest, full=True)


def test_a_bucket_that_is_not_there(cloud: CloudPlace, tmp_path: Path) -> None:
    with pytest.raises(RemoteFailure, match="root is not there") as caught:
        opened(cloud, tmp_path, f"{cloud.server.scheme}://no-such-bucket/models")
    assert "no-such-bucket" in caught.value.found
    assert "make the bucket" in caught.value.next_step


def test_a_bucket_that_goes_away(gs: GsPlace, tmp_path: Path) -> None:
    path, digest = blob(tmp_path, 1000)
    gs.server.files.rmdir(gs.folder.partition("/")[0])
    with pytest.raises(RemoteFailure, match="root is not there"):
        gs.remote.upload(blob_name(digest), path, digest, moved=lambda count: None)


def test_what_lies_in_no_bucket_is_not_only_missing() -> None:
    import fsspec

    with pytest.raises(RemoteFailure, match="root is not there") as caught:
        FilesystemRemote(fsspec.filesystem("memory"), "/no-such-bucket/models", "memory").mind_absence()
    assert caught.value.found == "no bucket or container no-such-bucket"


def test_a_commit_that_holds_nothing_back_is_not_relied_on(tmp_path: Path) -> None:
    """As with the files of zonal buckets: they have a `commit`, and are there before it."""
    import fsspec

    class Early(AbstractBufferedFile):
        def _upload_chunk(self, final: bool = False) -> bool:
            memory.pipe_file(self.path, (memory.cat_file(self.path) if self.offset else b"") + self.buffer.getvalue())
            return True

        def commit(self) -> None:
            pass

    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    files = type(
        "Files", (type(memory),), {"_open": lambda fs, path, mode, **options: Early(fs, path, mode, **options)}
    )
    remote = FilesystemRemote(files(skip_instance_cache=True), "/zonal/models", "zonal", patience=QUICK)
    path, digest = blob(tmp_path, 1000)
    with pytest.raises(DigestMismatch):
        remote.upload("blobs/x", path, Digest.of(b"other"), moved=lambda count: None)
    assert memory.find("/zonal") == []
    remote.upload("blobs/x", path, digest, moved=lambda count: None)
    assert memory.find("/zonal") == ["/zonal/models/vpstore/blobs/x"]
    assert memory.cat_file("/zonal/models/vpstore/blobs/x") == path.read_bytes()
    memory.rm("/zonal", recursive=True)


class Answer(Exception):
    """An answer as a client library raises it, with the status where that library keeps it."""

    def __init__(self, name: str, status: int | str) -> None:
        setattr(self, name, status)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Answer("status_code", 403), True),
        (Answer("code", 401), True),
        (Answer("code", "403"), True),
        (Answer("status", 403), True),
        (Answer("status_code", 503), False),
        (Answer("code", "busy"), False),
        (OSError("Forbidden: b/bucket/o"), True),
        (OSError("Forbidden"), False),
        (TimeoutError("Forbidden: b/bucket/o"), False),
        (RuntimeError("Failed to upload block"), False),
    ],
    ids=repr,
)
def test_what_counts_as_a_refusal(error: Exception, expected: bool) -> None:
    assert is_refusal(error) is expected
    wrapped = RuntimeError("Failed to upload block")
    wrapped.__cause__ = error
    assert is_refusal(wrapped) is expected


WRONG_KEY = "eHh4eHh4eHh4eHh4eHh4eA=="


@pytest.mark.parametrize("call", ["size", "read", "list", "write", "upload"])
def test_azures_refusal_is_not_asked_again(azure: AzurePlace, tmp_path: Path, call: str) -> None:
    from dvc_azure.spec import AzureBlobFileSystem

    server = azure.server
    assert isinstance(server, AzureServer)
    files = AzureBlobFileSystem(connection_string=server.connection(server.port, WRONG_KEY), skip_instance_cache=True)
    _refused(FilesystemRemote(files, azure.folder, "azure", patience=QUICK), tmp_path, call)


@pytest.mark.parametrize("kind", ["nonsense", "no key", "wrong key", "none"])
def test_azures_credentials_that_are_none(azure: AzurePlace, tmp_path: Path, kind: str) -> None:
    server = azure.server
    assert isinstance(server, AzureServer)
    options = {
        "nonsense": {"connection_string": "nonsense"},
        "no key": {"connection_string": server.connection(server.port, "hush!")},
        "wrong key": {"connection_string": server.connection(server.port, WRONG_KEY)},
        "none": {"version_aware": "false"},
    }
    with pytest.raises(RemoteFailure) as caught:
        opened(azure, tmp_path, **options[kind])
    assert "credentials" in caught.value.next_step
    assert "hush" not in str(caught.value)
    assert WRONG_KEY not in str(caught.value)


@pytest.fixture(params=[401, 403])
def refusing(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a server that says no."""
    handler = type("Refusing", (Refusing,), {"status": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join(30)


@pytest.mark.parametrize("call", ["size", "read", "list", "write", "upload"])
def test_googles_refusal_is_not_asked_again(gs: GsPlace, refusing: int, tmp_path: Path, call: str) -> None:
    remote = FilesystemRemote(gs.server.client(refusing), gs.folder, "gs", patience=QUICK)
    _refused(remote, tmp_path, call)


def test_googles_key_file_that_is_not_there(gs: GsPlace, tmp_path: Path) -> None:
    with pytest.raises(RemoteFailure) as caught:
        opened(gs, tmp_path, credentialpath=str(tmp_path / "gone.json"))
    assert "credentials" in caught.value.next_step


def _refused(remote: FilesystemRemote, folder: Path, call: str) -> None:
    path, digest = blob(folder, 1000)
    calls = {
        "size": lambda: remote.size("keys/x"),
        "read": lambda: remote.read("keys/x", limit=10),
        "list": lambda: list(remote.list("keys/")),
        "write": lambda: remote.write("keys/x", b"{}"),
        "upload": lambda: remote.upload(blob_name(digest), path, digest, moved=lambda count: None),
    }
    with pytest.raises(RemoteFailure, match="the remote refuses") as caught:
        calls[call]()
    assert "credentials" in caught.value.next_step
