"""Training state on disk: everything that the next step depends on, whole or absent, and never for another run.

Place in the path: loop -> **state** -> scratch folder -> loop. A state is a folder `state-<step>` with
`tensors.safetensors` (weights with expert biases and frequencies, both optimizers, random generators) and `state.json`
(step, counters, position in data and schedule, the rows logged so far, and the identity of the run). No pickle.

Invariants: a folder gets its final name only after its bytes are on the disk, so a kill at any moment leaves the last
whole state; a state of another parent, data set, tokenizer or config is refused, and the refusal says which; loading
what was saved gives the same bits.

Example:
    save_state(scratch, state, identity)
    state = load_state(scratch, identity)  # None: start from the beginning
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes import runtime
from recipes.recipe import Context
from vpstore.errors import RecipeRefused

FORMAT = 2
TENSORS, DOCUMENT = "tensors.safetensors", "state.json"
_PREFIX, _UNFINISHED = "state-", "unfinished-"


@dataclass(frozen=True)
class Identity:
    """What a run must have in common with a state to go on from it."""

    inputs: Mapping[str, str]  # role -> digest
    params: Mapping[str, Any]

    @classmethod
    def of(cls, context: Context) -> Identity:
        """The identity of the run that a context describes."""
        inputs = {role: found.digest for role, found in sorted(context.inputs.items())}
        return cls(inputs, context.params.model_dump(mode="json"))

    def facts(self) -> dict[str, Any]:
        """Flat: `parent`, `data`, `tokenizer`, …, and `params.<dotted key>`."""
        return {**self.inputs, **dict(_flat("params", self.params))}


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in sorted(value.items()):
            yield from _flat(f"{path}.{key}", inner)
    else:
        yield path, list(value) if isinstance(value, tuple) else value


@dataclass
class TrainingState:
    """All that the next step needs."""

    step: int  # steps that are done
    weights: dict[str, Tensor]  # float32, buffers such as expert_bias included
    optimizer: dict[str, Tensor]  # "<weight>/<part>"
    optimizer_steps: dict[str, int]
    random: dict[str, Tensor]  # generator states by device
    record: dict[str, Any] = field(default_factory=dict)  # JSON: what was logged and measured so far
    position: dict[str, int] = field(default_factory=dict)  # where the next step reads, and where the schedule is


def save_state(folder: Path, state: TrainingState, identity: Identity) -> Path:
    """Write a state and drop the older ones; a state of the same step that is there already is kept.

    Returns: the state's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_PREFIX}{state.step:08d}"
    if not final.exists():
        work = folder / f"{_UNFINISHED}{state.step:08d}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        tensors = {f"{part}|{name}": t for part in _PARTS for name, t in sorted(getattr(state, part).items())}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, work / TENSORS)
        (work / DOCUMENT).write_text(json.dumps(_document(state, identity, work / TENSORS), sort_keys=True))
        for path in (work / TENSORS, work / DOCUMENT, work):
            _sync(path)
        work.rename(final)
        _sync(folder)
    for older in folder.iterdir():
        if older.name.startswith((_PREFIX, _UNFINISHED)) and older != final:
            shutil.rmtree(older)
    return final


_PARTS = ("weights", "optimizer", "random")


def _document(state: TrainingState, identity: Identity, tensors: Path) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "identity": identity.facts(),
        "optimizer_steps": state.optimizer_steps,
        "position": state.position,
        "record": state.record,
        "step": state.step,
        "tensors": _digest(tensors),
    }


def _digest(path: Path) -> str:
    return "blake3:" + blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_state(folder: Path, identity: Identity) -> TrainingState | None:
    """The newest state of this run, or None.

    Raises:  RecipeRefused: the state belongs to another run (it says in what), or its bytes are damaged.
    """
    found = sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())
    if not found:
        return None
    newest = found[-1]
    document = _read_document(newest)
    _require_same(newest, document["identity"], identity.facts())
    if document["tensors"] != _digest(newest / TENSORS):
        raise _damaged(newest, document["tensors"], _digest(newest / TENSORS))
    counters = document["optimizer_steps"]
    state = TrainingState(document["step"], {}, {}, counters, {}, document["record"], document["position"])
    for key, tensor in load_file(newest / TENSORS).items():
        part, _, name = key.partition("|")
        getattr(state, part)[name] = tensor
    return state


def _read_document(folder: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads((folder / DOCUMENT).read_text())
        if document["format"] == FORMAT:
            return document
        found = f"format {document['format']}"
    except (OSError, ValueError, KeyError) as error:
        found = f"{type(error).__name__}: {error}"
    raise _damaged(folder, f"a {DOCUMENT} of format {FORMAT}", found)


def _require_same(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    # Through JSON, as the saved side went: numbers and lists then compare alike.
    wanted = json.loads(json.dumps(wanted))
    different = [key for key in sorted({*saved, *wanted}) if saved.get(key) != wanted.get(key)]
    if different:
        raise RecipeRefused(
            "a training state belongs to another run",
            where=f"{folder.name}: {', '.join(different)}",
            expected="; ".join(f"{key} = {wanted.get(key)}" for key in different),
            found="; ".join(f"{key} = {saved.get(key)}" for key in different),
            next_step="delete the state to start from the beginning, or restore what it was made with",
        )


def _damaged(folder: Path, expected: str, found: str) -> RecipeRefused:
    return RecipeRefused(
        "a training state is damaged",
        where=folder.name,
        expected=expected,
        found=found,
        next_step="delete the state's folder; training starts from the beginning",
    )


def random_states() -> dict[str, Tensor]:
    """The states of torch's generators: the CPU's, and each GPU's in a run that uses them."""
    gpus = {f"cuda:{number}": torch.cuda.get_rng_state(number) for number in range(runtime.gpus())}
    return {"cpu": torch.get_rng_state(), **gpus}


def restore_random(states: Mapping[str, Tensor]) -> None:
    """Set torch's generators to saved states; a GPU that is not here any more is passed over."""
    torch.set_rng_state(states["cpu"])
    for number in range(runtime.gpus()):
        if f"cuda:{number}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{number}"], number)
