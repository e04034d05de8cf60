"""Runs commands in processes of their own that are forked from one that has already imported the program.

Starting Python and importing the command line takes most of a short command's time; a test file runs a hundred of them.
Each command still is a process with its own working directory, environment and file descriptors.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

# A command with this in its environment asks what is stale in a fresh Python, as the program does, and not in a fork.
APART = "SMALL_APART"


class CommandServer:
    """The client's side: one child process that forks a grandchild a command."""

    def __init__(self, repository: Path, script: str = __file__) -> None:
        folders = [str(repository), str(Path(__file__).parent)]
        self._process = subprocess.Popen(
            [sys.executable, script],
            cwd=repository,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, arguments: list[str], *, cwd: Path, environment: dict[str, str], folder: Path
    ) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of one command."""
        out, err = folder / "stdout", folder / "stderr"
        request = [arguments, str(cwd), environment, str(out), str(err)]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return code, out.read_text(), err.read_text()

    def close(self) -> None:
        """End the child."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()


def serve() -> None:
    import importlib
    import pkgutil
    import sqlite3
    import tomllib

    import rfc8785
    import yaml

    import vpstore.api
    import vpstore.stale
    import vpstore.verbs
    from vpstore.cli import main

    del sqlite3, tomllib, rfc8785, yaml  # loaded beforehand, used by the commands
    for package in (vpstore.api, vpstore.verbs):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    apart = vpstore.stale.subprocess  # type: ignore[attr-defined]

    def command(arguments: list[str]) -> None:
        if APART not in os.environ:
            vpstore.stale.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
                PIPE=apart.PIPE, DEVNULL=apart.DEVNULL, run=forked
            )
        sys.argv = ["vpstore", *arguments]
        main()  # supervised, as a person's command is

    answer(command)


def answer(main: Callable[[list[str]], object]) -> None:
    """Call a function for each request, in a fork of this process; what it returns is the exit code, None is 0."""
    gc.collect()
    gc.freeze()  # a child that collects garbage would write to every page that it shares with this process
    for line in sys.stdin:
        arguments, cwd, environment, out, err = json.loads(line)
        child = os.fork()
        if child == 0:
            for name, number in ((out, 1), (err, 2)):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(environment)
            leave(partial(main, arguments))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)


def leave(act: Callable[[], object]) -> NoReturn:
    """Do something and end with its exit code, without taking every module apart: that takes longer than a command.

    Without the exit handlers, too: the program has none.
    """
    code = 1
    try:
        found = act()
        code = found if isinstance(found, int) else 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def forked(command: list[str], *, input: bytes, cwd: Path, env: dict[str, str], **rest: Any) -> Any:
    """`subprocess.run` for `python -m vpstore.stale`: in a fork of this process, which has loaded no project's code."""
    from vpstore.stale import main

    assert command[1:] == ["-P", "-m", "vpstore.stale"]
    asked, answered = os.memfd_create("asked"), os.memfd_create("answered")
    os.pwrite(asked, input, 0)
    child = os.fork()
    if child == 0:
        for number, place in enumerate((asked, answered, os.open(os.devnull, os.O_WRONLY))):
            os.dup2(place, number)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        leave(main)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(answered, "rb") as said:
        said.seek(0)
        os.close(asked)
        return SimpleNamespace(stdout=said.read(), returncode=code)


if __name__ == "__main__":
    serve()
