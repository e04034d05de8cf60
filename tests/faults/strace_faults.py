"""The real program under the real kernel's refusals: `strace -e inject=` kills or refuses at the n-th system call."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from disk_matrix import set_step
from small_project import Project

STRACE = shutil.which("strace")


class Injection(NamedTuple):
    """A system call, what happens to it, and at which time of its being made."""

    call: str
    what: str
    when: int


SHORT = (
    Injection("fsync", "signal=SIGKILL", 41),
    Injection("rename", "signal=SIGKILL", 9),
    Injection("fsync", "error=EIO", 30),
    Injection("rename", "error=ENOSPC", 11),
)
TIMES = {"fsync": (1, 12, 57, 70), "rename": (1, 5, 14), "unlink": (1, 3, 8), "write": (4, 9, 15, 22)}
FULL = SHORT + tuple(
    Injection(call, what, when)
    for call, times in TIMES.items()
    for what in ("signal=SIGKILL", "error=EIO", "error=ENOSPC")
    for when in times
) + tuple(Injection("write", "retval=7", when) for when in (4, 9, 15, 22))  # fmt: skip


def inject(project: Project, injection: Injection) -> list[str]:
    """Build under one injection, then look, build again, and look again.

    Returns: what was wrong.
    """
    set_step(project.root, 7)
    command = [str(STRACE), "-f", "-qq", "-e", f"trace={injection.call}", "-e",
               f"inject={injection.call}:{injection.what}:when={injection.when}", "-o", "/dev/null",
               *project.command("build", "plant@sprout", "plant@bloom")]  # fmt: skip
    done = subprocess.run(
        command, cwd=project.root, env=project.variables(), text=True, capture_output=True, timeout=120, check=False
    )
    wrong = []
    if "Traceback" in done.stderr:
        wrong.append("a traceback: " + done.stderr.strip().splitlines()[-1])
    is_lie = "retval" in injection.what  # the kernel says it wrote what it did not: found, if not prevented
    if "signal" not in injection.what and done.returncode not in ((0, 1, 13, 20) if is_lie else (0, 1)):
        wrong.append(f"exit {done.returncode}: {done.stderr.strip()[:200]}")
    if done.returncode == 1 and "  next " not in done.stderr and "Traceback" not in done.stderr:
        wrong.append(f"no next step: {done.stderr.strip()[:200]}")
    wrong += [f"afterwards: {line}" for line in _look(project, is_lie=is_lie)]
    project.run("build", "--all")
    return wrong + [f"after the retry: {line}" for line in _look(project, is_lie=False)]


def _look(project: Project, *, is_lie: bool) -> list[str]:
    """Every ref resolves, and verify finds nothing; after a lie it may find what resolve then must refuse."""
    faults = complaints(project, "verify", "--all")
    if faults and not is_lie:
        return faults
    return [] if is_lie and faults else complaints(project, "resolve", "plant", "--full")


def complaints(project: Project, *arguments: str) -> list[str]:
    """A command's complaints; none if it ends well."""
    for code in (0, 3, 10, 11, 12, 13, 14):
        try:
            done = project.run(*arguments, code=code)
        except AssertionError:
            continue
        return [] if code == 0 else [f"exit {code}: {(done.stdout + done.stderr)[:300]}"]
    return [f"{arguments} ended with a code that is not documented"]


def fresh_copy(template: Project, folder: Path) -> Project:
    """A project to spoil."""
    shutil.copytree(template.root, folder / "checkout", symlinks=True)
    return Project(folder / "checkout", folder / "cache")
