"""Heals in processes of their own that are forked from one that has read torch, the recipe and the tokenizer.

A test kills these processes and starts others that go on; reading all that takes longer than the few steps of a pico.
The process that is forked computes nothing itself: threads do not survive a fork.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class Healing:
    """One process that heals; it says each finished step."""

    def __init__(self, server: HealServer, pipe: Path) -> None:
        self._server = server
        self._said = pipe.open(encoding="utf-8")
        self.pid = int(self._said.readline())
        self.lines: Iterator[str] = iter(self._said)

    def kill(self) -> None:
        """SIGKILL, at once."""
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> tuple[int, str]:
        """Its exit code, and what it has said that was not read yet."""
        with self._said:
            left = "".join(self.lines)
        return self._server.code(), left


class HealServer:
    """The client's side; one process at a time."""

    def __init__(self, folder: Path, *, steps: int) -> None:
        self._pipe = folder / "said"
        os.mkfifo(self._pipe)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._pipe), str(steps)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, root: Path, scratch: str, *, first: str = "") -> Healing:
        """Heal what lies in a workshop's folder, after running some lines of Python in that process."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(root), scratch, first]) + "\n")
        self._process.stdin.flush()
        return Healing(self, self._pipe)

    def code(self) -> int:
        """How the process that was started last has ended."""
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the server."""
        self._process.communicate(timeout=60)


def serve(pipe: str, steps: int) -> None:
    from recipes.runtime import fix_numerics

    fix_numerics(1)
    from training_pico import heal_params

    from recipes import heal
    from recipes.data.harmony import HarmonyTokenizer

    made: list[HarmonyTokenizer] = []
    read = HarmonyTokenizer.from_directory

    def once(path: Path) -> HarmonyTokenizer:
        if not made:
            made.append(read(path))
        return made[0]

    HarmonyTokenizer.from_directory = once  # type: ignore[method-assign, assignment]
    for line in sys.stdin:
        root, scratch, first = json.loads(line)
        once(Path(root) / "tokenizer")
        gc.freeze()  # a child that collects garbage would write to every page that it shares with this process
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(os.open(pipe, os.O_WRONLY), 1)
                print(os.getpid(), flush=True)
                exec(first, {})
                heal_and_write(heal, heal_params(steps=steps), Path(root), scratch)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def heal_and_write(heal: Any, params: Any, root: Path, scratch: str) -> None:
    """Heal, and write what came out."""
    from training_pico import Workshop

    from recipes.tensors import write_safetensors

    def say(label: str, done: int, total: int) -> None:
        print(label, done, flush=True)

    context = replace(Workshop(root).context(params, scratch=scratch), progress=say)
    result = heal.run(context)
    write_safetensors(context.scratch / "result.safetensors", dict(result.tensors))
    report = result.report
    (context.scratch / "report.json").write_text(json.dumps([report.metrics, report.plots], sort_keys=True))


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
