"""Runs functions in processes of their own, forked from one that has imported the program and done nothing else.

A case of the matrix needs two or three processes that may be killed at any instruction. Starting Python for each would
take a second; a fork takes milliseconds. The parent of the forks must never have used the thread pool of the digest
library, as threads do not survive a fork: so it is a process of its own, not the test's.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]


class ForkServer:
    """The client's side."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(REPOSITORY), str(HERE), str(HERE.parent / "store")])
        # Without PATH no git is found: attestations then say so, and no time is spent on it.
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("VPSTORE_", "SMALL_", "GIT_"))
        }
        self._result = tempfile.NamedTemporaryFile(prefix="vpstore-fork-", suffix=".json")  # noqa: SIM115 - closed below
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._result.name],
            env={**kept, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/nonexistent"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, function: str, *arguments: Any, cwd: Path, cache: Path) -> dict[str, Any]:
        """Call `module:function` in a process of its own.

        Returns: {"end": "killed"}, or {"end": "done", "value": what it returned}, or {"end": "crashed", "trace": text}.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.truncate(self._result.name, 0)
        self._process.stdin.write(json.dumps([function, arguments, str(cwd), str(cache)]) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        if code == -9:
            return {"end": "killed"}
        if code != 0:
            return {"end": "crashed", "trace": f"exit {code}"}
        return dict(json.loads(Path(self._result.name).read_text()))

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()
        self._result.close()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(result: str) -> None:
    import gc
    import sqlite3

    import rfc8785
    import yaml

    import vpstore.api.building
    import vpstore.api.keeping
    import vpstore.api.reading

    del sqlite3, rfc8785, yaml, vpstore  # loaded beforehand, used by the children
    import disk_scenarios  # noqa: F401

    gc.collect()
    gc.freeze()  # a child that collects garbage would write to every page that it shares with this process
    for line in sys.stdin:
        function, arguments, cwd, cache = json.loads(line)
        child = os.fork()
        if child == 0:
            _child(result, function, arguments, cwd, cache)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _child(result: str, function: str, arguments: list[Any], cwd: str, cache: str) -> None:
    try:
        os.chdir(cwd)
        os.environ["XDG_CACHE_HOME"] = cache
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        module, _, name = function.partition(":")
        try:
            document = {"end": "done", "value": getattr(importlib.import_module(module), name)(*arguments)}
        except BaseException:
            document = {"end": "crashed", "trace": traceback.format_exc()}
        Path(result).write_text(json.dumps(document))
    finally:
        os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
