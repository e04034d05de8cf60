"""A walk through the layers of a model and of the one that is built from it, each step kept in a file.

Place in the path: recipe -> **model**; convert_walk and morph_walk say what a layer is built from, the recipes declare
one intermediate for each step. A step is given the files of the steps before it and brings the streams to its layer
with them: without interruption that is one layer, after one it is the layers since the start.

Invariants: both streams run side by side over the same rows; a step's result depends on the files before it only, not
on what is in memory; in a file, figures stand under a prefix beside the tensors of the layer. What a step computes with
lies where the rows lie; what it returns lies on the CPU.

Example:
    class Walk(TwoStreams[DonorRow]): ...
    walk.step(2, {"layer-001": path})
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from recipes.model.layerwise import Row, Rows
from recipes.tensors import read_safetensors

_FIGURE = "figure."
_OldRow = TypeVar("_OldRow")  # a stream of the model that is walked, with what its layers share


@dataclass(frozen=True)
class Rowset:
    """What the fits see, and what the figures are measured on."""

    fit: Sequence[Rows]
    probe: Sequence[Rows]

    def all(self) -> list[Rows]:
        """The fit rows first."""
        return [*self.fit, *self.probe]

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self.all()[0][0].device


def with_figures(tensors: Mapping[str, Tensor], figures: Mapping[str, float]) -> dict[str, Tensor]:
    """What the file of a step holds: the tensors, and the figures as float64 scalars, all on the CPU."""
    scalars = {_FIGURE + key: torch.tensor(figures[key], dtype=torch.float64, device="cpu") for key in figures}
    return {**{name: value.cpu() for name, value in tensors.items()}, **scalars}


def tensors_in(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a step's file, without its figures."""
    stored = read_safetensors(path)
    return {name: value.to(device) for name, value in stored.items() if not name.startswith(_FIGURE)}


def figures_in(path: Path) -> dict[str, float]:
    """The figures of a step's file."""
    stored = read_safetensors(path)
    return {name.removeprefix(_FIGURE): float(v) for name, v in stored.items() if name.startswith(_FIGURE)}


class TwoStreams(ABC, Generic[_OldRow]):
    """Holds the streams between steps; see the module's invariants."""

    def __init__(self) -> None:
        self._at = -1  # layers that the streams have passed; below 0: not started
        self._old: list[_OldRow] = []
        self._new: list[Row] = []

    @torch.no_grad()
    def _bring_to(self, number: int, done: Mapping[str, Path]) -> None:
        """Bring both streams in front of 1-based layer `number`, from the start if they are behind it already."""
        if self._at < 0 or number <= self._at:
            self._old, self._new = self._started()
            self._at = 0
        while self._at < number - 1:
            self._old, self._new = self._passed(self._at + 1, done)
            self._at += 1

    @abstractmethod
    def _started(self) -> tuple[list[_OldRow], list[Row]]:
        """Both streams in front of layer 1."""

    @abstractmethod
    def _passed(self, number: int, done: Mapping[str, Path]) -> tuple[list[_OldRow], list[Row]]:
        """Both streams behind layer `number`, in front of which they are; the new layer comes from the files."""
