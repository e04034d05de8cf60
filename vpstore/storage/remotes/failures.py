"""Trying again, and saying what failed: shared by the transports.

Place in the path: under each remote. A reset connection, an answer 5xx or a body that ends early is tried again a
bounded number of times, with a pause that doubles, from the byte that was reached; then it is a RemoteFailure.
Invariants: an error of the project itself, or an object that is not there, is never tried again; a mistake in a program
stays what it is; messages carry no credentials, since they say only the label, the name and what the server answered.

Example:
    link = Link("origin (s3://models)", Patience())
    data = link.attempt(name, "reading", lambda: get(name))
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeVar

from vpstore.errors import RemoteFailure, VpstoreError

PROGRESS: Final = 1 << 20  # so many bytes since the last failure, and the count of failures begins again
_MISTAKES: Final = (TypeError, AttributeError, NameError, AssertionError, IndexError)
_SECRETS: Final = ("credential", "token", "profile", "sso", "auth", "permissiondenied", "hostkey")
_REFUSALS: Final = (401, 403)  # of HTTP
_AGAIN: Final = "run the command again: what went over is kept where the remote allows it"
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Patience:
    """How often a transport tries, and how long it waits in between."""

    attempts: int = 4
    pause_seconds: float = 0.2  # after the first failure; doubles with each further one


class Broken(Exception):
    """An answer that is not what was asked for, and may be right the next time."""

    def __init__(self, what: str, *, expected: str = "", found: str = "") -> None:
        super().__init__(what)
        self.what, self.expected, self.found = what, expected, found


def check_name(name: str) -> str:
    """Hold the name of an object against what a remote can have; a folder's name may end with a slash.

    Raises:  RemoteFailure: absolute, empty, with `.`, `..`, an empty part, a backslash or a control character.
    """
    parts = name.removesuffix("/").split("/")
    is_wrong = any(part in ("", ".", "..") for part in parts) or any(ord(letter) < 32 for letter in name)
    if is_wrong or "\\" in name or "\x7f" in name or len(name) > 900:
        raise RemoteFailure(
            "a name that no object of a remote has",
            found=repr(name)[:120],
            expected="a relative name with forward slashes, such as keys/ab/...",
        )
    return name


@dataclass(frozen=True)
class Link:
    """What a transport knows of the remote when something fails."""

    label: str
    patience: Patience = Patience()

    def attempt(self, name: str, doing: str, action: Callable[[], _Result]) -> _Result:
        """Do it, again and again if it may help.

        Raises:  RemoteFailure: refused, or failed too often; VpstoreError: as the action raised it.
        """
        tries = 0
        while True:
            try:
                return action()
            except Exception as error:
                tries += 1
                self.pause_or_raise(error, name, doing, tries)

    def resumed(self, name: str, start: int, stream: Callable[[int], Iterator[bytes]]) -> Iterator[bytes]:
        """The bytes of an object from `start` on, whatever number of connections it takes.

        Args:    stream: opens the object at an offset; asked again at the byte that was reached.
        """
        reached, tries = start, 0
        while True:
            before = reached
            pieces = stream(reached)
            try:
                for data in pieces:
                    reached += len(data)
                    yield data
                return
            except Exception as error:
                tries = 1 if reached - before >= PROGRESS else tries + 1
                self.pause_or_raise(error, name, f"reading byte {reached}", tries)
            finally:
                if close := getattr(pieces, "close", None):
                    close()

    def pause_or_raise(self, error: Exception, name: str, doing: str, tries: int) -> None:
        """Wait a little if the failure may pass; raise if it will not, or not soon."""
        if isinstance(error, (VpstoreError, FileNotFoundError, *_MISTAKES)):
            raise error
        if is_refusal(error):
            raise self.failure(
                name,
                f"the remote refuses {doing}",
                found=_said(error),
                next_step="check the credentials and permissions that DVC is given for this remote "
                "(`dvc remote modify --local`, environment, profile)",
            ) from error
        if isinstance(error, NotImplementedError):
            raise self.failure(
                name, f"the remote cannot do what {doing} needs", found=_said(error), next_step="use another remote"
            ) from error
        if tries >= self.patience.attempts:
            what = f"{doing} failed" + (f" {tries} times" if tries > 1 else "")
            if isinstance(error, Broken):
                raise self.failure(name, f"{what}: {error.what}", expected=error.expected, found=error.found) from error
            raise self.failure(name, what, found=_said(error)) from error
        time.sleep(self.patience.pause_seconds * 2 ** (tries - 1))

    def failure(
        self, name: str, what: str, *, expected: str = "", found: str = "", next_step: str = _AGAIN
    ) -> RemoteFailure:
        """The error to raise."""
        where = f"{self.label}: {name}" if name else self.label
        return RemoteFailure(what, where=where, expected=expected, found=found, next_step=next_step)


def is_refusal(error: BaseException) -> bool:
    """Whether the remote, or the search for credentials, said no; asking again gives no other answer."""
    reason: BaseException | None = error
    while reason is not None:  # adlfs wraps the answer of the server into a RuntimeError
        if isinstance(reason, PermissionError) or _status(reason) in _REFUSALS:
            return True
        kind = type(reason).__name__.lower()
        if not isinstance(reason, OSError) and any(word in kind for word in _SECRETS):
            return True
        reason = reason.__cause__
    return False


def _status(error: BaseException) -> int | None:
    """The status of the HTTP answer behind an error, as its library keeps it."""
    for name in ("status_code", "code", "status"):  # azure.core, gcsfs, aiohttp
        found = getattr(error, name, None)
        if isinstance(found, int) or str(found).isdigit():
            return int(str(found))
    # gcsfs keeps nothing but these words of a 403
    return 403 if type(error) is OSError and str(error).startswith("Forbidden: ") else None


def _said(error: BaseException) -> str:
    """One line of what a library said."""
    text = ""
    with suppress(Exception):
        text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno and not text:
        text = os.strerror(error.errno)
    return f"{type(error).__name__}: {text}"[:300]
