"""However the project's code ends its process, a command that is not done does not end with 0."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_project import Project

C_EXIT = "import ctypes; ctypes.CDLL(None).exit(0)"
HANDLER = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: {}); os.kill(os.getpid(), signal.SIGTERM)"
THREAD = "import threading; t = threading.Thread(target=lambda: os._exit(0)); t.start(); t.join(); time.sleep(9)"
LATE = """
    import signal, sys
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    class Files(list):
        def __iter__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().__iter__()
    class Staged:
        def __new__(cls, files, others):
            from vpstore.runner import Staged
            return Staged(Files(files), others)
"""
WAYS = {
    "os._exit(0)": "os._exit(0)",
    "os._exit(7)": "os._exit(7)",
    "C's exit(0)": C_EXIT,
    "a handler that leaves at once": HANDLER.format("os._exit(0)"),
    "a handler that leaves": HANDLER.format("sys.exit(0)"),
    "a handler that leaves later, in the program's own code": LATE,
    "a thread": THREAD,
    "the pipe closed before": "os.closerange(3, 256); os._exit(0)",
    "a process that it leaves, which has the pipe": "os.fork() and os._exit(0); time.sleep(1); os._exit(0)",
}


def edit(project: Project, code: str) -> None:
    """Let the recipe begin with other code; its params are others, too."""
    grow = project.root / "small/grow.py"
    indented = code if code.startswith("\n") else f"\n    {code}\n"
    grow.write_text(grow.read_text().replace("    with (scratch", f"{indented}    with (scratch", 1))
    (project.root / "configs/plant.toml").write_text("[sprout]\nstep = 1\n[bloom]\nstep = 9\n")


def refused(project: Project, *command: str) -> str:
    pointer = project.pointer("plant-bloom").read_bytes()
    done = project.outcome(*command)
    assert done.returncode == 20, done.stderr
    assert project.pointer("plant-bloom").read_bytes() == pointer
    assert "Traceback" not in done.stderr
    return done.stderr + done.stdout


@pytest.mark.parametrize("way", WAYS)
def test_a_recipe_that_ends_the_process_is_a_failure(built: Project, way: str) -> None:
    edit(built, WAYS[way])
    said = refused(built, "build", "plant")
    assert "ended before there was a result" in said or "tried to end the program" in said
    assert "next      " in said


def test_what_a_recipe_writes_to_descriptors_says_nothing_of_the_command(built: Project) -> None:
    """Digits into every descriptor, and then an end with 0: the exit code does not travel that way."""
    edit(
        built,
        "import contextlib\n    for n in range(3, 40):\n        with contextlib.suppress(OSError):\n"
        "            os.write(n, b'0')\n    os._exit(0)",
    )
    assert "exit status 0" in refused(built, "build", "plant")


def test_a_recipe_that_closes_what_is_not_its_own_may_end_well(built: Project) -> None:
    edit(built, "import stat; [os.close(n) for n in range(3, 40) if os.path.exists(f'/proc/self/fd/{n}')"
         " and stat.S_ISFIFO(os.fstat(n).st_mode)]")  # fmt: skip
    done = built.outcome("build", "plant", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["builds"]


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_a_standard_stream_that_is_closed_is_no_failure(built: Project, stream: int) -> None:
    command = " ".join(map(shlex.quote, built.command("resolve", "plant")))
    done = subprocess.run(
        ["bash", "-c", f"{command} {stream}>&-"],
        cwd=built.root,
        env=built.variables(),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_it_is_said_as_any_error_is(built: Project) -> None:
    edit(built, "os._exit(0)")
    done = built.outcome("build", "plant", "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["exit_code"], error["kind"]) == (20, 20, "RecipeRefused")
    assert error["where"] == "small.grow"
    assert error["found"] == "exit status 0"
    assert "os._exit" in error["next_step"]


def test_modules_that_end_the_process_as_they_are_imported(built: Project) -> None:
    built.run("lock")
    edit(built, "pass")
    recipe = built.root / "small/grow.py"
    recipe.write_text(f"import os\nos._exit(0)\n{recipe.read_text()}")
    refused(built, "build", "plant")
    run = built.root / "small/run.py"
    run.write_text(f"import os\nos._exit(0)\n{run.read_text()}")
    for command in ("build plant", "import seed assets/donor", "lock --check", "pipeline", "resolve plant", "doctor"):
        refused(built, *command.split())


def test_where_no_process_can_be_started_nothing_is_done(built: Project) -> None:
    code = (
        "import os\nfrom vpstore.cli import main\ndef fork():\n    raise BlockingIOError(11, 'no more of them')\n"
        "os.fork = fork\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "build", "plant"], cwd=built.root, env=built.variables(), text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no process can be started\n  found     no more of them\n")


def test_a_process_that_a_recipe_forked_says_nothing_for_it(built: Project) -> None:
    edit(built, "child = os.fork()\n    if child == 0:\n        raise SystemExit(0)\n    os.waitpid(child, 0)")
    assert built.run("build", "plant").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_a_signal_that_ends_the_recipe_is_said(built: Project, number: signal.Signals) -> None:
    edit(built, f"os.kill(os.getpid(), {number.value})")
    assert f"found     signal {number.value}" in built.run("build", "plant", code=1).stderr


# The real program, started as a shell starts it.


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def slow(built: Project) -> Project:
    """A recipe that says which process it is, counts the signals that it is sent, and takes its time."""
    edit(
        built,
        "import signal; counted = []\n    signal.signal(signal.SIGUSR1, lambda *_: counted.append(1))\n"
        "    (scratch / '../../at').write_text(f'{os.getpid()} {signal.getsignal(signal.SIGINT)!r}')\n"
        "    [time.sleep(0.01) for _ in range(3000) if not counted]\n    time.sleep(0.2)\n"
        "    (scratch / '../../counted').write_text(str(len(counted)))",
    )
    return built


def begun(project: Project) -> int:
    """The process in which the recipe runs."""
    path = project.store / "at"
    until(lambda: path.exists() and path.read_text() != "")
    return int(path.read_text().split()[0])


def start(project: Project, **how: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        project.command("build", "plant"), cwd=project.root, env=project.variables(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how,
    )  # type: ignore[call-overload,no-any-return]  # fmt: skip


def test_a_signal_to_the_parent_alone_reaches_the_recipe_once(slow: Project) -> None:
    process = start(slow)
    child = begun(slow)
    assert child != process.pid
    process.send_signal(signal.SIGUSR1)
    assert (process.communicate(timeout=20)[1], process.returncode) == ("", 0)
    assert (slow.store / "counted").read_text() == "1"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_the_child_does_not_outlive_the_parent(slow: Project, number: signal.Signals) -> None:
    process = start(slow)
    child = begun(slow)
    process.send_signal(number)
    process.communicate(timeout=20)  # to the end of what both may write to
    assert process.returncode == -number
    until(lambda: not is_running(child))


def test_a_stopped_build_hears_what_ends_it(slow: Project) -> None:
    process = start(slow, start_new_session=True)
    child = begun(slow)
    os.killpg(process.pid, signal.SIGSTOP)
    for number in (signal.SIGTERM, signal.SIGCONT):
        process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    until(lambda: not is_running(child))


@pytest.mark.parametrize("is_late", [False, True])
def test_an_interrupt_of_the_whole_group_is_one(built: Project, is_late: bool) -> None:
    """Also where the parent is late to pass it on, as on a busy machine: the child is not disturbed as it tidies up."""
    edit(
        built,
        "try:\n        (scratch / '../../at').write_text(str(os.getpid()))\n        time.sleep(30)\n"
        "    finally:\n        time.sleep(0.5)\n        (scratch / '../../tidied').write_text('')",
    )
    process = start(built, start_new_session=True)
    begun(built)
    if is_late:
        process.send_signal(signal.SIGSTOP)
    os.killpg(process.pid, signal.SIGINT)
    if is_late:
        time.sleep(0.25)
        process.send_signal(signal.SIGCONT)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert said.count("interrupted") == 1
    assert "Traceback" not in said
    assert (built.store / "tidied").exists()


def test_a_key_on_the_terminal(slow: Project) -> None:
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(slow.root)
        command = slow.command("build", "plant")
        os.execve(command[0], command, slow.variables())
    begun(slow)
    os.write(terminal, b"\x03")
    said = b""
    try:
        while data := os.read(terminal, 4096):
            said += data
    except OSError:  # what Linux says at the end of a terminal
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    os.close(terminal)
    assert said.count(b"interrupted;") == 1


def test_what_is_ignored_stays_ignored_and_closed_streams_do_not_matter(slow: Project) -> None:
    """As in the background of a shell, under a parent that wants to know nothing of its children."""
    command = " ".join(slow.command("build", "plant"))
    process = subprocess.Popen(
        ["sh", "-c", f"trap '' INT CHLD; exec {command} <&- >&-"], cwd=slow.root, env=slow.variables(),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    child = begun(slow)
    assert "SIG_IGN" in (slow.store / "at").read_text()
    process.send_signal(signal.SIGINT)
    os.kill(child, signal.SIGINT)
    time.sleep(0.1)
    assert is_running(child)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert (slow.store / "counted").read_text() == "1"
