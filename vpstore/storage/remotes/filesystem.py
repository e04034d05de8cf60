"""Any other file system behind a DVC remote: GS, Azure, SSH, and what else fsspec has.

Place in the path: `dvc.open_remote` opens it with the raw fsspec file system of the DVC remote. A blob is written under
`vpstore/tmp/<random>` and moved; where the file object can hold back its appearance (`commit`, `discard`), that is
used.
Invariants: what is sent is digested as it goes, and appears only if the digest is the blob's and the size over there is
right; what came is as long as the object; listings are never taken from a cache. Uploads begin anew after a kill, and
leave a nameless piece in `vpstore/tmp/`; downloads are taken up.

Example:
    remote = FilesystemRemote(fs, "/srv/models", "lab (ssh://lab/srv/models)")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from vpstore.errors import RemoteFailure
from vpstore.schema.digest import Digest
from vpstore.storage.partial import Digesting
from vpstore.storage.remotes.base import FOLDER, Moved
from vpstore.storage.remotes.failures import Broken, Link, Patience, check_name
from vpstore.storage.remotes.local import absent, damaged, local_chunks, local_size, oversized

_PIECE: Final = 4 << 20  # bytes


class FilesystemRemote:
    """One folder of an fsspec file system, as a remote."""

    lists = True

    def __init__(self, fs: Any, root: str, label: str, *, patience: Patience | None = None) -> None:
        """Use an fsspec file system; `root` is a path in it, without our own folder."""
        self.label = label
        self._fs = fs
        self._root = f"{root.rstrip('/')}/{FOLDER}"
        self._link = Link(label, patience or Patience())
        self._is_holding: bool | None = None  # not known yet

    def mind_absence(self) -> None:
        """Hold the first part of the root, which in an object store is a bucket, against what is there.

        To an object store, what lies in a bucket that does not exist is only missing: it would look like an empty one.

        Raises:  RemoteFailure: there is no such bucket, or the remote does not answer.
        """
        bucket = self._fs._strip_protocol(self._root).lstrip("/").partition("/")[0]

        def look() -> None:
            try:
                self._fs.info(self._root)
            except FileNotFoundError:  # nothing was pushed yet, or worse
                self._fs.ls(bucket, detail=False)

        try:
            Link(self.label, Patience(attempts=1)).attempt("", "opening", look)
        except FileNotFoundError as error:
            raise self._no_bucket(f"no bucket or container {bucket}") from error

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Every object below a folder, in the order of names."""
        folder = self._path(prefix).rstrip("/")

        def action() -> dict[str, Any]:
            self._fs.invalidate_cache()
            try:
                found: dict[str, Any] = self._fs.find(folder, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            return found if isinstance(found, dict) else {}  # adlfs: a list, if this is a file and no folder

        found = self._link.attempt(prefix, "listing", action)
        base = self._fs._strip_protocol(self._root).rstrip("/") + "/"
        for path, facts in sorted(found.items()):
            inside = path if path.startswith(base) else "/" + path
            # Asked for a folder where a file is, some name the file.
            if facts.get("type", "file") == "file" and inside.startswith(base + prefix):
                yield inside[len(base) :], int(facts["size"])

    def size(self, name: str) -> int | None:
        """The size of one object, or None."""
        path = self._path(name)
        try:
            return self._link.attempt(name, "looking", lambda: self._size(path))
        except FileNotFoundError:
            return None

    def read(self, name: str, *, limit: int) -> bytes:
        """A small object, whole."""
        data = bytearray()
        for piece in self.chunks(name):
            data += piece
            if len(data) > limit:
                raise oversized(self.label, name, limit)
        return bytes(data)

    def chunks(self, name: str, *, start: int = 0) -> Iterator[bytes]:
        """The bytes from `start` on."""
        path = self._path(name)
        try:
            yield from self._link.resumed(name, start, lambda at: self._stream(path, at))
        except FileNotFoundError as error:
            raise absent(self.label, name) from error

    def write(self, name: str, data: bytes) -> None:
        """Put a small object."""
        self._put(name, lambda: iter([data]), lambda found: None)

    def upload(self, name: str, source: Path, digest: Digest, *, moved: Moved) -> None:
        """Put a blob."""
        local_size(source)

        def pieces() -> Iterator[bytes]:
            for data in local_chunks(source, 0, size=_PIECE):
                yield data
                moved(len(data))

        def check(found: Digest) -> None:
            if found != digest:
                raise damaged(source, self.label, digest, found=found)

        self._put(name, pieces, check)

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        path = self._path(name)
        with suppress(FileNotFoundError):
            self._link.attempt(name, "removing", lambda: self._fs.rm_file(path))

    def _put(self, name: str, pieces: Callable[[], Iterator[bytes]], check: Callable[[Digest], None]) -> None:
        """Send, check what was sent and what is over there, and only then let it appear.

        Args:    pieces: the bytes, from the start at each try; check: raises if the digest of what was sent is wrong.
        """
        target = self._path(name)

        def action() -> None:
            self._make_folder(target)
            self._make_folder(f"{self._root}/tmp/x")
            if self._holds_back():
                size = self._sent_held(target, pieces(), check)
            else:
                size = self._sent_aside(target, pieces(), check)
            if (found := self._size(target)) != size:
                raise Broken("what lies there is not what was sent", expected=f"{size} bytes", found=f"{found} bytes")

        try:
            self._link.attempt(name, "uploading", action)
        except FileNotFoundError as error:
            raise self._no_bucket(str(error)[:200], name) from error

    def _no_bucket(self, found: str, name: str = "") -> RemoteFailure:
        next_step = "make the bucket or the folder, or put the URL right with `dvc remote modify NAME url`"
        return self._link.failure(name, "the remote's root is not there", found=found, next_step=next_step)

    def _sent_aside(self, target: str, pieces: Iterator[bytes], check: Callable[[Digest], None]) -> int:
        """Write under another name, then move."""
        aside = self._aside()
        state = Digesting(None)
        try:
            with self._fs.open(aside, "wb") as out:
                _write_all(out, pieces, state)
            check(state.digest)
            if (found := self._size(aside)) != state.size_bytes:
                raise Broken("a piece was lost", expected=f"{state.size_bytes} bytes", found=f"{found} bytes")
            self._fs.mv(aside, target)
        except BaseException:
            with suppress(Exception):  # the first error is the one to report
                self._fs.rm_file(aside)
            raise
        return state.size_bytes

    def _sent_held(self, target: str, pieces: Iterator[bytes], check: Callable[[Digest], None]) -> int:
        """Write under the final name, which appears only on `commit`."""
        state = Digesting(None)
        out = self._fs.open(target, "wb", autocommit=False)
        try:
            _write_all(out, pieces, state)
            check(state.digest)
            out.close()
        except BaseException:
            with suppress(Exception):
                out.close()
            with suppress(Exception):
                out.discard()
            raise
        out.commit()
        self._fs.invalidate_cache()
        return state.size_bytes

    def _holds_back(self) -> bool:
        """Whether this file system's files appear on `commit` only; tried with a file of no name, once.

        Having a `commit` is not enough: what is written to a zonal bucket of Google's is there at once.
        """
        if self._is_holding is None:
            aside = self._aside()
            probe = self._fs.open(aside, "wb", autocommit=False)
            with suppress(Exception):
                probe.write(b"\0")
                probe.close()
            self._is_holding = _commits(type(probe)) and self._size(aside) is None
            with suppress(Exception):
                probe.discard()
            with suppress(Exception):
                self._fs.rm_file(aside)
        return self._is_holding

    def _stream(self, path: str, start: int) -> Iterator[bytes]:
        size = self._size(path)
        if size is None:
            raise FileNotFoundError(path)
        if start >= size:
            return
        left = size - start
        with self._fs.open(path, "rb") as source:
            if source.seek(start) not in (start, None):
                raise Broken("the remote does not go to a byte", expected=str(start))
            while left:
                data = bytes(source.read(min(_PIECE, left)))
                if not 0 < len(data) <= min(_PIECE, left):
                    raise Broken("the object ended early", expected=f"{size} bytes", found=f"{size - left} bytes")
                left -= len(data)
                yield data

    def _size(self, path: str) -> int | None:
        """The size, asked of the remote itself."""
        self._fs.invalidate_cache()
        try:
            facts = self._fs.info(path)
        except FileNotFoundError:
            return None
        return int(facts["size"]) if facts.get("type", "file") == "file" else None

    def _make_folder(self, path: str) -> None:
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _aside(self) -> str:
        return f"{self._root}/tmp/{os.urandom(16).hex()}"

    def _path(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"


def _write_all(out: Any, pieces: Iterator[bytes], state: Digesting) -> None:
    for data in pieces:
        state.add(data)
        left = memoryview(data)
        while left:
            count = out.write(left)
            left = left[len(left) if count is None else count :]


def _commits(kind: type) -> bool:
    """Whether a class of buffered files overrides `commit`; the base class has one that does nothing."""
    is_buffered = any(base.__name__ == "AbstractBufferedFile" for base in kind.__mro__)
    return is_buffered and any("commit" in vars(base) for base in kind.__mro__ if base.__module__ != "fsspec.spec")
