"""The command server of the small project, with what the commands of sharing need loaded beforehand.

A command whose environment has SHARE_SIGNAL_AT=N:S sends itself the signal S before its N-th call that changes a disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from command_server import CommandServer

SIGNAL = "SHARE_SIGNAL_AT"


class SharingServer(CommandServer):
    """The same, started from this file."""

    def __init__(self, repository: Path) -> None:
        folders = [str(repository), str(repository / "tests" / "store")]
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=repository,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


def serve() -> None:
    import aiobotocore.session
    import command_server
    import dvc.config
    import dvc.fs
    import s3fs

    import vpstore.api.sharing
    import vpstore.cli
    import vpstore.storage.remotes.dvc
    import vpstore.storage.system

    assert all([dvc.fs.get_cloud_fs, s3fs, aiobotocore.session]), "loaded beforehand, used by the commands"
    real = vpstore.cli.main

    def main(arguments: Sequence[str] | None = None) -> NoReturn:
        if os.environ.get(SIGNAL):
            vpstore.storage.system.disk = signalling(*map(int, os.environ[SIGNAL].split(":")))
        real(arguments)

    vpstore.cli.main = main
    command_server.serve()


def signalling(at: int, number: int) -> Any:
    """The real disk, until its N-th call."""
    from vpstore.storage.system import Disk

    calls, turn = [0], threading.Lock()

    def counted(name: str) -> Any:
        def call(self: Disk, *arguments: Any) -> Any:
            with turn:
                calls[0] += 1
                if calls[0] == at:
                    os.kill(os.getpid(), number)
            return getattr(Disk, name)(self, *arguments)

        return call

    names = [name for name in vars(Disk) if not name.startswith("_")]
    return type("Signalling", (Disk,), {name: counted(name) for name in names})()


if __name__ == "__main__":
    serve()
