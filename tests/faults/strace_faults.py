"""The real program under the real kernel's refusals: `strace -e inject=` kills or refuses at the n-th system call."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from damage_tools import flip
from disk_matrix import set_step
from small_project import Project

STRACE = shutil.which("strace")


# As strace is told of them: libraries choose among several calls that do the same.
CALLS = {
    "fsync": "fsync",
    "write": "write",
    "rename": "rename,renameat,renameat2",
    "unlink": "unlink,unlinkat",
    "link": "link,linkat",
}


class Injection(NamedTuple):
    """A system call, what happens to it, at which time of its being made, and in what."""

    call: str
    what: str
    when: int
    scene: str = "build"

    def __str__(self) -> str:
        return f"{self.scene}, {self.call}-{self.what}-{self.when}"


class Scene(NamedTuple):
    """A command that changes the disk, what comes before it, and what shows that it did its work."""

    command: tuple[str, ...]
    prepare: Callable[[Project], None]
    checks: tuple[tuple[str, ...], ...]
    calls: tuple[str, ...]  # those that it makes
    # What `resolve` may end with before the retry; empty: not asked, as the scene begins with something lost.
    meanwhile: tuple[int, ...] = ()


_WHOLE = (("verify", "--all"), ("resolve", "plant", "--full"))


def _edit(project: Project) -> None:
    set_step(project.root, 7)


def _lose_pointer(project: Project) -> None:
    project.pointer("plant-bloom").unlink()


def _configure(project: Project) -> None:
    shelf = project.root.parent / f"{project.root.name}-remote"
    (project.root / ".dvc").mkdir()
    text = f"[core]\n    remote = shelf\n    analytics = false\n['remote \"shelf\"']\n    url = {shelf}\n"
    (project.root / ".dvc" / "config").write_text(text)


def _clone(project: Project) -> None:
    _configure(project)
    project.run("lock")
    project.run("push")
    for folder in (".vpstore", "weights"):
        shutil.rmtree(project.root / folder)


def _abandon(project: Project) -> None:
    """Nothing leads to the artifacts of the first setting any more."""
    (project.root / "vpstore.lock").unlink(missing_ok=True)
    shutil.rmtree(project.root / "weights")
    for record in (project.store / "roots").glob("*.json"):  # of the checkout that this one was copied from
        record.unlink()
    set_step(project.root, 7)
    project.run("build", "--all")


def _damage(project: Project) -> None:
    """One blob is damaged, one is gone; another store has both."""
    shutil.copytree(project.store, project.root / "healthy")
    files = {row["path"]: row["digest"] for row in project.json("show", "plant")["manifest"]["files"]}
    flip(project.blob(files["model.safetensors"]), 200)
    project.blob(files["reports/metrics.json"]).unlink()


SCENES = {
    "build": Scene(
        ("build", "plant@sprout", "plant@bloom"), _edit, _WHOLE, ("fsync", "rename", "unlink", "write"), (0,)
    ),
    # Without its pointer a ref leads nowhere, and says so: 11.
    "pointer": Scene(("build", "plant@bloom"), _lose_pointer, _WHOLE, ("fsync", "rename", "write"), (0, 11)),
    "push": Scene(("push", "-j", "1"), _configure, (*_WHOLE, ("verify", "--remote", "--all")), ("fsync", "rename")),
    "pull": Scene(("pull", "-j", "1"), _clone, _WHOLE, ("fsync", "rename", "unlink", "write")),
    "gc": Scene(("gc", "--grace", "0"), _abandon, _WHOLE, ("unlink", "fsync"), (0,)),
    "repair": Scene(("repair", "-j", "1", "--from-store", "healthy"), _damage, _WHOLE, ("link", "fsync", "rename")),
}
SHORT = (
    Injection("rename", "signal=SIGKILL", 9),
    Injection("fsync", "error=EIO", 30),
    Injection("rename", "error=ENOSPC", 1, "pointer"),
    Injection("link", "error=EIO", 1, "repair"),
    Injection("unlink", "signal=SIGKILL", 2, "gc"),
    Injection("rename", "error=EIO", 3, "push"),
    Injection("fsync", "signal=SIGKILL", 20, "pull"),
)
DAMAGES = ("signal=SIGKILL", "error=EIO", "error=ENOSPC")
PLACES = 4  # of each call in each scene, spread evenly


def places(template: Project, folder: Path, scene: str, *, share: int = 1) -> list[Injection]:
    """Where a scene can be spoilt: counted in an undisturbed run, so that every place is one that is reached."""
    found = []
    project = fresh_copy(template, folder)
    SCENES[scene].prepare(project)
    trace = folder / "trace"
    done = _traced(project, SCENES[scene].command, trace, f"trace={','.join(CALLS[c] for c in SCENES[scene].calls)}")
    assert done.returncode == 0, done
    for call in SCENES[scene].calls:
        # strace counts for each thread by itself.
        made = re.findall(rf"^(\d+) +(?:{CALLS[call].replace(',', '|')})\(", trace.read_text(), re.MULTILINE)
        count = max(Counter(made).values())
        last = count - 1 if scene != "pull" else (count - 1) * 3 // 4  # its threads do not share the work evenly
        times = sorted({1 + last * number // (PLACES - 1) for number in range(PLACES)})
        found += [Injection(call, what, when, scene) for what in DAMAGES for when in times]
        if call == "write":
            found += [Injection(call, "retval=7", when, scene) for when in times if scene == "build"]
    return found[::share]


def inject(project: Project, injection: Injection) -> list[str]:
    """Run a command under one injection, then look, run it again, and look again.

    Returns: what was wrong; also that the injection never took place, as then nothing was tried.
    """
    scene = SCENES[injection.scene]
    scene.prepare(project)
    trace = project.root.parent / f"{project.root.name}-trace"
    calls = CALLS[injection.call]
    done = _traced(
        project, scene.command, trace, f"trace={calls}", f"inject={calls}:{injection.what}:when={injection.when}"
    )
    wrong = []
    # strace ends as its child did.
    if done.returncode != -signal.SIGKILL if "signal" in injection.what else "(INJECTED)" not in trace.read_text():
        wrong.append(f"{injection}: it never took place")
    if "Traceback" in done.stderr:
        wrong.append("a traceback: " + done.stderr.strip().splitlines()[-1])
    is_lie = "retval" in injection.what  # the kernel says it wrote what it did not: found, if not prevented
    if "signal" not in injection.what and done.returncode not in ((0, 1, 13, 20) if is_lie else (0, 1, 16)):
        wrong.append(f"exit {done.returncode}: {done.stderr.strip()[:200]}")
    if done.returncode in (1, 16) and "  next " not in done.stderr and "Traceback" not in done.stderr:
        wrong.append(f"no next step: {done.stderr.strip()[:200]}")
    if scene.meanwhile:
        wrong += [f"afterwards: {line}" for line in _look(project, _WHOLE, is_lie=is_lie, codes=scene.meanwhile)]
    project.run(*scene.command)
    if injection.scene == "build":
        project.run("build", "--all")
    return wrong + [f"after the retry: {line}" for line in _look(project, scene.checks, is_lie=False)]


def _traced(project: Project, command: tuple[str, ...], trace: Path, *terms: str) -> subprocess.CompletedProcess[str]:
    options = [part for term in terms for part in ("-e", term)]
    return subprocess.run(
        [str(STRACE), "-f", "-q", *options, "-o", str(trace), *project.command(*command)],
        cwd=project.root, env=project.variables(), text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip


def _look(
    project: Project, checks: tuple[tuple[str, ...], ...], *, is_lie: bool, codes: tuple[int, ...] = (0,)
) -> list[str]:
    """Every check ends well; after a lie verify may find what resolve then must refuse."""
    first, *rest = checks
    faults = complaints(project, *first)
    if faults and not is_lie:
        return faults
    return [] if is_lie and faults else [line for check in rest for line in complaints(project, *check, codes=codes)]


def complaints(project: Project, *arguments: str, codes: tuple[int, ...] = (0,)) -> list[str]:
    """A command's complaints; none if it ends with one of these codes."""
    for code in (0, 3, 10, 11, 12, 13, 14):
        try:
            done = project.run(*arguments, code=code)
        except AssertionError:
            continue
        return [] if code in codes else [f"exit {code}: {(done.stdout + done.stderr)[:300]}"]
    return [f"{arguments} ended with a code that is not documented"]


def fresh_copy(template: Project, folder: Path) -> Project:
    """A project to spoil."""
    shutil.copytree(template.root, folder / "checkout", symlinks=True)
    return Project(folder / "checkout", folder / "cache")
