"""`make stage1-smoke`: Stage 1 for some steps from vpMoE's digest, killed, resumed, and held against its twin.

Place in the path: the artifact `stage1` -> **stage1_smoke** -> runs/stage1-smoke/. A program, not a recipe: it has a
clock and a process to kill, and nothing of it enters an artifact. It talks to the store as any trainer would: through
`vpstore resolve`.

Invariants: `rehearse` starts `train` three times, each a process of its own: one that is killed by SIGKILL between two
saved states, one that takes it up, and one that is never disturbed; the two that end must agree in every bit of their
states and in every line of their logs.

Example:
    python -m recipes.stage1_smoke rehearse --out runs/stage1-smoke
    python -m recipes.stage1_smoke train --run STAGE1 --checkpoint VPMOE --data SYNTH_KD --tokenizer O200K --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from recipes.runtime import fix_numerics
from recipes.train.stage1_document import read_document
from vpstore.errors import Interrupted, RecipeRefused, VpstoreError

SCHEMA = 1
RUN_REF = "stage1"
ROLES: tuple[Literal["checkpoint", "data", "tokenizer"], ...] = ("checkpoint", "data", "tokenizer")
INTERRUPTED, UNINTERRUPTED = "interrupted", "uninterrupted"
_POLL_SECONDS = 0.02
_ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the two commands; the exit code is 0, or that of the error."""
    options = _parser().parse_args(arguments)
    command = _train if options.command == "train" else _rehearse
    try:
        summary = command(options)
    except KeyboardInterrupt:
        return _fail(Interrupted("interrupted", next_step="run it again: `train` goes on from its state"), options)
    except VpstoreError as error:
        return _fail(error, options)
    print(json.dumps(summary, indent=2, ensure_ascii=False) if options.json else _said(summary))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.stage1_smoke", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train, or go on from the newest state in --out")
    train.add_argument("--run", type=Path, required=True, help="directory of the artifact stage1")
    for role in ROLES:
        train.add_argument(f"--{role}", type=Path, required=True, help=f"directory of the run's {role}")
    rehearse = commands.add_parser("rehearse", help="train, kill, resume, compare with an undisturbed twin")
    for command in (train, rehearse):
        command.add_argument("--out", type=Path, required=True, help="folder for log, states and summary")
        command.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _fail(error: VpstoreError, options: argparse.Namespace) -> int:
    if options.json:
        fields = ("what", "where", "expected", "found", "next_step")
        values = {name: getattr(error, name) for name in fields}
        document = {"kind": type(error).__name__, "exit_code": error.exit_code, **values}
        print(json.dumps({"schema": SCHEMA, "error": document}, indent=2, ensure_ascii=False))
    else:
        print(error, file=sys.stderr)
    return error.exit_code


def _train(options: argparse.Namespace) -> dict[str, Any]:
    document = read_document(options.run)
    fix_numerics(document["smoke"]["threads"])  # before anything imports torch
    from recipes.train.stage1_inputs import open_inputs
    from recipes.train.stage1_run import Stage1Run

    options.out.mkdir(parents=True, exist_ok=True)
    inputs = open_inputs(options.run, {role: getattr(options, role) for role in ROLES})
    return Stage1Run(inputs, options.out).go()


def _rehearse(options: argparse.Namespace) -> dict[str, Any]:
    started, options.out = time.monotonic(), options.out.resolve()
    run = resolve(RUN_REF)
    document = read_document(Path(run["path"]))
    command = [sys.executable, "-m", "recipes.stage1_smoke", "train", "--run", run["path"]]
    for role in ROLES:
        command += [f"--{role}", resolve_input(role, document["inputs"][role])]
    kill_after = document["smoke"]["kill_after_step"]
    for name in (INTERRUPTED, UNINTERRUPTED):
        shutil.rmtree(options.out / name, ignore_errors=True)
    _say(f"training, to be killed after step {kill_after} of {document['smoke']['steps']}")
    train_and_kill([*command, "--out", str(options.out / INTERRUPTED)], options.out / INTERRUPTED, kill_after)
    _say("killed; going on from the newest state")
    resumed = train([*command, "--out", str(options.out / INTERRUPTED), "--json"])
    _say("the same run again, undisturbed")
    twin = train([*command, "--out", str(options.out / UNINTERRUPTED), "--json"])
    # Late: comparing needs torch, and resolving and killing do not.
    fix_numerics(document["smoke"]["threads"])
    return compared(options.out, {"run": run["artifact"], "resumed": resumed, "twin": twin, "started": started})


def resolve(ref: str) -> dict[str, Any]:
    """What `vpstore resolve` says of a ref: artifact, and the path of a verified directory.

    Raises:  VpstoreError: as the command failed, with its exit code.
    """
    done = subprocess.run(
        [sys.executable, "-m", "vpstore", "resolve", ref, "--json"], capture_output=True, text=True, check=False
    )
    document: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
    if done.returncode or "error" in document:
        raise _as_it_failed(document.get("error", {}), done, ref)
    return document


