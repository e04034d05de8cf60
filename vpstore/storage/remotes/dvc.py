"""The project's own DVC remotes, opened. The one module that touches DVC's Python API.

Place in the path: push, pull, repair and `verify --remote` call `open_remote` and then know only `base.Remote`.
From DVC come the configuration of all levels (repository, local, global, system), the URL, and the file system with its
credentials; the repository itself is not opened, so nothing is locked and nothing is written.
Invariants: credentials never reach a label or a message; a mistake in the configuration is a UsageError with the
command that puts it right.

Example:
    remote = open_remote(work.checkout.root, None)  # the default remote
"""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from vpstore.errors import RemoteFailure, UsageError, VpstoreError
from vpstore.storage.remotes.base import Remote
from vpstore.storage.remotes.directory import DirectoryRemote
from vpstore.storage.remotes.failures import Patience
from vpstore.storage.remotes.filesystem import FilesystemRemote
from vpstore.storage.remotes.s3 import S3Remote
from vpstore.storage.remotes.web import WebRemote

_ADD: Final = "dvc remote add -d NAME URL"


def open_remote(root: Path, name: str | None, *, must_exist: bool = False) -> Remote:
    """Open a DVC remote of a checkout.

    Args:    root: of the checkout; DVC's folder is here or upwards; name: None for the default one; must_exist: for
             who reads: a directory that is not there, as a share that is not mounted, would look like an empty remote.
    Raises:  UsageError: no DVC here, no such remote, none configured, a configuration that DVC does not read.
             RemoteFailure: its plugin is not installed, its credentials cannot be had, or its directory or bucket is
             absent.
    """
    try:
        import dvc.config
        import dvc.exceptions
        import dvc.fs
    except ImportError as error:
        raise UsageError(
            "DVC is not installed", where=str(root), found=_line(error), next_step='pip install "dvc>=3.67,<4"'
        ) from error
    folder = _dvc_folder(root)
    url = where = str(folder / "config")
    try:
        config = dvc.config.Config(str(folder))
        chosen = _chosen(name or config["core"].get("remote"), sorted(config["remote"]), where=where)
        url = str(config["remote"][chosen]["url"])
        where = f"{chosen} ({without_secrets(url)})"
        kind, options, path = dvc.fs.get_cloud_fs(config, name=chosen)
        if kind.protocol == "local" and must_exist:
            _mind_absence(Path(path), where)
        return _opened(kind, options, path, where)
    except VpstoreError:
        raise
    except (dvc.fs.RemoteMissingDepsError, ImportError) as error:
        scheme = urlsplit(url).scheme
        plugin = f"dvc-{_PLUGINS.get(scheme, scheme)}"
        raise RemoteFailure(
            f"this remote needs the package {plugin}",
            where=where,
            found=_line(error),
            next_step=f"pip install {plugin}",
        ) from error
    except (dvc.exceptions.DvcException, dvc.fs.ConfigError) as error:
        raise UsageError(
            "DVC's configuration of remotes is not acceptable", where=where, found=_line(error), next_step=_ADD
        ) from error
    except Exception as error:
        raise RemoteFailure(
            "the remote cannot be opened",
            where=where,
            found=f"{type(error).__name__}: {_line(error)}",
            next_step="check its address and the credentials that DVC is given (`dvc remote modify --local`)",
        ) from error


# The clients of GS, Azure and HTTP try again themselves, for half a minute or more; this cannot be switched off.
_SHORT: Final = Patience(attempts=2)
# They log what they raise, too, with a traceback, which Python prints if nobody has asked for the log.
for _client in ("gcsfs", "adlfs", "azure"):
    logging.getLogger(_client).addHandler(logging.NullHandler())
_KINDS: Final = ("s3", "gs", "azure", "ssh", "http", "https")  # and the directory
_PLUGINS: Final = {"azure": "azure", "gcs": "gs", "webdavs": "webdav", "https": "http"}


def _opened(kind: Any, options: dict[str, Any], path: str, label: str) -> Remote:
    if kind.protocol == "local":
        return DirectoryRemote(Path(path), label)
    if kind.protocol not in _KINDS:
        raise UsageError(
            "vpstore does not speak to this kind of remote",
            where=label,
            expected="a directory, s3, gs, azure, ssh, or http(s) to read from",
            found=str(kind.protocol),
            next_step=f"name another remote (-r NAME), or {_ADD}",
        )
    opened = kind(**options)
    if kind.protocol in ("http", "https"):
        return WebRemote(opened.fs, path, label, patience=_SHORT)
    if kind.protocol == "s3":
        # Trying again is done by our own transport, which knows what was reached; twice would multiply the waiting.
        opened.fs_args.setdefault("config_kwargs", {}).setdefault("retries", {"total_max_attempts": 1})
        return S3Remote(opened.fs, path, label)
    from dvc_objects.fs.base import ObjectFileSystem

    if not isinstance(opened, ObjectFileSystem):
        return FilesystemRemote(opened.fs, path, label)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "GCS project not set - cannot list or create buckets": nobody wants to
        remote = FilesystemRemote(opened.fs, path, label, patience=_SHORT)
    remote.mind_absence()
    return remote


def _mind_absence(folder: Path, where: str) -> None:
    if not folder.is_dir():
        raise RemoteFailure(
            "the remote's directory is absent",
            where=where,
            expected="a directory",
            found="something else" if folder.exists() else "nothing",
            next_step="mount it, or put the URL right with `dvc remote modify NAME url`; `vpstore push` makes one",
        )


def _dvc_folder(root: Path) -> Path:
    for folder in (root.absolute(), *root.absolute().parents):
        if (folder / ".dvc").is_dir():
            return folder / ".dvc"
    raise UsageError(
        "there is no DVC project here", where=str(root), expected="a .dvc folder here or upwards", next_step="dvc init"
    )


def _chosen(name: str | None, known: list[str], *, where: str) -> str:
    """The remote's name as DVC keeps it."""
    if not name:
        next_step = f"-r {known[0]}, or for good: dvc remote default {known[0]}" if known else _ADD
        raise UsageError("no remote is named", where=where, found=", ".join(known) or "none", next_step=next_step)
    if name.lower() not in known:
        raise UsageError(
            "there is no such remote",
            where=where,
            expected=f"one of {', '.join(known)}" if known else "a configured remote",
            found=name,
            next_step=f"dvc remote add {name} URL",
        )
    return name.lower()


def without_secrets(url: str) -> str:
    """A URL as it may be shown: no user, no password, no query."""
    parts = urlsplit(str(url))
    if not parts.scheme:
        return str(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _line(error: BaseException) -> str:
    """One line of a message, with what looks like a URL's user and password taken out."""
    return re.sub(r"//[^/@\s]+@", "//", " ".join(str(error).split()))[:300]
