"""DVC's own configuration opens the right transport, and its mistakes come with the command that mends them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from remote_places import S3Server

from vpstore.errors import RemoteFailure, UsageError
from vpstore.schema.digest import Digest
from vpstore.storage.remotes.base import blob_name
from vpstore.storage.remotes.directory import DirectoryRemote
from vpstore.storage.remotes.dvc import open_remote, without_secrets
from vpstore.storage.remotes.s3 import S3Remote
from vpstore.storage.remotes.web import WebRemote

# What the plugins of DVC and their libraries say about their own dependencies is not ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def checkout(folder: Path, text: str, local: str = "") -> Path:
    root = folder / "checkout"
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text(text)
    if local:
        (root / ".dvc" / "config.local").write_text(local)
    return root


def test_a_local_remote_is_a_directory_beside_the_checkout(tmp_path: Path) -> None:
    root = checkout(tmp_path, "[core]\n    remote = Shelf\n['remote \"Shelf\"']\n    url = ../../shelf\n")
    remote = open_remote(root, None)
    assert isinstance(remote, DirectoryRemote)
    remote.write("keys/x", b"{}")
    assert (tmp_path / "shelf" / "vpstore" / "keys" / "x").read_bytes() == b"{}"
    assert remote.label == f"shelf ({tmp_path / 'shelf'})"
    inner = root / "deep" / "er"
    inner.mkdir(parents=True)
    assert open_remote(inner, "SHELF").read("keys/x", limit=10) == b"{}"


def test_an_s3_remote_uses_dvcs_endpoint_and_credentials(
    tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    bucket = s3_server.bucket()
    root = checkout(
        tmp_path,
        f"[core]\n    remote = cloud\n['remote \"cloud\"']\n    url = s3://{bucket}/some/models\n"
        f"    endpointurl = {s3_server.endpoint}\n    read_timeout = 7\n",
        "['remote \"cloud\"']\n    access_key_id = me\n    secret_access_key = hush\n",
    )
    remote = open_remote(root, None)
    assert isinstance(remote, S3Remote)
    assert remote.label == f"cloud (s3://{bucket}/some/models)"
    source = tmp_path / "blob"
    source.write_bytes(os.urandom((16 << 20) + 5))  # three parts of the usual size
    digest = Digest.of(source.read_bytes())
    went: list[int] = []
    remote.upload(blob_name(digest), source, digest, moved=went.append)
    assert sorted(went) == [5, 8 << 20, 8 << 20]
    assert s3_server.contents(bucket) == {f"some/models/vpstore/{blob_name(digest)}": source.read_bytes()}
    assert b"".join(remote.chunks(blob_name(digest), start=9 << 20)) == source.read_bytes()[9 << 20 :]
    assert remote._calls.fs.config_kwargs["read_timeout"] == 7
    assert remote._calls.fs.config_kwargs["retries"]["total_max_attempts"] == 1


def test_a_web_server_is_read_from_only(tmp_path: Path) -> None:
    remote = open_remote(checkout(tmp_path, "['remote \"web\"']\n    url = http://127.0.0.1:1/models\n"), "web")
    assert isinstance(remote, WebRemote)
    with pytest.raises(RemoteFailure) as caught:
        remote.write("keys/x", b"{}")
    assert caught.value.where == "web (http://127.0.0.1:1/models)"
    assert caught.value.next_step


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("", None, "dvc remote add -d NAME URL"),
        ("['remote \"one\"']\n    url = /x\n", None, "dvc remote default one"),
        ("['remote \"one\"']\n    url = /x\n", "two", "dvc remote add two URL"),
        ("[core]\n    remote = gone\n", None, "dvc remote add gone URL"),
        ("[core\n", None, "dvc remote"),
        ("['remote \"one\"']\n    url = /x\n    nonsense = 1\n", "one", "dvc remote"),
    ],
)
def test_mistakes_of_configuration_come_with_the_next_step(
    tmp_path: Path, text: str, name: str | None, expected: str
) -> None:
    with pytest.raises(UsageError) as caught:
        open_remote(checkout(tmp_path, text), name)
    assert expected in caught.value.next_step
    assert caught.value.where


def test_no_dvc_here(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        open_remote(tmp_path, None)
    assert caught.value.next_step == "dvc init"


def test_a_plugin_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = checkout(tmp_path, "['remote \"g\"']\n    url = gs://b/p\n['remote \"s\"']\n    url = s3://b/p\n")
    monkeypatch.setitem(sys.modules, "dvc_gs", None)
    monkeypatch.setitem(sys.modules, "dvc_s3", None)
    for name, package in (("g", "dvc-gs"), ("s", "dvc-s3")):
        with pytest.raises(RemoteFailure, match=package) as caught:
            open_remote(root, name)
        assert caught.value.next_step == f"pip install {package}"


def test_credentials_that_are_not_there(tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    root = checkout(
        tmp_path, f"['remote \"s\"']\n    url = s3://{s3_server.bucket()}/p\n    endpointurl = {s3_server.endpoint}\n"
    )
    with pytest.raises(RemoteFailure) as caught:
        open_remote(root, "s").size("keys/x")
    assert "credentials" in caught.value.next_step
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(RemoteFailure) as caught:
        open_remote(root, "s").size("keys/x")
    assert "credentials" in caught.value.next_step


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ssh://me:hush@lab:22/srv/models", "ssh://lab:22/srv/models"),
        ("s3://bucket/models?versionId=x", "s3://bucket/models"),
        ("https://me@host/x?sig=hush", "https://host/x"),
        ("/srv/models", "/srv/models"),
    ],
)
def test_labels_show_no_credentials(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


def test_opening_writes_nothing(tmp_path: Path) -> None:
    root = checkout(tmp_path, "[core]\n    remote = shelf\n['remote \"shelf\"']\n    url = ../../shelf\n")
    before = sorted(tmp_path.rglob("*"))
    assert list(open_remote(root, None).list("blobs/")) == []
    assert open_remote(root, None).size("keys/x") is None
    assert sorted(tmp_path.rglob("*")) == before
