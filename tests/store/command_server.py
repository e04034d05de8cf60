"""Runs commands in processes of their own that are forked from one that has already imported the program.

Starting Python and importing the command line takes most of a short command's time; a test file runs a hundred of them.
Each command still is a process with its own working directory, environment and file descriptors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


class CommandServer:
    """The client's side: one child process that forks a grandchild a command."""

    def __init__(self, repository: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=repository,
            env={**os.environ, "PYTHONPATH": str(repository), "PYTHONDONTWRITEBYTECODE": "1"},
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
    import sqlite3
    import tomllib

    import rfc8785
    import yaml

    import vpstore.api.building
    import vpstore.api.reading
    from vpstore.cli import main

    del sqlite3, tomllib, rfc8785, yaml, vpstore  # loaded beforehand, used by the commands
    for line in sys.stdin:
        arguments, cwd, environment, out, err = json.loads(line)
        child = os.fork()
        if child == 0:
            for name, number in ((out, 1), (err, 2)):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv = ["vpstore", *arguments]
            main()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)


if __name__ == "__main__":
    serve()
