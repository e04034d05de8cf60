"""Places below a checkout, opened so that nothing is ever written outside it.

Place in the path: between whoever writes into a checkout (pointers, views, reports, the lock, dvc.yaml) and `atomic`.
git keeps symbolic links, and people make them: any folder of a checkout may be one. The way to a folder is walked
component by component, each opened in the one before it without following a link; what a link says is then walked in
the same way. Where the walk ends, the folder is held open, and the caller writes into that very folder, whatever
happens to its names meanwhile.
Invariants: no walk leaves the root, through a link or through `..`; the root itself may be reached through links, as it
is where a person stands; nothing is made through a link that leads nowhere; no link leads into what belongs to git, DVC
or the store; no error names a place by a descriptor.

Example:
    with opened(checkout.root, checkout.views) as place: atomic.write_if_different(place / "x.json", data)
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Final

from vpstore.errors import VpstoreError
from vpstore.storage import atomic, system

MAX_LINKS: Final = 40  # as the kernel's own
_OTHERS: Final = frozenset({".git", ".dvc", ".vpstore"})  # whose folders only their own programs write into
# O_PATH: a folder that may be entered need not be readable to be on the way.
_FOLDER: Final = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


@contextmanager
def opened(root: Path, folder: Path, *, create: bool = True) -> Iterator[Path]:
    """A folder below `root`, held open.

    Args:    folder: below `root` by its name; create: make it, durably, with what is missing on the way.
    Returns: a path that means this very folder for as long as the context lasts (`/proc/self/fd/N`); where the system
             has no such paths, the folder's own name, and then only the moment of the walk is covered.
    Raises:  VpstoreError: a link on the way leads out, nowhere, in a circle or to another program's folder; something
             on the way is no folder. FileNotFoundError: it is not there and is not to be made.
    """
    with _Walk(root, folder) as walk:
        walk.go(folder.relative_to(root), create=create)
        with _named(walk.place, folder):
            yield walk.place


@contextmanager
def opened_file(root: Path, file: Path) -> Iterator[Path]:
    """A file below `root`, there or not, in its folder held open; a link in its place is followed within `root`.

    Returns: a path in the way of `opened`, of no link at the moment of the walk: the place to read, or to replace.
    Raises:  VpstoreError: as `opened`. FileNotFoundError: the folder is not there.
    """
    with _Walk(root, file) as walk:
        name = walk.go(file.relative_to(root), create=False, has_leaf=True)
        with _named(walk.place, walk.known), _named(walk.place / name, file):
            yield walk.place / name


def settle(root: Path, folder: Path) -> None:
    """Make durable every name from `root` down to what is in `folder`: who wrote it may have died before that."""
    with _Walk(root, folder) as walk:
        walk.go(folder.relative_to(root), create=False)
        for descriptor in reversed(walk.stack):
            atomic.fsync_directory(Path("."), within=descriptor)


def make_plain_directory(path: Path, top: Path) -> None:
    """As `atomic.make_directory`, for a folder inside a store: nothing is written through a link that lies there.

    Raises:  VpstoreError: as `refuse_links`.
    """
    refuse_links(path, top)
    atomic.make_directory(path)


def refuse_links(path: Path, top: Path) -> None:
    """Let no link lie in the place of a folder inside a store.

    Raises:  VpstoreError: the folder, or one between `top` and it, is a symbolic link.
    """
    for folder in (path, *path.parents):
        if folder == top:
            break
        if folder.is_symlink():
            raise VpstoreError(
                "a folder of the store is a symbolic link",
                where=str(folder),
                expected="a folder",
                found=f"a link to {os.readlink(folder)}",
                next_step="find out who made it, then remove it",
            )


@dataclass(frozen=True)
class _Step:
    """One component of the way."""

    name: str
    link: Path | None  # the link whose text it comes from


@dataclass
class _Walk:
    """The folders from the root to where the walk is, each held open."""

    root: Path
    goal: Path
    stack: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    steps: list[_Step] = field(default_factory=list)  # what is to come, the next one last
    links: int = 0

    def __enter__(self) -> _Walk:
        self.stack.append(os.open(self.root, _FOLDER))
        return self

    def __exit__(self, *error: object) -> None:
        while self.stack:
            os.close(self.stack.pop())

    @property
    def known(self) -> Path:
        """Where the walk is, as a person knows it."""
        return self.root.joinpath(*self.names)

    @property
    def place(self) -> Path:
        """Where the walk is, by its descriptor."""
        held = Path(f"/proc/self/fd/{self.stack[-1]}")
        return held if held.is_dir() else self.known

    def go(self, way: PurePath, *, create: bool, has_leaf: bool = False) -> str:
        """Walk down.

        Returns: the name of the last component, not entered, if the way has a leaf.
        """
        self._push(way.parts, None)
        while self.steps:
            step = self.steps.pop()
            if step.name == "..":
                self._up(step)
            elif has_leaf and not self.steps:
                self._refuse_others(step)
                if not self._follow_leaf(step):
                    return step.name
            elif not self._enter(step):
                self._make(step, create=create)
        if has_leaf:  # a link to a folder
            raise self._refusal(self.known, "a file", "a folder")
        return ""

    def _push(self, parts: Sequence[str], link: Path | None) -> None:
        self.steps += [_Step(name, link) for name in reversed(parts) if name not in ("", ".")]

    def _up(self, step: _Step) -> None:
        if len(self.stack) == 1:
            raise self._leads_out(step.link or self.goal)
        os.close(self.stack.pop())
        self.names.pop()

    def _enter(self, step: _Step) -> bool:
        """Go into a folder, or on along the text of a link; False if there is nothing of that name."""
        self._refuse_others(step)
        try:
            descriptor = os.open(step.name, _FOLDER | os.O_NOFOLLOW, dir_fd=self.stack[-1])
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                error.filename = str(self.known / step.name)
                raise
            if not self._follow(step):
                raise self._refusal(self.known / step.name, "a folder", "something else") from None
            return True
        self.stack.append(descriptor)
        self.names.append(step.name)
        return True

    def _refuse_others(self, step: _Step) -> None:
        if step.name.casefold() in _OTHERS:
            where, found = (step.link, _told(step.link)) if step.link else (self.known / step.name, step.name)
            raise self._refusal(where, "a place that is not another program's", found)

    def _follow_leaf(self, step: _Step) -> bool:
        """Go on along the link in the place of a file; False if there is none."""
        if self._follow(step):
            return True
        try:
            found = os.stat(step.name, dir_fd=self.stack[-1], follow_symlinks=False)
        except FileNotFoundError:
            if step.link is not None:
                raise self._dangles(step.link) from None
            return False
        if not stat.S_ISREG(found.st_mode):
            raise self._refusal(self.known / step.name, "a file", "something else")
        return False

    def _follow(self, step: _Step) -> bool:
        """Put the text of a link on the way; False if it is no link."""
        try:
            text = os.readlink(step.name, dir_fd=self.stack[-1])
        except OSError:  # no link, or gone
            return False
        link = self.known / step.name
        self.links += 1
        if self.links > MAX_LINKS:
            raise self._refusal(link, "a folder inside the checkout", "links that lead in a circle")
        parts = PurePath(text).parts
        if os.path.isabs(text):
            parts = self._below_root(parts, link)
            while len(self.stack) > 1:
                os.close(self.stack.pop())
            self.names.clear()
        self._push(parts, link)
        return True

    def _below_root(self, parts: tuple[str, ...], link: Path) -> tuple[str, ...]:
        """An absolute link's way from the root on."""
        for root in (self.root.parts, PurePath(os.path.realpath(self.root)).parts):
            if parts[: len(root)] == root:
                return parts[len(root) :]
        raise self._leads_out(link)

    def _make(self, step: _Step, *, create: bool) -> None:
        if step.link is not None:
            raise self._dangles(step.link)
        if not create:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.known / step.name))
        with _named(self.place, self.known):
            with suppress(FileExistsError):  # another process was faster
                system.disk.mkdir(self.place / step.name)
            atomic.fsync_directory(self.place)
        self.steps.append(step)

    def _leads_out(self, link: Path, expected: str = "a folder inside the checkout") -> VpstoreError:
        return self._refusal(link, expected, _told(link))

    def _dangles(self, link: Path) -> VpstoreError:
        return self._refusal(link, "something inside the checkout", f"{_told(link)}, where there is nothing")

    def _refusal(self, where: Path, expected: str, found: str) -> VpstoreError:
        return VpstoreError(
            "nothing is written here: it would not lie where the checkout says",
            where=str(where),
            expected=expected,
            found=found,
            next_step="put a folder or file of its own there, or let [tool.vpstore] in pyproject.toml name another "
            f"place than {self._shown(self.goal)}; docs/DESIGN.md says which links are followed",
        )

    def _shown(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _told(link: Path) -> str:
    with suppress(OSError):
        return f"a link to {os.readlink(link)}"
    return "a link"


@contextmanager
def _named(place: Path, known: Path) -> Iterator[None]:
    """Let errors name a folder as a person knows it, not by its descriptor."""
    try:
        yield
    except OSError as error:
        for which in ("filename", "filename2"):
            if isinstance(path := getattr(error, which), (str, os.PathLike)):
                setattr(error, which, _renamed(str(path), place, known))
        raise
    except VpstoreError as error:
        for which in ("where", "found", "next_step"):
            setattr(error, which, _renamed(getattr(error, which), place, known))
        raise


def _renamed(text: str, place: Path, known: Path) -> str:
    """Text with every mention of a place by its descriptor put right; `/proc/self/fd/1` is no part of `…/fd/12`."""
    before, found, after = text.partition(str(place))
    if not found:
        return text
    if after[:1].isdigit():
        return before + found + _renamed(after, place, known)
    return before + str(known) + _renamed(after, place, known)
