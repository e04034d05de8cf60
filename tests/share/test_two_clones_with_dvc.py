"""A builds and pushes, a fresh clone B pulls, changes one config, pushes only that, A takes it: real git, DVC, S3."""

from __future__ import annotations

from pathlib import Path

import pytest
from press_project import Press
from remote_places import S3Server
from two_checkouts import objects

STAGES = ("letters@main", "words@main", "stamps@main", "pages@draft", "pages@final")
# What depends on the title of the final page.
CHANGED = {"pages-final", "reports"}


class LocalPlace:
    """A directory as DVC's remote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "remote"

    def configure(self, press: Press) -> None:
        press.run("dvc", "remote", "add", "-q", "-d", "shared", str(self.folder))

    def contents(self) -> dict[str, bytes]:
        return objects(self.folder / "vpstore")


class S3Place:
    """A bucket of a server on loopback."""

    def __init__(self, server: S3Server) -> None:
        self.server, self.bucket = server, server.bucket()

    def configure(self, press: Press) -> None:
        press.run("dvc", "remote", "add", "-q", "-d", "shared", f"s3://{self.bucket}/models")
        press.run("dvc", "remote", "modify", "-q", "shared", "endpointurl", self.server.endpoint)

    def contents(self) -> dict[str, bytes]:
        found = self.server.contents(self.bucket)
        return {name.removeprefix("models/vpstore/"): data for name, data in found.items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Press:
    """A project in which everything is built, locked and committed; not to be changed."""
    folder = tmp_path_factory.mktemp("press")
    press = Press.create(folder / "checkout", folder / "home")
    press.repro()
    press.run("vpstore", "lock")
    press.commit("what was built")
    return press


def clone(press: Press, folder: Path) -> Press:
    """`git clone`, with a home of its own."""
    (folder / "home").mkdir(parents=True)
    press.run("git", "clone", "-q", str(press.root), str(folder / "checkout"))
    return Press(folder / "checkout", folder / "home")


@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_builds_b_continues_and_a_takes_over(
    kind: str, built: Press, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = LocalPlace(tmp_path) if kind == "local" else S3Place(request.getfixturevalue("s3_server"))
    (tmp_path / "a").mkdir()
    a = built.copy(tmp_path / "a")
    place.configure(a)
    a.commit("a remote")
    pushed = a.json("vpstore", "push")
    assert pushed["objects_moved"] == len(place.contents())

    b = clone(a, tmp_path / "b")
    pulled = b.json("vpstore", "pull", "-j", "4")
    assert {row["ref"] for row in pulled["artifacts"]} >= set(STAGES)
    assert b.text("pages@final") == a.text("pages@final")
    assert b.repro() == []
    assert b.ran() == []
    assert b.run("dvc", "status").stdout.startswith("Data and pipelines are up to date")

    b.edit("configs/pages.toml", 'title = "Page: "', 'title = "Leaf: "')
    assert set(b.repro()) == CHANGED | {"pages-draft"}  # whose params stand in the same file
    assert sorted(b.ran()) == ["press.judge", "press.pages"]
    b.run("vpstore", "lock")
    b.commit("another title")
    before = place.contents()
    pushed = b.json("vpstore", "push")
    new = {name: data for name, data in place.contents().items() if name not in before}
    assert {row["name"] for row in pushed["objects"]} == new.keys()
    assert pushed["bytes_moved"] == sum(map(len, new.values())) < sum(map(len, before.values())) / 3

    a.run("git", "pull", "-q", str(b.root), "main")
    pulled = a.json("vpstore", "pull")
    assert {row["name"] for row in pulled["objects"]} == {name for name in new if not name.startswith("keys/")}
    a.ran()
    assert set(a.repro()) == CHANGED  # dvc.lock came with git, and with it that the draft is as it was
    assert a.ran() == []  # both from the build cache
    assert a.text("pages@final").startswith("Leaf: ")
    assert a.json("vpstore", "verify", "--remote", "--all")["ok"]
    assert a.json("vpstore", "push")["objects_moved"] == 0
