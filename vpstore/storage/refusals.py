"""What the operating system refuses, said to a person: where, and what to do next.

Place in the path: beside `atomic`, around everything that reads or changes a disk for a command.
Invariants: only refusals that a person can do something about become errors of ours; others, a missing file above all,
are faults of the program and stay what they are.

Example:
    with disk_errors(store.root, "publishing vpMoE@smoke"): ...
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vpstore.errors import BadManifest, VpstoreError
from vpstore.storage import modes

_TEMPORARY: Final = re.compile(r"\.?\d+-[0-9a-f]{16}(\.json)?")  # as `atomic.temporary_name` makes them
_ADVICE: Final[Mapping[int, str]] = {
    errno.ENOSPC: "free space on this file system, then run the command again: what was stored is kept",
    errno.EDQUOT: "raise the quota, then run the command again: what was stored is kept",
    errno.EACCES: "give this user access to the path",
    errno.EPERM: "give this user access to the path",
    errno.EROFS: "mount the file system writable, or set VPSTORE_ROOT to a writable place",
    errno.EIO: "the device reports damage: move the store to another disk",
    errno.EFBIG: "raise the limit on file sizes, or move the store to a file system that takes large files",
    errno.ENAMETOOLONG: "move the checkout or the store to a place with a shorter path",
    errno.EXDEV: "let all folders of the store lie on one file system",
    errno.ESTALE: "mount the network file system again, then run the command again",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EISDIR: "a folder lies where a file should: move it away",
    errno.ENOTDIR: "a file lies where a folder should: move it away",
    errno.ELOOP: "a symbolic link lies where a file should: remove it",
}
NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what flock says where there is none
_ELSEWHERE: Final = (
    "vpstore doctor tries what this file system can; set VPSTORE_ROOT, or put the checkout, on one that can do it"
)
# What a file system may lack. From a call of ours these are its limits; in a project's code they may be its mistakes.
_LIMITS: Final[Mapping[int, str]] = {
    **dict.fromkeys((errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EMLINK), _ELSEWHERE),
    errno.ENOLCK: "mount the file system with locks (Lustre: -o flock; NFS: lockd), or use another (VPSTORE_ROOT)",
    errno.ENOTEMPTY: "another process or a person put something there: look at it, then run the command again",
    errno.EBUSY: "something holds the path, as a mount: look at it, then run the command again",
    errno.ETXTBSY: "a program runs from that file: end it, then run the command again",
    errno.ENOTCONN: "the file system is not mounted any more: mount it, then run the command again",
    errno.ETIMEDOUT: "the file system does not answer: look at its server, then run the command again",
    errno.EHOSTDOWN: "the file system does not answer: look at its server, then run the command again",
    errno.EREMOTEIO: "the file system's server reports an error: look at it, then run the command again",
    errno.ENODEV: "the device is gone: attach it, then run the command again",
    errno.ENXIO: "the device is gone: attach it, then run the command again",
    errno.ENOMEM: "free memory, then run the command again",
    errno.ENFILE: "raise the system's limit on open files (fs.file-max)",
}


def as_error(error: OSError, where: Path | str, doing: str, *, is_ours: bool = True) -> VpstoreError | None:
    """The error of ours for a refusal, or None if it is no refusal but a fault of the program.

    Args:    is_ours: a call of vpstore's own was refused, and not one of the project's code.
    """
    advice = _ADVICE.get(error.errno or 0) or (_LIMITS.get(error.errno or 0) if is_ours else None)
    if advice is None:
        return None
    what = f"{doing} failed: {os.strerror(error.errno or 0)}"
    # Of the two names of a renaming, the new one is what a person knows.
    place = _known(str(error.filename2 or error.filename or where))
    is_refused = error.errno in (errno.EACCES, errno.EPERM) and os.path.isabs(place)
    return VpstoreError(what, where=place, found=modes.whose(Path(place)) if is_refused else "", next_step=advice)


def _known(path: str) -> str:
    """A path, or the folder in which it would have lain under a temporary name, which nobody has ever seen."""
    parts = path.split(os.sep)
    made_up = [number for number, part in enumerate(parts) if _TEMPORARY.fullmatch(part)]
    return os.sep.join(parts[: made_up[0]]) or os.sep if made_up else path


def refusal(error: OSError) -> str:
    """Why a file cannot be read, in a list of faults; whose it is if that is the reason."""
    owner = modes.whose(Path(error.filename)) if isinstance(error, PermissionError) and error.filename else ""
    return f"unreadable: {error.strerror}" + (f"; {owner}" if owner else "")


@contextmanager
def disk_errors(where: Path | str, doing: str) -> Iterator[None]:
    """Turn the operating system's refusals into errors that say where and what next.

    Raises:  VpstoreError: no space, no permission, a read-only file system, a quota, an input/output error.
    """
    try:
        yield
    except OSError as error:
        known = as_error(error, where, doing)
        if known is None:
            raise
        raise known from error


def read_plain(path: Path, doing: str) -> bytes:
    """The bytes of a small file of the store: no link is followed, and no pipe is waited for.

    Raises:  BadManifest: something that is no file; VpstoreError: as `disk_errors`.
    """
    with disk_errors(path, doing):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise BadManifest("no plain file", where=str(path), expected="a file", next_step="vpstore repair")
        return path.read_bytes()
