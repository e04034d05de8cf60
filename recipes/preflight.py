"""Before a real run: what a profile asks for, held against this machine, and the hours that each training will take.

Place in the path: run -> **preflight**, for `vpstore doctor --profile NAME`. It decides no bytes and is in no key.

Invariants: nothing is built, read whole or changed; estimates are from above; every finding that is not well says what
to do next.

Example:
    for finding in findings(checkout.objects, prepared, store): print(finding.name, finding.ok)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from recipes import runtime
from vpstore.errors import VpstoreError

_GIB, _GB = 1 << 30, 10**9
_FLOAT32, _NARROW = 4, 2  # bytes of a number in training, and in a checkpoint
# Tokens a second on one H200: benchmarks/results/train.json. By kind of attention, layers at most, and experts or not.
_RATES = (
    ("gqa", 28, False, 142_817),
    ("tpa", 28, False, 151_906),
    ("tpa", 80, False, 72_709),
    ("tpa", 80, True, 31_124),
)
_NAMED = 3  # of what is missing


class Source(Protocol):
    """A file from outside."""

    @property
    def path(self) -> Path:
        """Where it should lie."""

    @property
    def size_bytes(self) -> int | None:
        """What it should have."""


class Stage(Protocol):
    """What is known of a stage without building it."""

    @property
    def params(self) -> Mapping[str, Any]:
        """All of them, typed."""

    @property
    def sources(self) -> Sequence[Source]:
        """What comes from outside."""


Stages = Mapping[str, Stage]


class Finding(NamedTuple):
    """One answer."""

    name: str
    ok: bool
    detail: str = ""
    next_step: str = ""


class Training(NamedTuple):
    """One training of the profile, and the model that it trains."""

    ref: str
    params: Mapping[str, Any]  # its [train]
    model: Mapping[str, Any]  # the shape of its student


def findings(stages: Stages, parents: Mapping[str, Sequence[str]], place: Path) -> Iterator[Finding]:
    """All of them.

    Args:    parents: each stage's inputs. place: a folder of the disk that artifacts are written to.
    """
    trainings = list(_trainings(stages, parents))
    yield sources(stages)
    yield versions()
    for question in (disk, memory, card):
        try:
            yield question(stages, trainings, place)
        except VpstoreError as error:
            yield Finding(question.__name__, False, f"{error.what}: {error.found}", error.next_step)
    for training in trainings:
        yield hours(training)


def sources(stages: Stages) -> Finding:
    """Whether what comes from outside lies where its provenance files say, in its size."""
    wanted = {source.path: source for prepared in stages.values() for source in prepared.sources}
    missing = [path for path, source in wanted.items() if not _is_there(path, source.size_bytes)]
    if not missing:
        return Finding("sources", True, f"{len(wanted)} files, in their sizes; builds hold them against their SHA-256")
    named = ", ".join(map(str, missing[:_NAMED])) + (f" and {len(missing) - _NAMED} more" if missing[_NAMED:] else "")
    step = "put them there, or hand them over: vpstore import OBJECT FOLDER"
    return Finding("sources", False, f"{len(missing)} of {len(wanted)} are missing or of another size: {named}", step)


def _is_there(path: Path, size: int | None) -> bool:
    return path.is_file() and size in (None, path.stat().st_size)


def versions() -> Finding:
    """Whether torch can do what a training on a GPU asks of it."""
    import torch

    found = f"torch {torch.__version__}"
    if runtime.device() == "cpu":
        return Finding("versions", True, found)
    if torch.version.cuda is None:
        return Finding("versions", False, f"{found}, built without CUDA", "install a build of torch with CUDA")
    is_new = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 11)
    return Finding("versions", is_new, found, "take torch 2.11 or above: older ones have no grouped products")


def disk(stages: Stages, trainings: Sequence[Training], place: Path) -> Finding:
    """All checkpoints of the profile, and the two states that the largest training has while it saves one."""
    from recipes.walk_needs import checkpoint_bytes

    written = sum(checkpoint_bytes(_config(prepared.params["model"])) for prepared in _students(stages).values())
    trained = [checkpoint_bytes(_config(training.model)) for training in trainings]
    states = 2 * max((_state_bytes(training) for training in trainings), default=0)
    needed, free = written + sum(trained) + states, shutil.disk_usage(place).free
    detail = (
        f"{needed / _GB:.0f} GB for checkpoints and {states / _GB:.0f} of them for states; {free / _GB:.0f} GB free"
    )
    return Finding("disk", free > needed, detail, "free space, or move the store with VPSTORE_ROOT")


def memory(stages: Stages, trainings: Sequence[Training], place: Path) -> Finding:
    """What the host holds while the largest training saves a state: weights and moments once."""
    needed = max((_state_bytes(training) for training in trainings), default=0) + 4 * _GIB
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    there = int(rows["MemTotal"].split()[0]) * 1024
    detail = f"{needed / _GIB:.0f} GiB while a state is saved; this machine has {there / _GIB:.0f}"
    return Finding("memory", there > needed, detail, "take a machine with more, or several ranks: each saves its part")


def card(stages: Stages, trainings: Sequence[Training], place: Path) -> Finding:
    """Whether the steps of every training fit into the GPU."""
    if runtime.device() == "cpu":
        step = "set VPSTORE_DEVICE=cuda on a machine with a GPU; a CPU takes weeks for the profile upcycle"
        return Finding("card", all(_rate(t.model) is None for t in trainings), "VPSTORE_DEVICE asks for the CPU", step)
    from recipes.gpus import cards

    found = cards()
    if not found:
        return Finding("card", False, "no GPU is here", "take a machine with one, or unset VPSTORE_DEVICE")
    largest = max(trainings, key=_step_bytes, default=None)
    if largest is None:
        return Finding("card", True, found[0].name)
    needed, (name, memory_bytes) = _step_bytes(largest), found[0]
    detail = f"{name}, {memory_bytes / _GIB:.0f} GiB; a step of {largest.ref} takes {needed / _GIB:.0f}"
    step = f"set train.recompute = true, or lower train.micro_sequences, for {largest.ref}"
    return Finding("card", memory_bytes > needed, detail, step)


def hours(training: Training) -> Finding:
    """How long a training takes on one H200, by the rate that was measured for its shape."""
    params = training.params
    tokens = params["steps"] * params["sequences"] * params["sequence_length"]
    rate = _rate(training.model)
    if rate is None:
        return Finding(f"time of {training.ref}", True, f"{tokens:,} tokens; this shape has not been timed")
    detail = f"{tokens:,} tokens, {tokens / rate / 3600:.1f} hours on one H200 at {rate:,} tokens a second"
    return Finding(f"time of {training.ref}", True, detail)


def _rate(model: Mapping[str, Any]) -> int | None:
    """Of the full width alone: smaller students are not what a card is taken for."""
    config = _config(model)
    for attention, layers, has_experts, rate in _RATES:
        alike = (config.attention, config.moe is not None) == (attention, has_experts)
        if alike and config.num_layers <= layers and config.hidden_size == 1024:
            return rate
    return None


def _trainings(stages: Stages, parents: Mapping[str, Sequence[str]]) -> Iterator[Training]:
    students = _students(stages)
    for ref, prepared in stages.items():
        at = ref
        while "train" in prepared.params and at not in students:
            above = [parent for parent in parents[at] if parent in students or "train" in stages[parent].params]
            if not above:
                break
            at = above[0]
        if "train" in prepared.params and at in students:
            yield Training(ref, prepared.params["train"], students[at].params["model"])


def _students(stages: Stages) -> dict[str, Stage]:
    """Stages whose params give a student's shape."""
    return {ref: prepared for ref, prepared in stages.items() if "attention" in prepared.params.get("model", {})}


def _config(model: Mapping[str, Any]) -> Any:
    from recipes.model.config import StudentConfig

    return StudentConfig.model_validate(dict(model))


def _state_bytes(training: Training) -> int:
    """Weights and moments in float32: matrices have one moment, embedding and head two."""
    from recipes.walk_needs import checkpoint_bytes

    config = _config(training.model)
    numbers: int = checkpoint_bytes(config) // _NARROW
    return _FLOAT32 * (2 * numbers + 2 * int(config.vocab_size) * int(config.hidden_size))


def _step_bytes(training: Training) -> int:
    import torch

    from recipes.model.transformer import Student
    from recipes.params.training import TrainingParams
    from recipes.train.memory import step_memory

    with torch.device("meta"):
        model = Student(_config(training.model))
    params = TrainingParams.model_validate_json(json.dumps(training.params))
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return weights + step_memory(model, params).total
