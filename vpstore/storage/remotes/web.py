"""A web server as a remote to read from: what somebody pushed to a directory, served by http or https.

Place in the path: `dvc.open_remote` opens it with the raw fsspec file system of an http(s) remote. Nothing is ever
written: there is no way to make an object appear whole that all servers know.
Invariants: an object is absent only if the server says so (404 or 410); an answer of another kind, or none, is a
failure. A folder's names are taken from the page that lists it, where the server has one, and only those below it.

Example:
    remote = WebRemote(fs, "https://models.example/team", "team (https://models.example/team)")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn
from urllib.parse import unquote, urldefrag

from vpstore.errors import RemoteFailure
from vpstore.schema.digest import Digest
from vpstore.storage.remotes.base import Moved
from vpstore.storage.remotes.failures import Broken, check_name
from vpstore.storage.remotes.filesystem import FilesystemRemote

_ABSENT: Final = (404, 410)
_UNLISTED: Final = (403, 404, 405, 410)  # what servers say that show no folder
_PIECE: Final = 4 << 20  # bytes
_DEPTH: Final = 5  # of folders: blobs/blake3/ab/...


class WebRemote(FilesystemRemote):
    """A folder of a web server."""

    lists = False

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Every object that the server's pages name below a folder; none where it shows no folders."""
        for name in sorted(set(self._names(prefix, _DEPTH))):
            if (size := self.size(name)) is not None:
                yield name, size

    def write(self, name: str, data: bytes) -> None:
        """Refused."""
        self._refuse()

    def upload(self, name: str, source: Path, digest: Digest, *, moved: Moved) -> None:
        """Refused."""
        self._refuse()

    def remove(self, name: str) -> None:
        """Refused."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise RemoteFailure(
            "a web server is a remote to read from only",
            where=self.label,
            next_step="push to the directory or bucket that it serves, as a DVC remote of its own (-r NAME)",
        )

    def _names(self, prefix: str, depth: int) -> Iterator[str]:
        base = self._path(prefix)

        def look() -> list[str]:
            try:
                return [str(link) for link in self._fs.ls(base, detail=False)]
            except Exception as error:
                if _status(error) in _UNLISTED or (_status(error) is None and isinstance(error, FileNotFoundError)):
                    return []
                raise

        for link in self._link.attempt(prefix, "listing", look):
            inner = unquote(urldefrag(link)[0].partition("?")[0])
            name = prefix + inner.removeprefix(base)
            with suppress(RemoteFailure):  # no name of an object, or of a folder
                if not inner.startswith(base) or name == prefix or check_name(name) != name:
                    continue
                if not name.endswith("/"):
                    yield name
                elif depth:
                    yield from self._names(name, depth - 1)

    def _stream(self, path: str, start: int) -> Iterator[bytes]:
        """The whole object in one answer; what came before is read again and thrown away.

        Not in ranges: a server that knows none sends the whole each time.
        """
        size = self._size(path)
        if size is None:
            raise FileNotFoundError(path)
        if start >= size:
            return
        reached = 0
        with self._fs.open(path, "rb", block_size=0) as source:
            while reached < size:
                data = bytes(source.read(min(_PIECE, size - reached)))
                if not data:
                    raise Broken("the object ended early", expected=f"{size} bytes", found=f"{reached} bytes")
                reached += len(data)
                if reached > start:
                    yield data[max(0, len(data) - (reached - start)) :]

    def _size(self, path: str) -> int | None:
        """The size, as the server says it."""
        try:
            size = self._fs.info(path).get("size")
        except FileNotFoundError as error:  # fsspec says so of every failure
            if _status(error) in _ABSENT or error.__cause__ is None:
                return None
            raise error.__cause__ from None  # not `from error`, whose cause it is: that would be a circle
        if size is None:
            raise Broken("the server does not say how large an object is", expected="Content-Length")
        return int(size)


def _status(error: BaseException) -> int | None:
    """The status of the answer behind an error."""
    for reason in (error, error.__cause__):
        if isinstance(found := getattr(reason, "status", None), int):
            return found
    return None
