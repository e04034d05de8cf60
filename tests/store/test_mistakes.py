"""What a person gets who made a mistake: no traceback, a next step, and an exit code that the help declares."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from small_project import REPOSITORY, Project, server

# A wrong command line, and what its message must say; everything is built, nothing is locked, and DVC is not set up.
MISTAKES = {
    "resolve": "Missing argument",
    "resolve a|b": "not a ref",
    "resolve plnt": "did you mean plant?",
    "resolve PLANT": "did you mean plant?",
    "resolve plant@blom": "did you mean plant@bloom?",
    "resolve plant.gren": "did you mean plant.green?",
    "resolve plant#5311": "6 to 64 lowercase hex digits",
    "resolve plant#": "too short",
    "resolve plant#12345G": "not lowercase hex",
    "resolve plant#000000": "no artifact has this digest prefix",
    "resolve plant --locked": "the lock does not name it",
    "resolve plant -r team": "add --fetch",
    "resolve plant --profile large --fetch": "nothing is built or locked",
    "show nothing": "one of plant, reports, seed",
    "ls --profile tyny": "did you mean tiny?",
    "ls --profile a|b": "not a name",
    "ls --what": "--what",
    "build": "refs or --all",
    "build plant --all": "refs or --all",
    "build plant --since 5": "--all --since",
    "build plant#123456": "name the stage",
    "build plant --profile large": "an input is not built",
    "lock nothing": "no object nothing",
    "lock --profile large": "nothing is built yet",
    "import plant assets": "takes nothing from outside",
    "import seed nowhere": "there is no such folder",
    "import seed configs --dry-run": "a source file is missing",
    "import seed configs/donor.json": "there is no such folder",
    "export plant weights/other/x": "outside the store and the views",
    "export plant .": "not empty",
    "push": "there is no DVC project here",
    "pull": "there is no DVC project here",
    "pull --dry-run -r team": "there is no DVC project here",
    "push -j 0": "-j",
    "repair --from a --to-remote b": "one of --from",
    "repair --from-store nowhere": "there is no store here",
    "verify plant --all": "refs or --all",
    "verify plant -r team": "add --remote",
    "verify plant --remote": "there is no DVC project here",
    "verify nothing": "no object nothing",
    "audit nothing": "no object nothing",
    "audit plant --locked --other-machine": "contradict each other",
    "reproduce plant --sample 0": "at least one tensor",
    "reproduce plant --tensor nothing": "vpstore show plant@bloom --tensors",
    "reproduce plant --sample 1": "vpstore reproduce plant@bloom without --sample",
    "attest plant": "--key",
    "attest plant --key missing.pem": "cannot be read",
    "attest plant --key params.yaml": "not a private key",
    "why plant": "A B, or A --lock",
    "why plant plant --lock": "A B, or A --lock",
    "why plant --lock": "the lock does not name it",
    "diff plant": "A B, or A --lock",
    "diff plant nothing": "no object nothing",
    "graph plant --dot --json": "graph prints one form",
    "gc --grace soon": "not a duration",
    "gc --forget nowhere": "no such checkout is registered",
    "completion tcsh": "tcsh",
    "pipeline --profile large --wite": "--wite",
    "doctor now": "unexpected extra argument",
}


def declared_codes(project: Project, command: str) -> set[int]:
    text = " ".join(project.run(command, "--help").stdout.split())
    return {int(code) for code in re.findall(r"(?:Exit codes: |· )(\d+) ", text)}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_told_with_a_next_step(template: Project, line: str) -> None:
    code, said = run(template, line)
    assert "Traceback" not in said
    assert re.search(r"^  next      \S", said, re.MULTILINE), said
    assert MISTAKES[line] in said
    assert code in declared_codes(template, line.split()[0]) - {0}


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        ("params.yaml", "profile: [", "params.yaml is not YAML"),
        ("params.yaml", "other: 1\n", "names no profile"),
        ("configs/objects.toml", "format = [", "a file is not TOML"),
        ("configs/objects.toml", "format = 1\n", "a field is missing"),
        (
            "configs/profiles/tiny.toml",
            "[objects.seed]\ndefault_stage = 'main'\n",
            "in objects.toml and in the profile",
        ),
        ("vpstore.lock", "{}", "a field is missing"),
        ("pyproject.toml", "[tool.vpstore]\nobjects = 'x'\n", "a field is missing"),
        ("small/seed.py", "def make(:\n", "is not Python"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_a_next_step(built: Project, path: str, text: str, said: str) -> None:
    (built.root / path).write_text(text)
    line = "build seed --force" if path.startswith("small") else "resolve plant"
    code, found = run(built, line)
    assert "Traceback" not in found
    assert said in found
    assert re.search(r"^  next      \S", found, re.MULTILINE), found
    assert code in declared_codes(built, line.split()[0]) - {0}


def test_a_missing_file_of_the_configuration_is_named(built: Project) -> None:
    (built.root / "configs/objects.toml").unlink()
    assert "git checkout --" in built.run("ls", code=2).stderr
    (built.root / "params.yaml").unlink()
    assert "add --profile NAME" in built.run("ls", code=2).stderr


def test_every_error_that_a_person_causes_names_its_next_step() -> None:
    """An advice that fits a whole class fits none of these: each says what to do where it is raised."""
    bare = []
    for path in sorted((REPOSITORY / "vpstore").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in KINDS and not names_a_next_step(node):
                bare.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}")
    assert bare == []


KINDS = {"UsageError", "NoSuchRef", "NoStore", "VpstoreError", "NotLocked"}


def names_a_next_step(call: ast.Call) -> bool:
    return any(keyword.arg in {"next_step", None} for keyword in call.keywords)


def run(project: Project, line: str) -> tuple[int, str]:
    folder: Path = project.cache / "output"
    folder.mkdir(parents=True, exist_ok=True)
    code, _, err = server().run(line.split(), cwd=project.root, environment=project.variables(), folder=folder)
    return code, err
