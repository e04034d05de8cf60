"""Whether two runs ended in the same state, and in what they differ if not.

Place in the path: two folders of states, two logs -> **stage1_drift** -> the verdict of a rehearsal.

Invariants: states are compared tensor by tensor, bit by bit, and their documents field by field; of the logs, only what
a clock, a restart or git writes is left out. A commit changes no bit; the digest of the trainer's own code, in states
and logs, is compared.

Example:
    >>> drift(Path("interrupted"), Path("uninterrupted"))
    []
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from recipes.tensors import read_safetensors
from recipes.train.stage1_log import read_log
from recipes.train.stage1_run import LOG_FILE, STATES
from recipes.train.state import DOCUMENT, TENSORS

_NO_DRIFT = {"tokens_per_second", "git_sha", "git_dirty"}


def drift(one: Path, other: Path) -> list[str]:
    """What differs between two runs, by name; empty if nothing does."""
    states = [sorted((folder / STATES).glob("state-*"))[-1] for folder in (one, other)]
    return [*_tensors(*states), *_documents(*states), *_logs(one, other)]


def commits(*runs: Path) -> list[str]:
    """The states of the checkout that the processes of these runs say they were started in, each once."""
    lines = [line for folder in runs for line in read_log(folder / LOG_FILE) if "git_sha" in line]
    said = [f"{line['git_sha']}{' with changes' if line['git_dirty'] else ''}" for line in lines]
    return list(dict.fromkeys(said))


def _tensors(one: Path, other: Path) -> Iterator[str]:
    found = [read_safetensors(state / TENSORS) for state in (one, other)]
    for name in sorted(found[0].keys() | found[1].keys()):
        pair = [tensors.get(name) for tensors in found]
        if pair[0] is None or pair[1] is None or not _is_equal(pair[0], pair[1]):
            yield name


def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit: as bytes, so that 0 is not -0 and a NaN is itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _documents(one: Path, other: Path) -> Iterator[str]:
    found: list[dict[str, Any]] = [json.loads((state / DOCUMENT).read_text()) for state in (one, other)]
    for key in sorted(found[0].keys() | found[1].keys()):
        if found[0].get(key) != found[1].get(key):
            yield f"{DOCUMENT}: {key}"


def _logs(one: Path, other: Path) -> Iterator[str]:
    first, second = (
        [{key: line[key] for key in line if key not in _NO_DRIFT} for line in read_log(folder / LOG_FILE)]
        for folder in (one, other)
    )
    first, second = ([line for line in lines if line["kind"] != "resumed"] for lines in (first, second))
    if len(first) != len(second):
        yield f"{LOG_FILE}: {len(first)} lines and {len(second)} lines"
    for number, (left, right) in enumerate(zip(first, second, strict=False), start=1):
        if left != right:
            keys = sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))
            yield f"{LOG_FILE}, line {number}: {', '.join(keys)}"
