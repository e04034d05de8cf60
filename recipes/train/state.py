"""Training state on disk: everything that the next step depends on, whole or absent, and never for another run.

Place in the path: loop -> **state** -> scratch folder -> loop. A state is a folder `state-<step>` with tensors
(weights with expert biases and frequencies, both optimizers, random generators) and `state.json` (step, counters,
position in data and schedule, the rows logged so far, and the identity of the run). One process writes its tensors as
`tensors.safetensors`; of several each writes its part, as torch.distributed.checkpoint lays parts out in safetensors
files. Either is read by any number of processes. No pickle.

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
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes import runtime
from recipes.recipe import Context
from recipes.train.ranks import ALONE, Ranks
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


def save_state(folder: Path, state: TrainingState, identity: Identity, *, ranks: Ranks = ALONE) -> Path:
    """Write a state and drop the older ones; a state of the same step that is there already is kept.

    Args:    ranks: those that hold a part of the state each; all of them must come here.
    Returns: the state's folder.
    Raises:  RecipeRefused: the disk takes no more; the older state is still there.
    """
    final = folder / f"{_PREFIX}{state.step:08d}"
    work = folder / f"{_UNFINISHED}{state.step:08d}"
    is_new = not final.exists()
    if ranks.is_first and is_new:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    ranks.wait()
    if is_new:
        tensors = {f"{part}|{name}": t for part in _PARTS for name, t in sorted(getattr(state, part).items())}
        with _kept_older(work):
            _write(work, {name: tensor.detach() for name, tensor in tensors.items()}, ranks)
        ranks.wait()
    if ranks.is_first:
        if is_new:
            with _kept_older(work):
                (work / DOCUMENT).write_text(json.dumps(_document(state, identity, work), sort_keys=True))
                for path in (*work.iterdir(), work):
                    _sync(path)
                work.rename(final)
                _sync(folder)
        for older in folder.iterdir():
            if older.name.startswith((_PREFIX, _UNFINISHED)) and older != final:
                shutil.rmtree(older)
    ranks.wait()
    return final


def _write(work: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    if ranks.world == 1:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, work / TENSORS)
        return
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # one process has no use for it
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(work), save_distributed=True))
    except CheckpointException as error:  # of all ranks that failed; it is no Exception
        raise next(iter(error.failures.values()))[0] from None


@contextmanager
def _kept_older(work: Path) -> Iterator[None]:
    """What cannot be written whole is not left behind: on a full disk it would stand in the way of the next try."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise RecipeRefused(
            "a training state cannot be written",
            where=work.name.replace(_UNFINISHED, _PREFIX),
            found=str(error),
            next_step="make room on that file system and build again: training goes on from the state before this one",
        ) from error


_PARTS = ("weights", "optimizer", "random")


def _document(state: TrainingState, identity: Identity, work: Path) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "identity": identity.facts(),
        "optimizer_steps": state.optimizer_steps,
        "position": state.position,
        "record": state.record,
        "step": state.step,
        "tensors": _digest(work),
    }


def _digest(folder: Path) -> str:
    """Of the one file with tensors; of several, that of their digests in the order of the files' names."""
    found = [blake3(max_threads=blake3.AUTO).update_mmap(path) for path in sorted(folder.glob("*.safetensors"))]
    if len(found) == 1:
        return "blake3:" + found[0].hexdigest()
    return "blake3:" + blake3(b"".join(one.digest() for one in found)).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_state(
    folder: Path, identity: Identity, *, into: Mapping[str, Mapping[str, Tensor]] | None = None, ranks: Ranks = ALONE
) -> TrainingState | None:
    """The newest state of this run, or None.

    Args:    into: tensors of `weights` and of `optimizer` that are to be filled where they lie; those that are shared
             out get this rank's part. None: all are made anew, whole and on the CPU.
    Raises:  RecipeRefused: the state belongs to another run (it says in what), or its bytes are damaged.
    """
    found = sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())
    if not found:
        return None
    newest = found[-1]
    document = _read_document(newest)
    _require_same(newest, document["identity"], identity.facts())
    if ranks.is_first and document["tensors"] != (digest := _digest(newest)):
        raise _damaged(newest, document["tensors"], digest)
    ranks.wait()
    counters = document["optimizer_steps"]
    state = TrainingState(document["step"], {}, {}, counters, {}, document["record"], document["position"])
    given = {f"{part}|{name}": tensor for part, named in (into or {}).items() for name, tensor in named.items()}
    for key, tensor in _read(newest, given, ranks).items():
        part, _, name = key.partition("|")
        getattr(state, part)[name] = tensor
    return state


def _read(folder: Path, given: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    if not given and (folder / TENSORS).exists():
        return load_file(folder / TENSORS)
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    wanted: dict[str, Tensor] = {}
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # a state holds nothing else
        wanted[key] = given[key] if key in given else torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which one process asks for
        load(wanted, storage_reader=reader, no_dist=ranks.world == 1)
    return wanted


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
