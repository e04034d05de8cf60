"""Fixtures of the transports' tests: a real S3 server on loopback, and nothing of this person's own configuration."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import pytest
from _pytest.mark.structures import ParameterSet
from cloud_places import CLOUD_PLACES, cloud_marks
from cloud_servers import AzureServer, CloudServer, GsServer
from remote_places import PLACES, Place, S3Server

from vpstore.storage.stamps import Stamps
from vpstore.storage.store import Store

MEMORY = "/dev/shm"
T = TypeVar("T", bound=CloudServer)


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: transfers fsync much, and a busy disk takes its time."""
    if os.access(MEMORY, os.W_OK):
        with tempfile.TemporaryDirectory(dir=MEMORY, prefix="vpstore-remote-") as folder:
            yield Path(folder)
    else:
        yield tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module", autouse=True)
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Dummy credentials; no configuration of AWS or DVC from outside."""
    empty = tmp_path_factory.mktemp("home")
    own = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(empty / "aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(empty / "aws-credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "DVC_GLOBAL_CONFIG_DIR": str(empty / "dvc-global"),
        "DVC_SYSTEM_CONFIG_DIR": str(empty / "dvc-system"),
        "DVC_NO_ANALYTICS": "1",
        **GsServer.environment,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "DVC_"))]:
            patch.delenv(name)
        for name, value in own.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def s3_server(own_environment: None) -> Iterator[S3Server]:
    """A server that speaks S3."""
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def gs_server(own_environment: None) -> Iterator[GsServer]:
    """A server that speaks Google Cloud Storage's protocol."""
    yield from started(GsServer)


@pytest.fixture(scope="module")
def azure_server(own_environment: None) -> Iterator[AzureServer]:
    """A server that speaks Azure's protocol."""
    yield from started(AzureServer)


def started(kind: Callable[[], T]) -> Iterator[T]:
    server = kind()
    yield server
    server.stop()


KINDS = PLACES | CLOUD_PLACES
WITHOUT_SSH = pytest.mark.skipif(find_spec("sshfs") is None, reason="dvc-ssh is not installed")


def kinds() -> Iterator[ParameterSet]:
    for name in sorted(KINDS):
        marks = cloud_marks(name) if name in CLOUD_PLACES else [WITHOUT_SSH] if name == "sftp" else []
        yield pytest.param(name, marks=marks)


@pytest.fixture(params=kinds())
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each kind of remote in turn, empty."""
    kind = KINDS[request.param]
    server = request.getfixturevalue(kind.server_fixture) if kind.server_fixture else None
    made = kind(tmp_path / "remote", server)
    yield made
    made.close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store with stamps of its own."""
    return Store.create(tmp_path / "store", stamps=Stamps(tmp_path / "stamps"))
