"""Stale: what the working tree would make otherwise now, asked of the project's own code in a process apart.

Place in the path: between preparation, which runs the project's runner, and audit, which must not be talked into
anything by it.
Invariants: the project's code cannot change what this process has found, nor print in its name, nor end it; what comes
back is words about staleness, and no words at all are an answer, too: that it cannot be told.

Example:
    answers = ask(work, [manifest.digest]); answers[manifest.digest].reasons
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import vpstore
from vpstore.errors import VpstoreError
from vpstore.preparation import staleness
from vpstore.schema.digest import Digest
from vpstore.storage.store import ROOT_VARIABLE
from vpstore.workspace import Workspace


class Answer(NamedTuple):
    """What is known of one artifact."""

    reasons: tuple[str, ...] = ()  # what differs, in words
    unknown: str = ""  # why that cannot be told


def ask(work: Workspace, artifacts: Sequence[Digest]) -> dict[Digest, Answer]:
    """What differs between the builds of artifacts, whose manifests are in the store, and the working tree."""
    question = {"root": str(work.checkout.root), "profile": work.checkout.profile, "artifacts": list(artifacts)}
    # The checkout's root is no place to find this program in, unless this process found it there.
    program = str(Path(vpstore.__file__).resolve().parents[1])
    path = os.pathsep.join([program, *(place for place in sys.path if place)])
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "vpstore.stale"],
            input=json.dumps(question).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=work.checkout.root,
            env={**os.environ, "PYTHONPATH": path, ROOT_VARIABLE: str(work.store.root)},
            check=False,
        )
    except OSError as error:  # as where this user may not run this Python
        return dict.fromkeys(artifacts, Answer(unknown=f"no process could be started: {error.strerror}"))
    said = _answers(done.stdout)
    silence = Answer(unknown=f"the project's code gave no answer (exit {done.returncode})")
    return {artifact: said.get(artifact, silence) for artifact in artifacts}


def _answers(text: bytes) -> dict[Digest, Answer]:
    """What the other process said; nothing if it is no answer."""
    try:
        return {Digest(key): _answer(value) for key, value in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, KeyError, VpstoreError):
        return {}


def _answer(value: Any) -> Answer:
    return Answer(tuple(str(reason) for reason in value["reasons"]), str(value["unknown"]))


def main() -> None:
    """Answer one question from stdin; what the project's code prints goes nowhere."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    question = json.load(sys.stdin)
    work = Workspace.find(Path(question["root"]), profile=question["profile"])
    answers = {artifact: _asked(work, Digest(artifact))._asdict() for artifact in question["artifacts"]}
    with out:
        json.dump(answers, out)


def _asked(work: Workspace, artifact: Digest) -> Answer:
    try:
        return Answer(staleness(work, work.store.manifest(artifact)))
    except VpstoreError as error:
        return Answer(unknown=f"{error.what} ({error.where})")
    except Exception as error:  # the project's own code ran, and may fail in any way
        return Answer(unknown=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
