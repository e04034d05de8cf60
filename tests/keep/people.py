"""Runs commands as other users, in forks of a process that has loaded all that they need.

Those users may not be able to read Python's own files, so every module must be in memory before; and a test process
that has loaded torch takes longer to fork than a command takes.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_server import CommandServer, answer

GROUP = 41000
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Commands:
    """Commands of one checkout, one after another, each in a child of its own."""

    root: str
    variables: dict[str, str]
    several: list[list[str]]
    codes: list[int]

    def __call__(self) -> None:
        from vpstore.cli import main

        for arguments in self.several:
            child = os.fork()
            if child == 0:
                os.chdir(self.root)
                os.environ.clear()
                os.environ.update(self.variables)
                try:
                    main(arguments)
                except SystemExit as leaving:
                    sys.stdout.flush()
                    os._exit(int(leaving.code or 0))
                except BaseException:
                    traceback.print_exc()
                    os._exit(70)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code in self.codes, f"{arguments}: exit {code}"


class PeopleServer(CommandServer):
    """The client's side: a process of root's that becomes whoever is asked for."""

    def __init__(self) -> None:
        folders = [REPOSITORY, REPOSITORY / "tests" / "store", Path(__file__).parent]
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def act(self, commands: Commands, who: dict[str, Any], folder: Path) -> int:
        """The exit code of the commands as a user; `who` are the arguments of `change_to`."""
        request = [json.dumps(vars(commands)), json.dumps(who)]
        return self.run(request, cwd=REPOSITORY, environment=dict(os.environ), folder=folder)[0]


def change_to(*, user: int, umask: int, log: str, groups: list[int]) -> None:
    """Become another user, whose output goes to the end of a file."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.umask(umask)
    os.setgroups(groups)
    os.setgid(user)
    os.setuid(user)


def in_fork(act: Callable[[], object]) -> int:
    """Do something in a child of this process; 0, or 1 where it raised."""
    child = os.fork()
    if child == 0:
        code = 1
        gc.freeze()  # collecting garbage would write to every page that it shares with this process
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def load_all() -> None:
    """Let this process run what the commands do, once, so that every module they load is in memory."""
    from shared_store import STAGES, Team, unload_recipes

    from vpstore.cli import main

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ |= {"VPSTORE_ROOT": str(folder / "store"), "XDG_CACHE_HOME": str(folder / "cache")}
        os.chdir(Team(folder).checkout("any").root)
        for arguments in (
            ["build", *STAGES],
            ["lock"],
            ["verify", "--all"],
            ["resolve", "plant"],
            ["export", "plant", str(folder / "out")],
            ["gc"],
            ["audit", "plant"],
            ["doctor"],
            ["repair"],
            ["ls"],
            ["nonsense"],
        ):
            try:
                main(arguments)
            except SystemExit:
                continue
            raise AssertionError("a command ends the process")
        os.chdir("/")
    unload_recipes()


def serve() -> None:
    path, (out, err) = list(sys.path), (os.dup(1), os.dup(2))
    for number in (1, 2):  # the answers go to standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    load_all()
    sys.path[:] = path
    for number, kept in ((1, out), (2, err)):
        sys.stdout.flush()
        os.dup2(kept, number)

    def act(arguments: list[str]) -> None:
        change_to(**json.loads(arguments[1]))
        Commands(**json.loads(arguments[0]))()

    answer(act)


if __name__ == "__main__":
    serve()
