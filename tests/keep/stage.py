"""A process that has imported the program and forks actors: commands side by side, stopped or killed where it is told.

An actor is one call of the program in a process of its own. `interleave` stops an actor exactly before its n-th call
that changes the disk, lets `gc` with no grace period run there, then lets the actor go on: if `gc` has to wait for the
actor, it says so and is not waited for. Nothing depends on timing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


class Stage:
    """The client's side."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: str, **fields: Any) -> Any:
        """One request, one answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"request": request, **fields}, default=str) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the stage died"
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()


# The server's side.


def _fork(act: Any, log: str) -> int:
    """Run `act` in a child whose output goes to `log`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = int(act() or 0)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _enter(cwd: str, environment: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)


def _command(arguments: list[str]) -> int:
    from vpstore.cli import main

    try:
        main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def _disk(act: Any) -> Any:
    """A disk that calls `act` with a running number and what is done before each call."""
    from vpstore.storage import system

    class Watched(system.Disk):
        count = 0

        def __getattribute__(self, name: str) -> Any:
            call = super().__getattribute__(name)
            if (
                name.startswith("_") or not callable(call) or name == "flock"
            ):  # changes nothing; what waits is not stopped
                return call

            def watched(*arguments: Any) -> Any:
                Watched.count += 1
                act(Watched.count, name, arguments)
                return call(*arguments)

            return watched

    return Watched()


def _break(control: str) -> None:
    """A negative control: take a part of the protection away."""
    from contextlib import contextmanager, nullcontext

    from vpstore.storage.locks import STORE, Locks
    from vpstore.storage.roots import Roots

    if control == "no lock of the store":
        shared = Locks.shared
        Locks.shared = lambda self, name, **rest: nullcontext() if name == STORE else shared(self, name, **rest)
    elif control == "no running roots":

        @contextmanager
        def running(self: Any, **rest: Any) -> Any:
            yield

        Roots.running = running
    elif control == "no records":
        Roots.hold_all = lambda *given, **rest: None
    elif control:
        raise AssertionError(control)


def interleave(*, arguments: list[str], cwd: str, environment: dict[str, str], stop: int, log: str, **rest: str) -> Any:
    """Stop `vpstore ARGUMENTS` before its disk call number `stop`, run gc there, go on."""
    import threading

    from vpstore.storage import system

    told, telling = os.pipe()
    waiting, go = os.pipe()

    def act() -> int:
        os.close(told)
        os.close(go)
        _enter(cwd, environment)
        _break(rest.get("control", ""))

        def halt(number: int, name: str, given: Any) -> None:
            if number == stop and threading.current_thread() is threading.main_thread():
                os.write(telling, f"{name} {given[-1]}".encode()[:2000])
                os.close(telling)
                os.read(waiting, 1)

        system.disk = _disk(halt)
        return _command(arguments)

    actor = _fork(act, f"{log}.actor")
    os.close(telling)
    where = os.read(told, 4000).decode()  # empty: it ended without so many calls
    os.close(told)
    collector, has_waited = _start_gc(rest.get("from", cwd), environment, f"{log}.gc")
    os.write(go, b"g")  # not by closing it: gc has it, too
    os.close(go)
    os.close(waiting)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in (actor, collector)]
    return {"where": where, "actor": codes[0], "gc": codes[1], "gc_waited": has_waited}


def _start_gc(cwd: str, environment: dict[str, str], log: str) -> tuple[int, bool]:
    """Start gc; return when it is done or says that it waits."""
    hears, says = os.pipe()

    def act() -> int:
        os.close(hears)
        _enter(cwd, environment)
        from vpstore.collecting.judging import Terms
        from vpstore.narration import Silent
        from vpstore.verbs.gc import collect
        from vpstore.workspace import Workspace

        class Says(Silent):
            def warn(self, text: str) -> None:
                os.write(says, b"w")

        collect(Workspace.find(Path.cwd(), narrator=Says()), Terms(grace_seconds=0))
        return 0

    child = _fork(act, log)
    os.close(says)
    has_waited = os.read(hears, 1) == b"w"
    os.close(hears)
    return child, has_waited


def kill(*, arguments: list[str], cwd: str, environment: dict[str, str], at: int, log: str) -> Any:
    """Run `vpstore ARGUMENTS` and kill it before disk call number `at`; its exit code, and how many calls it made."""
    import signal

    from vpstore.storage import system

    counted, counts = os.pipe()

    def act() -> int:
        _enter(cwd, environment)

        def die(number: int, name: str, given: Any) -> None:
            os.write(counts, b".")
            if number == at:
                os.kill(os.getpid(), signal.SIGKILL)

        system.disk = _disk(die)
        return _command(arguments)

    child = _fork(act, log)
    os.close(counts)
    number = 0
    while data := os.read(counted, 65536):
        number += len(data)
    os.close(counted)
    return {"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "calls": number}


def crowd(*, actors: list[dict[str, Any]], log: str, touch_when_waiting: str = "") -> Any:
    """Run all actors at once, each its commands one after another; those with `loop` until all others are done.

    Args:    touch_when_waiting: a file to make when an actor says that it waits for another one.
    """
    hears, ends = os.pipe()
    gate, opens = os.pipe()

    def run(actor: dict[str, Any]) -> Any:
        def act() -> int:
            os.close(ends)
            os.close(opens)
            _enter(actor["cwd"], actor["environment"])
            _tell_waiting(touch_when_waiting)
            os.read(gate, 1)  # until everybody is there
            rounds = 0
            while True:
                for arguments in actor["commands"]:
                    if code := _command(arguments):
                        print(f"exit {code}: {arguments}", flush=True)
                        return code
                rounds += 1
                if not actor.get("loop") or _is_over(hears):
                    print(f"rounds {rounds}", flush=True)
                    return 0

        return act

    children = [_fork(run(actor), f"{log}.{number}") for number, actor in enumerate(actors)]
    os.close(opens)
    order = sorted(range(len(actors)), key=lambda number: bool(actors[number].get("loop")))
    codes: dict[int, int] = {}
    for number in order:
        if actors[number].get("loop") and ends >= 0:
            os.close(ends)
            ends = -1
        codes[number] = os.waitstatus_to_exitcode(os.waitpid(children[number], 0)[1])
    if ends >= 0:
        os.close(ends)
    os.close(hears)
    os.close(gate)
    return [codes[number] for number in range(len(actors))]


def _tell_waiting(path: str) -> None:
    from vpstore.narration import Console

    warn = Console.warn

    def tell(self: Console, text: str) -> None:
        warn(self, text)
        if path and "waiting" in text:
            Path(path).touch()

    Console.warn = tell  # type: ignore[method-assign]


def _is_over(hears: int) -> bool:
    import select

    return bool(select.select([hears], [], [], 0)[0])


def serve() -> None:
    import gc
    import sqlite3
    import tomllib

    import rfc8785
    import yaml

    import vpstore.api.building
    import vpstore.api.keeping
    import vpstore.api.reading
    import vpstore.cli

    del sqlite3, tomllib, rfc8785, yaml, vpstore  # loaded beforehand, used by the actors
    gc.collect()
    gc.freeze()  # an actor that collects garbage would write to every page that it shares with this process
    requests = {"interleave": interleave, "kill": kill, "crowd": crowd}
    for line in sys.stdin:
        fields = json.loads(line)
        print(json.dumps(requests[fields.pop("request")](**fields)), flush=True)


if __name__ == "__main__":
    serve()