def resolve_input(role: str, wanted: Mapping[str, str]) -> str:
    """The directory of an input, if it is still the one that the run was written for.

    Raises:  RecipeRefused: the ref means another artifact now.
    """
    found = resolve(wanted["ref"])
    if found["artifact"] != wanted["digest"]:
        raise RecipeRefused(
            "the run names another artifact than the one that is here",
            where=f"{role} {wanted['ref']}",
            expected=wanted["digest"],
            found=str(found["artifact"]),
            next_step=f"vpstore build {RUN_REF}: it then names what is here",
        )
    return str(found["path"])


def train_and_kill(command: Sequence[str], out: Path, after_step: int) -> None:
    """Start a training and end it by SIGKILL as soon as its log has a step.

    Raises:  VpstoreError: it ended before.
    """
    process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not _has_logged(out / "log.jsonl", after_step):
            time.sleep(_POLL_SECONDS)
        process.send_signal(signal.SIGKILL)
        output, errors = process.communicate()
    finally:
        process.kill()
    if process.returncode != -signal.SIGKILL:
        done = subprocess.CompletedProcess(command, process.returncode, output, errors)
        raise _as_it_failed({}, done, "the run that was to be killed")


def _has_logged(log: Path, step: int) -> bool:
    if not log.is_file():
        return False
    lines = log.read_bytes().splitlines(keepends=True)  # as bytes: a text's own line separators end no line
    whole = (json.loads(line) for line in lines if line.endswith(b"\n"))
    return any(line["kind"] == "step" and line["step"] >= step for line in whole)


def train(command: Sequence[str]) -> dict[str, Any]:
    """Train to the end; the summary.

    Raises:  VpstoreError: as the training failed.
    """
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    document: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
    if done.returncode or "error" in document:
        raise _as_it_failed(document.get("error", {}), done, "training")
    return document


def _as_it_failed(error: Mapping[str, Any], done: subprocess.CompletedProcess[str], where: str) -> VpstoreError:
    """A child's error as our own, with its exit code."""
    if not error:
        said = (done.stderr or done.stdout or "").strip()[-2000:]
        return VpstoreError("a step of the rehearsal failed", where=where, found=f"exit {done.returncode}: {said}")
    fields = {name: str(error[name]) for name in ("where", "expected", "found", "next_step")}
    made = VpstoreError(str(error["what"]), **fields)
    made.exit_code = int(error["exit_code"])
    return made


def compared(out: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """Hold the resumed run against its twin.

    Raises:  RecipeRefused: they differ; what differs is named.
    """
    from recipes.train.stage1_drift import commits, drift
    from recipes.train.stage1_log import read_log

    resumed_from = [line["step"] for line in read_log(out / INTERRUPTED / "log.jsonl") if line["kind"] == "resumed"]
    differences = drift(out / INTERRUPTED, out / UNINTERRUPTED)
    if differences or len(resumed_from) != 1:
        raise RecipeRefused(
            "the resumed run is not the uninterrupted one",
            where=", ".join(differences[:6]) or INTERRUPTED,
            expected="equal states and equal logs, and one resume",
            found=f"{len(differences)} differences, resumed from {resumed_from}",
            next_step=f"compare {out / INTERRUPTED} with {out / UNINTERRUPTED}",
        )
    document = {
        "schema": SCHEMA,
        "verdict": "resumed without drift",
        "run": found["run"],
        "resumed_from_step": resumed_from[0],
        "seconds": round(time.monotonic() - found["started"], 1),
        "commits": commits(out / INTERRUPTED, out / UNINTERRUPTED),
        "training": found["twin"],
    }
    (out / "summary.json").write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return document


def _said(summary: Mapping[str, Any]) -> str:
    """The summary for people."""
    run = summary.get("training", summary)
    before, after = run["before"], run["after"]
    lines = [f"steps          {run['steps']}, loss {run['loss_first']:.4f} -> {run['loss_last']:.4f}"]
    if run["documents_cut"] is not None:
        cut = f"{run['documents_cut']} of {run['documents']} documents are longer than a row and were cut"
        lines.append(f"rows           {run['packing']}, {run['fill']:.3f} of their places filled; {cut}")
    for label, name in (("reasoning", "reasoning"), ("final", "final")):
        pair = [figures[f"held_out_cross_entropy_{name}"] for figures in (before, after)]
        lines.append(f"held out       {label}: {_figure(pair[0])} -> {_figure(pair[1])} nats a token")
    lines += [
        f"Harmony        {_figure(after['format_validity'])} of {after['answers']} sampled answers valid "
        f"({after['answers_unfinished']} did not end in time); control tokens right when teacher-forced: "
        f"{_figure(before['control_token_accuracy'])} -> {_figure(after['control_token_accuracy'])}",
        f"stop rules     {run['stop']['verdict']}",
        f"state          {run['state_tensors']}",
    ]
    if "verdict" in summary:
        lines.append(f"killed and     {summary['verdict']} from step {summary['resumed_from_step']}")
        if len(commits := summary["commits"]) > 1:
            lines.append(f"checkout       changed while it ran, the trainer's code did not: {', '.join(commits)}")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
