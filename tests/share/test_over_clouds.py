"""The same commands over Google Cloud Storage's and Azure's protocols, to servers on loopback if there are any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from cloud_servers import CLOUDS, AzureServer, CloudServer
from damage_tools import flip
from small_project import Project
from test_interrupted_sharing import named_by_store, until_done
from two_checkouts import Pair, artifact_of, configure, recipes_run, store_of

from vpstore.schema.digest import Digest
from vpstore.storage.remotes.base import blob_name


@dataclass(frozen=True)
class Cloud:
    """A bucket of one of the two."""

    server: CloudServer
    bucket: str

    @property
    def url(self) -> str:
        return f"{self.server.scheme}://{self.bucket}/models"

    def configure(self, *projects: Project, url: str = "", **other: str) -> None:
        rows = [f'    {name} = "{value}"' for name, value in (other or self.server.options()).items()]
        for project in projects:
            configure(project, "\n".join([url or self.url, *rows]))

    def contents(self) -> dict[str, bytes]:
        return self.server.contents(f"{self.bucket}/models/vpstore")

    def put(self, name: str, data: bytes) -> None:
        self.server.put(f"{self.bucket}/models/vpstore/{name}", data)


@pytest.fixture(scope="module", params=CLOUDS, ids=[kind.scheme for kind in CLOUDS])
def running(request: pytest.FixtureRequest) -> Iterator[CloudServer]:
    if lacking := request.param.lacking():
        pytest.skip(lacking)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in request.param.environment.items():
            patch.setenv(name, value)
        server = request.param()
        yield server
        server.stop()


@pytest.fixture
def cloud(running: CloudServer) -> Cloud:
    return Cloud(running, running.bucket())


def shard_of(project: Project) -> Digest:
    return store_of(project).manifest(artifact_of(project, "plant@bloom")).by_path["model.safetensors"].digest


def test_push_pull_verify_and_repair(pair: Pair, cloud: Cloud) -> None:
    cloud.configure(pair.a, pair.b)
    said = pair.a.run("push")
    assert said.stderr == ""
    assert f"to shared ({cloud.url})" in said.stdout
    assert cloud.contents() == pair.objects()  # what a directory holds
    assert pair.a.json("push")["objects_moved"] == 0
    pair.b.run("pull")
    assert recipes_run(pair.b, "build", "--all") == []
    assert pair.b.json("resolve", "plant")["artifact"] == artifact_of(pair.a, "plant@bloom")
    assert pair.a.json("verify", "--remote", "--all")["ok"]

    shard = shard_of(pair.a)
    whole = cloud.contents()[blob_name(shard)]
    cloud.put(blob_name(shard), whole[:-1] + b"!")
    faults = pair.a.json("verify", "--remote", code=3)["faults"]
    assert {fault["blob"] for fault in faults} == {shard}
    pair.b.blob(shard).unlink()
    pair.b.run("repair", "plant", code=12)
    pair.a.run("repair", "--to-remote", "shared")
    assert cloud.contents() == pair.objects()
    flip(pair.a.blob(shard), 50)
    for project in (pair.a, pair.b):
        project.run("repair", "plant")
        assert project.json("verify", "plant")["ok"]
    cloud.put(blob_name(shard), whole[:-1])  # what has another size push replaces, too
    assert [row["name"] for row in pair.a.json("push")["objects"]] == [blob_name(shard)]
    assert pair.a.json("verify", "--remote", "--all")["ok"]


@pytest.mark.parametrize("kind", ["short", "long", "stale"])
def test_wrong_bytes_are_not_pulled(pair: Pair, cloud: Cloud, kind: str) -> None:
    cloud.configure(pair.a, pair.b)
    pair.a.run("push")
    shard = shard_of(pair.a)
    whole = cloud.contents()[blob_name(shard)]
    cloud.put(blob_name(shard), {"short": whole[:-7], "long": whole + b"more", "stale": whole[::-1]}[kind])
    said = pair.b.run("pull", code=13).stderr
    assert shard in said
    assert "Traceback" not in said
    assert named_by_store(pair.b) == []
    assert not pair.b.blob(shard).exists()
    pair.a.run("repair", "--to-remote", "shared")
    pair.b.run("pull")
    assert pair.b.json("verify", "--all")["ok"]


def test_a_damaged_blob_is_not_pushed(pair: Pair, cloud: Cloud) -> None:
    cloud.configure(pair.a)
    shard = shard_of(pair.a)
    flip(pair.a.blob(shard), 50)
    assert shard in pair.a.run("push", code=13).stderr
    there = cloud.contents()
    assert blob_name(shard) not in there
    assert 0 < len(there) < len(pair.objects())


def test_a_pull_that_is_killed_again_and_again_converges(pair: Pair, cloud: Cloud) -> None:
    cloud.configure(pair.a, pair.b)
    pair.a.run("push")
    assert until_done(pair.b, "pull", check=lambda: _nothing_wrong(pair.b)) > 2
    assert pair.b.json("verify", "--all")["ok"]
    assert pair.b.json("pull")["objects_moved"] == 0


def _nothing_wrong(project: Project) -> None:
    assert named_by_store(project) == []


def failed(project: Project, *command: str) -> str:
    """What a command says of a remote that fails."""
    said = project.run(*command, code=16).stderr
    assert "Traceback" not in said
    assert "shared (" in said
    assert "next" in said
    return said


COMMANDS = [("push",), ("pull",), ("verify", "--remote"), ("repair", "--to-remote", "shared")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_bucket_that_is_not_there_is_a_remote_failure(pair: Pair, cloud: Cloud, command: tuple[str, ...]) -> None:
    cloud.configure(pair.a, url=f"{cloud.server.scheme}://nowhere-at-all/models")
    said = failed(pair.a, *command)
    assert "no bucket or container nowhere-at-all" in said
    assert "make the bucket" in said


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_wrong_credentials_are_a_remote_failure(pair: Pair, cloud: Cloud, command: tuple[str, ...]) -> None:
    server, wrong = cloud.server, "eHh4eHh4eHh4eHh4eHh4eA=="
    if isinstance(server, AzureServer):
        cloud.configure(pair.a, connection_string=server.connection(server.port, wrong))
    else:  # it believes everybody: all that can be wrong is the file
        cloud.configure(pair.a, credentialpath="/nowhere/key.json")
    said = failed(pair.a, *command)
    assert "credentials" in said
    assert wrong not in said


@pytest.mark.slow
def test_a_server_that_is_not_there_is_a_remote_failure(pair: Pair, cloud: Cloud) -> None:
    """The clients of both try for half a minute and longer themselves."""
    cloud.configure(pair.a, **cloud.server.options(port=1))
    said = failed(pair.a, "verify", "--remote")
    assert "127.0.0.1" in said
