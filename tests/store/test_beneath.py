"""Folders and files below a root, opened so that no link leads a writer out of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vpstore.errors import VpstoreError
from vpstore.storage import atomic, beneath, system

WAY = ("a", "b", "c")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with a folder a/b/c, beside a person's folder that nothing may touch."""
    (tmp_path / "checkout" / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "checkout" / "inside" / "b" / "c").mkdir(parents=True)
    (tmp_path / "outside" / "b" / "c").mkdir(parents=True)
    for folder in sorted((tmp_path / "outside").rglob("*")):
        (folder / "thesis.txt").write_text("precious")
    return tmp_path / "checkout"


@contextmanager
def untouched(root: Path) -> Iterator[None]:
    """Nothing outside the root changes."""

    def seen() -> list[tuple[str, int, bytes]]:
        paths = [path for path in sorted(root.parent.rglob("*")) if root not in (path, *path.parents)]
        return [(str(path), path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths]

    before = seen()
    yield
    assert seen() == before


def write(root: Path, *names: str) -> Path:
    """Write a file into a folder below the root; where it really went."""
    with beneath.opened(root, root.joinpath(*names)) as place:
        atomic.write_if_different(place / "x.json", b"new")
    return Path(os.path.realpath(root.joinpath(*names) / "x.json"))


def test_what_is_missing_is_made(root: Path) -> None:
    assert write(root, "new", "folder").read_bytes() == b"new"
    assert write(root, *WAY) == root / "a/b/c/x.json"
    with pytest.raises(FileNotFoundError) as missing, beneath.opened(root, root / "other/one", create=False):
        pass
    assert missing.value.filename == str(root / "other")
    assert not (root / "other").exists()


def replace_by_link(root: Path, level: int, text: str) -> Path:
    link = root.joinpath(*WAY[: level + 1])
    system.disk.rename(link, root / "moved")
    link.symlink_to(text)
    return link


@pytest.mark.parametrize("level", range(3))
@pytest.mark.parametrize(
    "text",
    [
        "{outside}", "{up}../outside", "{outside}/nowhere", "nowhere", "{up}nowhere/x", "/", "{up}..", "{self}",
        "{up}../checkout/inside", "{root}/../outside", "{up}.git/hooks", "{up}inside/../.vpstore",
    ],
)  # fmt: skip
def test_a_link_that_leads_out_or_nowhere_or_in_a_circle_is_refused(root: Path, level: int, text: str) -> None:
    (root / ".git" / "hooks").mkdir(parents=True)
    (root / ".vpstore").mkdir()
    outside = root.parent.joinpath("outside", *WAY[1 : level + 1])
    link = replace_by_link(root, level, text.format(up="../" * level, outside=outside, root=root, self=WAY[level]))
    before = sorted(root.rglob("*"))
    with untouched(root), pytest.raises(VpstoreError) as refused:
        write(root, *WAY)
    assert refused.value.where == str(link)
    assert "link" in refused.value.found
    assert refused.value.expected
    assert "a/b/c" in refused.value.next_step
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("level", range(3))
@pytest.mark.parametrize("form", ["{up}inside", "{root}/inside", "{up}x/../inside", "{up}./again"])
def test_a_link_that_leads_back_inside_is_followed(root: Path, level: int, form: str) -> None:
    (root / "x").mkdir()
    (root / "again").symlink_to("inside")
    tail = "/".join(["", *WAY[1 : level + 1]])
    replace_by_link(root, level, form.format(up="../" * level, root=root) + tail)
    with untouched(root):
        assert write(root, *WAY) == root / "inside/b/c/x.json"
    with untouched(root):
        beneath.settle(root, root.joinpath(*WAY))


def test_links_in_a_circle_end(root: Path) -> None:
    (root / "one").symlink_to("two")
    (root / "two").symlink_to("./one")
    with pytest.raises(VpstoreError, match="nothing is written here") as refused:
        write(root, "one")
    assert "circle" in refused.value.found


def test_the_root_may_be_reached_through_links(root: Path) -> None:
    (root.parent / "link").symlink_to("checkout")
    replace_by_link(root, 0, str(root / "inside"))  # absolute, by the root's other name
    assert write(root.parent / "link", *WAY) == root / "inside/b/c/x.json"


def test_something_on_the_way_is_no_folder(root: Path) -> None:
    (root / "file").write_text("precious")
    os.mkfifo(root / "pipe")
    for name in ("file", "pipe"):
        with pytest.raises(VpstoreError, match="nothing is written here") as refused:
            write(root, name, "x")
        assert refused.value.where == str(root / name)
    assert (root / "file").read_text() == "precious"


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_folder_replaced_by_a_link_while_it_is_open(root: Path, name: str) -> None:
    """What was opened is written to, wherever its name leads by then."""
    with untouched(root), beneath.opened(root, root.joinpath(*WAY)) as place:
        folder = root.joinpath(*WAY[: WAY.index(name) + 1])
        folder.rename(root / "moved")
        folder.symlink_to(root.parent / "outside")
        atomic.write_if_different(place / "x.json", b"new")
    assert root.joinpath("moved", *WAY[WAY.index(name) + 1 :], "x.json").read_bytes() == b"new"


def test_a_folder_replaced_by_a_link_on_the_walk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the step to it and the step out of it."""
    real: Callable[..., int] = os.open

    def swapping(path: object, flags: int, *rest: int, **given: int) -> int:
        descriptor = real(path, flags, *rest, **given)  # type: ignore[arg-type]
        if path == "a":
            (root / "a").rename(root / "moved")
            (root / "a").symlink_to(root.parent / "outside")
        return descriptor

    monkeypatch.setattr(os, "open", swapping)
    with untouched(root), beneath.opened(root, root.joinpath(*WAY)) as place:
        atomic.write_if_different(place / "x.json", b"new")
    assert (root / "moved/b/c/x.json").read_bytes() == b"new"


def test_a_file_that_is_a_link(root: Path) -> None:
    (root / "inside/agreed").write_text("old")
    (root / "lock").symlink_to("inside/agreed")
    with beneath.opened_file(root, root / "lock") as place:
        atomic.write_if_different(place, b"new")
    assert (root / "lock").is_symlink()
    assert (root / "inside/agreed").read_bytes() == b"new"
    with beneath.opened_file(root, root / "absent") as place:
        atomic.write_if_different(place, b"new")
    assert (root / "absent").read_bytes() == b"new"
    for number, text in enumerate(("../outside/b/thesis.txt", "../outside/new", "nowhere", "inside", "..", "a/b/..")):
        (root / f"link{number}").symlink_to(text)
        with untouched(root), pytest.raises(VpstoreError), beneath.opened_file(root, root / f"link{number}") as place:
            atomic.write_if_different(place, b"new")
        assert (root / f"link{number}").is_symlink()
    assert not (root / "nowhere").exists()


def test_no_error_names_a_descriptor(root: Path) -> None:
    folder = root.joinpath(*WAY)
    with pytest.raises(OSError, match="No such file") as refused, beneath.opened(root, folder) as place:
        os.rename(place / "none", place / "other")
    assert (refused.value.filename, refused.value.filename2) == (str(folder / "none"), str(folder / "other"))
    with pytest.raises(VpstoreError) as told, beneath.opened(root, folder) as place:
        raise VpstoreError("no", where=str(place / "x"), found=f"{place}, {place}0", next_step=f"rm {place}/y")
    assert (told.value.where, told.value.next_step) == (str(folder / "x"), f"rm {folder}/y")
    assert told.value.found.startswith(f"{folder}, /proc/self/fd/")


def test_no_descriptor_is_left_open(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    replace_by_link(root, 1, "../inside")
    write(root, *WAY)
    with pytest.raises(VpstoreError):
        write(root, "a", "b", "..", "..", "..")
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_paths_of_descriptors_the_name_serves(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a system without /proc the walk is the same."""
    monkeypatch.setattr(Path, "is_dir", lambda self: not str(self).startswith("/proc/") and os.path.isdir(self))
    assert write(root, *WAY) == root / "a/b/c/x.json"
    replace_by_link(root, 1, str(root.parent / "outside"))
    with untouched(root), pytest.raises(VpstoreError):
        write(root, *WAY)
