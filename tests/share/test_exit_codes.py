"""However a project is broken, a command ends with an exit code that its help lists, a next step, and no traceback."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from signing_tools import Keys
from small_project import Project
from two_checkouts import Pair, artifact_of, configure, store_of

from vpstore.cli.exit_codes import table
from vpstore.cli.group import cli

CALLS = (
    "build plant", "resolve plant", "resolve plant --locked", "resolve plant --fetch", "resolve plant --rebuild", "ls",
    "show plant", "lock", "lock --check", "export plant ../out", "push", "pull", "verify", "verify plant",
    "verify --all", "verify --remote", "audit reports@plant-bloom", "reproduce plant",
    "attest plant --key ../release.pem", "why plant seed", "why --lock plant", "diff plant seed", "diff --lock plant",
    "graph plant", "repair", "repair --to-remote shared", "gc --grace 0", "doctor", "pipeline",
    "import seed assets/donor", "build --all --dry-run", "pull --dry-run", "completion bash",
)  # fmt: skip
QUICK = ("lock", "lock --check", "graph plant", "verify plant")
PARAM_KEYS = "\n\ndef param_keys(checkout, object, stage):\n    return {}\n"  # which `pipeline` asks for
Break = Callable[[Project], None]


def says(path: str, text: str) -> Break:
    """A file of the checkout says something else."""

    def damage(project: Project) -> None:
        (project.root / path).unlink(missing_ok=True)
        (project.root / path).write_text(text)

    return damage


def folder_at(path: str) -> Break:
    """A folder lies where a file should."""

    def damage(project: Project) -> None:
        (project.root / path).unlink()
        (project.root / path).mkdir()

    return damage


def file_at(path: str) -> Break:
    """A file lies where a folder should."""

    def damage(project: Project) -> None:
        shutil.rmtree(project.root / path)
        (project.root / path).write_text("x")

    return damage


def blob_of(project: Project, kind: str, ref: str = "plant@bloom") -> Path:
    manifest = store_of(project).manifest(artifact_of(project, ref))
    return project.blob(manifest.digest if kind == "manifest" else manifest.by_path["model.safetensors"].digest)


def no_manifest(project: Project) -> None:
    path = blob_of(project, "manifest")
    path.chmod(0o644)
    path.write_text("{}")


STATES: dict[str, Break] = {
    "whole": lambda project: None,
    "broken lock": says("vpstore.lock", "{"),
    "lock of another format": says("vpstore.lock", '{"format": 99}'),
    "lock is a folder": folder_at("vpstore.lock"),
    "broken pointer": says("weights/tiny/refs/plant-bloom.json", "{"),
    "pointer is a folder": folder_at("weights/tiny/refs/plant-bloom.json"),
    "weights are a file": file_at("weights"),
    "bad manifest": no_manifest,
    "missing manifest": lambda project: blob_of(project, "manifest").unlink(),
    "missing shard": lambda project: blob_of(project, "shard").unlink(),
    "missing parent": lambda project: blob_of(project, "manifest", "plant@sprout").unlink(),
    "format of the store": says(".vpstore/format", "99\n"),
    "no store": lambda project: shutil.rmtree(project.store),
    "blobs are a file": file_at(".vpstore/blobs"),
    "attestations are a file": file_at(".vpstore/attestations"),
    "remote gone": lambda project: configure(project, "/nowhere/x"),
    "no remote": lambda project: (project.root / ".dvc" / "config").unlink(),
    "broken config of DVC": says(".dvc/config", "[["),
    "broken objects": says("configs/objects.toml", "["),
    "broken runner": says("small/run.py", "def ("),
    "broken recipe": says("small/grow.py", "def ("),
    "recipe that fails": says("small/grow.py", "def make(prepared, inputs, scratch):\n    return 1 / 0\n"),
    "broken config": says("configs/plant.toml", "["),
    "config that misses a gate": says("configs/plant.toml", "[sprout]\nstep = 1\n[bloom]\nstep = -2\n"),
    "no donor": lambda project: shutil.rmtree(project.root / "assets"),
}


# Where the project's own Python ends with an error of its own, its author is shown the place.
AUTHORS = ("broken runner", "broken config", "recipe that fails")


def listed(name: str) -> set[int]:
    """The exit codes in a command's help."""
    epilog = cli.commands[name].epilog
    assert epilog is not None
    return {int(code) for code in re.findall(r"(?:: |· )(\d+) ", epilog.partition("Exit codes")[2])}


def faults(pair: Pair, state: str, call: str, number: int) -> list[str]:
    """What is wrong with how one call ends in one state."""
    home = pair.folder / str(number)
    shutil.copytree(pair.a.root, home / "a", symlinks=True)
    project = Project(home / "a", home / "cache")
    shutil.copy(Keys(pair.folder).private("p256"), home / "release.pem")
    runner = project.root / "small" / "run.py"
    runner.write_text(runner.read_text() + PARAM_KEYS)
    STATES[state](project)
    done = project.outcome(*call.split())
    shutil.rmtree(home)
    found = []
    if done.returncode not in listed(call.split()[0]) or f"| {done.returncode} |" not in table():
        found.append(f"exit code {done.returncode} is not listed")
    if "Traceback" in done.stderr and state not in AUTHORS:
        found.append(f"a traceback: {done.stderr.splitlines()[-1]}")
    if "error:" in done.stderr and "  next " not in done.stderr:
        found.append(f"no next step: {done.stderr}")
    return [f"{state} | {call} | {row}" for row in found]


@pytest.mark.parametrize(
    "state",
    [pytest.param(state, marks=() if number % 4 == 0 else pytest.mark.slow) for number, state in enumerate(STATES)],
)
def test_what_a_broken_project_says_of_the_commands_that_are_used_most(pair: Pair, state: str) -> None:
    assert [row for number, call in enumerate(QUICK) for row in faults(pair, state, call, number)] == []


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_what_a_broken_project_says_of_every_command(pair: Pair, state: str) -> None:
    assert [row for number, call in enumerate(CALLS) for row in faults(pair, state, call, number)] == []


@pytest.mark.slow
def test_every_command_is_called() -> None:
    assert {call.split()[0] for call in CALLS} == set(cli.commands)
