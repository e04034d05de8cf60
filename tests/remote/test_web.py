"""A web server that shows what lies in a directory, as a remote to read from; and servers that show less."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fsspec.asyn import sync

from vpstore.errors import BlobMissing, RemoteFailure, UsageError
from vpstore.schema.digest import Digest
from vpstore.storage.remotes.base import FOLDER, blob_name
from vpstore.storage.remotes.dvc import open_remote
from vpstore.storage.remotes.failures import Patience
from vpstore.storage.remotes.web import WebRemote

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DATA = bytes(range(256)) * 40_000  # more than two pieces


class Handler(SimpleHTTPRequestHandler):
    """Python's own, which knows no ranges; told to fail in one way for names that contain a word."""

    failing = ""
    status = 503
    shows_folders = True

    def send_head(self) -> Any:
        if self.failing and self.failing in self.path:
            self.send_error(self.status)
            return None
        return super().send_head()

    def list_directory(self, path: Any) -> Any:
        if self.shows_folders:
            return super().list_directory(path)
        self.send_error(403)
        return None

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def handler() -> type[Handler]:
    return type("Handler", (Handler,), {})


@pytest.fixture
def web(tmp_path: Path, handler: type[Handler]) -> Iterator[WebRemote]:
    """A blob, an attestation, a key, and what is none of them."""
    folder = tmp_path / "served" / FOLDER
    for name in (blob_name(Digest.of(DATA)), "attestations/ab/x.json", "keys/ab/cd/ef", "keys/ab/cd/eg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(DATA)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    (tmp_path / "checkout" / ".dvc").mkdir(parents=True)
    config = f"['remote \"web\"']\n    url = http://127.0.0.1:{server.server_port}/\n"
    (tmp_path / "checkout" / ".dvc" / "config").write_text(config)
    remote = open_remote(tmp_path / "checkout", "web")
    assert isinstance(remote, WebRemote)
    yield WebRemote(remote._fs, f"http://127.0.0.1:{server.server_port}", "web", patience=Patience(2, 0.01))
    if (session := remote._fs._session) is not None:
        sync(remote._fs.loop, session.close)  # its finalizer waits for a tenth of a second only, and then complains
    server.shutdown()
    server.server_close()


def test_what_is_there_is_read_from_any_byte(web: WebRemote) -> None:
    name = blob_name(Digest.of(DATA))
    assert web.size(name) == len(DATA)
    for start in (0, 1, 5 << 20, len(DATA) - 1, len(DATA), len(DATA) + 1):
        assert b"".join(web.chunks(name, start=start)) == DATA[start:]
    assert web.read("keys/ab/cd/ef", limit=len(DATA)) == DATA
    assert web.size(name[:-1] + "x") is None
    with pytest.raises(BlobMissing):
        web.read("keys/ab/cd/no", limit=9)


def test_folders_are_listed_as_far_as_the_server_shows_them(web: WebRemote, handler: type[Handler]) -> None:
    assert list(web.list("keys/")) == [("keys/ab/cd/ef", len(DATA)), ("keys/ab/cd/eg", len(DATA))]
    assert [name for name, _ in web.list("blobs/")] == [blob_name(Digest.of(DATA))]
    assert list(web.list("attestations/no/")) == []
    handler.shows_folders = False
    assert list(web.list("keys/")) == []


@pytest.mark.parametrize("status", [500, 503, 403])
def test_a_failure_is_never_taken_for_absence(web: WebRemote, handler: type[Handler], status: int) -> None:
    handler.failing, handler.status = "keys", status
    for act in (lambda: web.size("keys/ab/cd/ef"), lambda: web.read("keys/ab/cd/ef", limit=9)):
        with pytest.raises(RemoteFailure) as caught:
            act()
        assert caught.value.where == "web: keys/ab/cd/ef"


def test_nothing_is_written(web: WebRemote, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x")
    for act in (
        lambda: web.write("keys/x", b""),
        lambda: web.remove("keys/ab/cd/ef"),
        lambda: web.upload("x", tmp_path / "blob", Digest.of(b"x"), moved=print),
    ):
        with pytest.raises(RemoteFailure, match="read from only"):
            act()


@pytest.mark.parametrize("url", ["memory://x", "webdav://host/x", "gdrive://x", "hdfs://host/x", "oss://x/y"])
def test_a_kind_that_is_not_spoken_to_is_named(tmp_path: Path, url: str) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text(f"['remote \"odd\"']\n    url = {url}\n")
    with pytest.raises((UsageError, RemoteFailure)) as caught:
        open_remote(tmp_path, "odd")
    assert url.partition(":")[0] in str(caught.value)
