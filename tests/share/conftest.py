"""Fixtures of the tests of sharing: two checkouts of the small project with stores of their own, and a DVC remote."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
# The two projects, the server that speaks S3 and keys for signing live there.
sys.path += [str(TESTS / name) for name in ("store", "dvc", "remote", "sign")]

import small_project  # noqa: E402
from remote_places import S3Server  # noqa: E402
from sharing_server import SharingServer  # noqa: E402
from small_project import REPOSITORY, make_project  # noqa: E402
from two_checkouts import Pair, configure, copy_of, fresh_clone  # noqa: E402

MEMORY = "/dev/shm"


def _folder(factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: stores fsync every file, and a busy disk takes its time."""
    if os.access(MEMORY, os.W_OK):
        with tempfile.TemporaryDirectory(dir=MEMORY, prefix="vpstore-share-") as folder:
            yield Path(folder)
    else:
        yield factory.mktemp("share")


@pytest.fixture(scope="session", autouse=True)
def _server() -> Iterator[None]:
    """Commands run in children of a process that has loaded DVC: it takes longer than most of them."""
    before, server = small_project.server, SharingServer(REPOSITORY)
    small_project.server = lambda: server  # type: ignore[assignment]
    yield
    small_project.server = before
    server.close()


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the test's own."""
    yield from _folder(tmp_path_factory)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A server that speaks S3, and dummy credentials for it."""
    with pytest.MonkeyPatch.context() as patch:
        own = {"ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing", "DEFAULT_REGION": "us-east-1"}
        for name, value in (own | {"EC2_METADATA_DISABLED": "true"}).items():
            patch.setenv(f"AWS_{name}", value)
        server = S3Server()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A checkout in which everything is built, locked and pushed; not to be changed."""
    for folder in _folder(tmp_path_factory):
        (folder / "a").mkdir()
        project = make_project(folder / "a", folder / "a-cache")
        configure(project, folder / "remote")
        project.run("build", "--all")
        project.run("lock")
        project.run("push")
        yield Pair(folder, project, project)


@pytest.fixture
def pair(template: Pair, tmp_path: Path) -> Pair:
    """A, where everything is built, locked and pushed, and B, a fresh clone of it."""
    a = copy_of(template, tmp_path)
    return Pair(tmp_path, a, fresh_clone(a, tmp_path / "b"))
