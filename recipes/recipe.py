"""The contract between a recipe and whoever runs it.

Place in the path: config -> **recipe** -> tensors -> publish. A recipe is a module with `plan` (surgery: every tensor
is known before one is computed), and then optionally `intermediates`, `check` and `needs`, or with `run` (training: one
piece).
It reads its inputs, returns values, and touches neither the store nor a clock.

Invariants: no torch at import time, so that the key of a build can be known without it; nothing here decides bytes by
host, time or path.

Example:
    def plan(context: Context) -> Plan:
        source = context.inputs["parent"].tensors()
        return Plan(tensors=[kept(source, name) for name in source.names()], files=[json_file("config.json", {})])
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

from recipes.planned import PlannedTensor
from vpstore.errors import GateMissed

if TYPE_CHECKING:
    from torch import Tensor

    from recipes.tensors import TensorReader


@dataclass(frozen=True)
class InputArtifact:
    """One verified parent: a directory of files whose digests were just checked.

    A recipe knows of it what its build key covers: for an input that objects.toml declares `by = "artifact"` the
    artifact's name and digest, for any other its role and the digest of its content.
    """

    role: str
    ref: str  # for messages: object@stage of an input by artifact, else the role
    digest: str
    path: Path

    def tensors(self) -> TensorReader:
        """A lazy reader over the safetensors shards of this artifact."""
        from recipes.tensors import TensorReader

        return TensorReader(self.path)

    def json(self, name: str) -> Any:
        """The parsed content of a JSON file of this artifact."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))


class Progress(Protocol):
    """Told how far the work is; prints on a terminal, does nothing elsewhere."""

    def __call__(self, label: str, done: int, total: int) -> None:
        """`done` of `total` steps of `label` are finished."""


def _silent(label: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Context:
    """Everything a recipe may look at.

    scratch is named by the build key and survives an interruption: what a training recipe saves there it finds again.
    intermediates is filled by the runner before `plan` is called when the recipe declares them.
    """

    params: Any  # the recipe's own Params model, recipes/params/<recipe>.py
    inputs: Mapping[str, InputArtifact]
    sources: Mapping[str, Path]  # files from outside, each already held against its pinned SHA-256
    scratch: Path
    progress: Progress = _silent
    intermediates: Mapping[str, Path] = field(default_factory=dict)  # name -> safetensors file


@dataclass(frozen=True)
class PlannedFile:
    """One file beside the shards; `write` puts its bytes into an open binary file."""

    name: str  # relative, with forward slashes
    media_type: str
    write: Callable[[BinaryIO], None]


def json_file(name: str, value: Any) -> PlannedFile:
    """A JSON file: sorted keys, two spaces, one newline at the end."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    return bytes_file(name, text.encode(), "application/json")


def bytes_file(name: str, data: bytes, media_type: str = "application/octet-stream") -> PlannedFile:
    """A file whose bytes are already here."""

    def write(out: BinaryIO) -> None:
        out.write(data)

    return PlannedFile(name, media_type, write)


def copy_file(name: str, source: Path, media_type: str = "application/octet-stream") -> PlannedFile:
    """A file taken over byte for byte."""

    def write(out: BinaryIO) -> None:
        with source.open("rb") as src:
            shutil.copyfileobj(src, out, 1 << 22)

    return PlannedFile(name, media_type, write)


@dataclass(frozen=True)
class Intermediate:
    """A named result that many tensors need, kept as a blob of the manifest outside the view.

    `compute` receives the files of the intermediates before it, by name, and returns tensors; they are written as one
    safetensors file. Order matters; each is resumable on its own.
    """

    name: str
    compute: Callable[[Mapping[str, Path]], dict[str, Tensor]]


@dataclass(frozen=True)
class Gate:
    """A figure against its threshold. A value of None means that it could not be measured, and says why."""

    name: str
    value: float | None
    relation: Literal["<=", ">=", "=="]
    threshold: float
    reason: str = ""

    @property
    def verdict(self) -> Literal["passed", "missed", "not measurable"]:
        """NaN never passes."""
        if self.value is None:
            return "not measurable"
        kept = {
            "<=": self.value <= self.threshold,
            ">=": self.value >= self.threshold,
            "==": self.value == self.threshold,
        }
        return "passed" if kept[self.relation] else "missed"


def refuse_missed(gates: Sequence[Gate], *, where: str) -> None:
    """Refuse a result with a gate on the wrong side of its threshold.

    Raises:  GateMissed: every missed gate with its figure.
    """
    missed = [gate for gate in gates if gate.verdict == "missed"]
    if missed:
        raise GateMissed(
            f"{len(missed)} of {len(gates)} gates missed: nothing was published",
            where=where,
            expected="; ".join(f"{gate.name} {gate.relation} {gate.threshold:g}" for gate in missed),
            found="; ".join(f"{gate.name} = {gate.value:g}" for gate in missed),
            next_step="change the config or the parent and build again; the state is kept in the scratch folder",
        )


@dataclass(frozen=True)
class Needs:
    """What a recipe takes besides time, told before it computes anything; an estimate from above."""

    disk_bytes: int  # of the scratch folder: what is staged, and the intermediates
    memory_bytes: int  # of the host, at the peak, the process itself included


@dataclass(frozen=True)
class Report:
    """What a build says about its result: numbers, gates and curves, all deterministic: no durations."""

    metrics: Mapping[str, Any] = field(default_factory=dict)  # nested dict of numbers and strings
    gates: Sequence[Gate] = ()
    plots: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # name -> rows


@dataclass(frozen=True)
class Plan:
    """What a surgery recipe will write."""

    tensors: Sequence[PlannedTensor] = ()
    files: Sequence[PlannedFile] = ()
    report: Report | None = None  # figures that are known from the intermediates alone


@dataclass(frozen=True)
class RunResult:
    """What a training recipe has made; tensors are written in the dtype they have here."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    files: Sequence[PlannedFile] = ()
    report: Report = field(default_factory=Report)


def _no_intermediates(context: Context) -> Sequence[Intermediate]:
    return ()


@dataclass(frozen=True)
class PlanRecipe:
    """A surgery recipe: every tensor and file is named before one is computed."""

    plan: Callable[[Context], Plan]
    intermediates: Callable[[Context], Sequence[Intermediate]] = _no_intermediates  # shared by many tensors, in order
    check: Callable[[Context, TensorReader], Report] | None = None  # gates over the staged shards, before publishing
    needs: Callable[[Context], Needs] | None = None  # told before the first intermediate


@dataclass(frozen=True)
class RunRecipe:
    """A training recipe: one piece, with its report and its gates in the result."""

    run: Callable[[Context], RunResult]
