"""Child processes of the tests of recipes/execute.py, and what they leave behind in a scratch folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = 60.0  # after which something hangs


def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    folders = [HERE, HERE.parent / "surgery", ROOT]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "VPSTORE_WORKERS"},
        "PYTHONPATH": os.pathsep.join(str(folder) for folder in folders),
        **variables,
    }
    command = [sys.executable, str(HERE / "execute_driver.py"), *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    return out


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


def shards(scratch: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((scratch / "shards").iterdir())}


def computed(scratch: Path) -> list[tuple[int, str]]:
    """Who computed what, in order: process and name."""
    lines = (scratch / "computed.log").read_text().splitlines()
    return [(int(pid), name) for pid, _, name in (line.partition(" ") for line in lines)]


def markers(scratch: Path) -> int:
    """How many tensors are marked as done."""
    folder = scratch / "shards.done"
    return sum(path.stat().st_size == 64 for path in folder.iterdir()) if folder.is_dir() else 0


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
