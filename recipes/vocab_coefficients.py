"""The coefficients of a pair of vocabularies: each new token's reference row as a combination of anchors' rows.

Place in the path: config -> **recipe** -> the transplant. They depend on the reference and on the bytes of the two
vocabularies' tokens, never on a donor's weights or ids: every donor of a vocabulary uses the same ones.

Each token of the new vocabulary that the donor lacks is solved by OMP (recipes.ops.omp) over a dictionary of anchors,
once in the reference's embedding space and once in its head space. Anchors that are held out of the dictionary are
solved like them, so that a transplant can measure how far it may trust the coefficients.

Invariants: the coefficients do not depend on device, threads or the cut into chunks; atoms are named by new ids.

Tensors, N atoms, B rows, K atoms a row, C held-out anchors, A anchors:
    coefficients.rows.{anchors [A], dictionary [N], combined [B], held_out [C]}   new ids, int32
    coefficients.<space>.{support, coefficients, residual}                          [B, K] int32, float32; [B] float32
    coefficients.<space>.held_out_{support, coefficients}                           the same of the held-out anchors

Example:
    stage qwen3-o200k-coefficients@main, source donor_vocabulary, inputs reference = gpt-oss-20b, tokenizer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from recipes import runtime
from recipes.data.bpe import load_ranks
from recipes.data.vocabulary import read_vocabulary
from recipes.model.config import PADDED_VOCAB
from recipes.names import EMBEDDING, HEAD, coefficient_tensor
from recipes.needs import needs as needs_of
from recipes.ops.omp import Dictionary, cpu_bytes
from recipes.ops.transfer import held_out_positions
from recipes.ops.vocabulary_map import shared_tokens
from recipes.params.vocab_coefficients import Params
from recipes.planned import Dtype, PlannedTensor
from recipes.recipe import Context, Gate, Intermediate, Needs, Plan, Report
from recipes.tensors import iterate_rows, planned, planned_rows, read_safetensors
from vpstore.errors import RecipeRefused, ShapeMismatch

SPACES = {"embedding": EMBEDDING, "head": HEAD}
ROWS = "rows"
_SOURCE = "donor_vocabulary/"
_COLUMNS: dict[str, Dtype] = {"support": "I32", "coefficients": "F32", "residual": "F32"}


@dataclass(frozen=True)
class Tokens:
    """New ids by what OMP does with them, each list ascending."""

    anchors: list[int]
    dictionary: list[int]
    combined: list[int]
    held_out: list[int]


def needs(context: Context) -> Needs:
    """The coefficients twice, as ranges and as tensors; one space's dictionary at a time."""
    tokens, reference = _tokens(context), context.inputs["reference"].tensors()
    solved, atoms = len(tokens.combined) + len(tokens.held_out), _atoms(context.params, tokens)
    width = reference.spec(EMBEDDING)[1][-1]
    stored, device = len(tokens.dictionary) * width, cpu_bytes(len(tokens.dictionary), width)
    # On the host as stored and, on the way to the solver, in float32.
    return needs_of(2 * len(SPACES) * solved * atoms * 8, host=(2 + 4) * stored, device=device)


def intermediates(context: Context) -> Sequence[Intermediate]:
    """Coefficients of both spaces, in ranges of rows; each range is resumable on its own."""
    params: Params = context.params
    tokens = _tokens(context)
    solver = _Solver(context, tokens)
    steps = []
    for space in SPACES:
        for start, stop in iterate_rows(len(tokens.combined), params.rows_per_chunk):
            work = partial(solver.solve, space, tokens.combined[start:stop])
            steps.append(Intermediate(_chunk_name(space, start // params.rows_per_chunk), work))
        if tokens.held_out:
            steps.append(Intermediate(_held_out_name(space), partial(solver.solve, space, tokens.held_out)))
    return steps


def plan(context: Context) -> Plan:
    """The ids, and for each space what the ranges hold, put together.

    Raises:  RecipeRefused: no vocabulary of a donor, or one that shares nothing with the new one.
    """
    params: Params = context.params
    tokens = _tokens(context)
    atoms = _atoms(params, tokens)
    tensors = [_ids(name, ids) for name, ids in vars(tokens).items()]
    for space in SPACES:
        chunks = partial(_chunks, context, space, len(tokens.combined))
        for column, dtype in _COLUMNS.items():
            shape = (len(tokens.combined),) if column == "residual" else (len(tokens.combined), atoms)
            rows = partial(_column, chunks, column)
            tensors.append(planned_rows(coefficient_tensor(space, column), shape, dtype, rows))
            if column != "residual":
                held_out = partial(_held_out_column, context, space, column, (len(tokens.held_out), atoms))
                name = coefficient_tensor(space, f"held_out_{column}")
                tensors.append(planned(name, (len(tokens.held_out), atoms), dtype, held_out))
    return Plan(tensors, report=_figures(context, tokens))


def _tokens(context: Context) -> Tokens:
    params: Params = context.params
    target = read_vocabulary(context.inputs["tokenizer"].path / "tokenizer.json")
    shared = shared_tokens(
        _donor_tokens(context.sources),
        target,
        control_by_omp=params.control_by_omp,
        numbers_by_omp=params.numbers_by_omp,
    )
    places = held_out_positions(len(shared.anchor_ids), params.calibration_anchors)
    held_out = [shared.anchor_ids[place] for place in places]
    kept_out = set(held_out)
    # The lowest new ids are the most frequent tokens.
    dictionary = [number for number in shared.anchor_ids if number not in kept_out][: params.dictionary_size]
    return Tokens(shared.anchor_ids, dictionary, shared.combined, held_out)


def _donor_tokens(sources: Mapping[str, Path]) -> list[bytes | None]:
    """The bytes of the donor's tokens: out of a rank file, or of a `tokenizer.json`."""
    paths = [path for role, path in sorted(sources.items()) if role.startswith(_SOURCE)]
    if len(paths) != 1:
        raise RecipeRefused(
            "the donor's vocabulary is not one file",
            where=f"source role {_SOURCE.rstrip('/')}",
            expected="a rank file, or a tokenizer.json",
            found=", ".join(sorted(sources)) or "no sources",
            next_step="name the provenance of one such file in objects.toml",
        )
    if paths[0].suffix == ".json":
        return read_vocabulary(paths[0]).tokens
    return list(load_ranks(paths[0]))


def _ids(name: str, ids: Sequence[int]) -> PlannedTensor:
    return planned(coefficient_tensor(ROWS, name), (len(ids),), "I32", partial(torch.tensor, ids, dtype=torch.int32))


def _atoms(params: Params, tokens: Tokens) -> int:
    return min(params.atoms_per_token, len(tokens.dictionary))


class _Solver:
    """Holds the dictionary of one space at a time: it is the largest thing here."""

    def __init__(self, context: Context, tokens: Tokens) -> None:
        self._context, self._tokens = context, tokens
        self._held: tuple[str, Dictionary] | None = None

    def solve(self, space: str, ids: list[int], previous: Mapping[str, Path]) -> dict[str, Tensor]:
        """The coefficients of some ids, of which at least one must be given."""
        if self._held is None or self._held[0] != space:
            self._held = None  # before the next one is made
            self._held = (space, self._prepared(space))
        dictionary = self._held[1]
        self._context.progress(f"OMP, {space} ({dictionary.route})", ids[0], PADDED_VOCAB)
        targets_BD = self._context.inputs["reference"].tensors().gather(SPACES[space], ids)
        atoms = _atoms(self._context.params, self._tokens)
        found = dictionary.solve(targets_BD, atoms=atoms)
        return {
            "support": found.support_BK.int().cpu(),
            "coefficients": found.coefficients_BK.float().cpu(),
            "residual": found.residual_B.float().cpu(),
        }

    def _prepared(self, space: str) -> Dictionary:
        reference, name = self._context.inputs["reference"].tensors(), SPACES[space]
        _, shape = reference.spec(name)
        if len(shape) != 2 or shape[0] != PADDED_VOCAB:
            raise ShapeMismatch(
                "the reference has another vocabulary",
                where=f"{self._context.inputs['reference'].ref}: {name}",
                expected=f"[{PADDED_VOCAB}, …]",
                found=str(list(shape)),
                next_step="name a reference over the o200k ids",
            )
        rows_ND = reference.gather(name, self._tokens.dictionary)
        return Dictionary(rows_ND, unit_atoms=self._context.params.unit_atoms, device=runtime.device())


def _held_out_name(space: str) -> str:
    return f"{space}-held-out"


def _chunk_name(space: str, number: int) -> str:
    return f"{space}-{number:03d}"


def _chunks(context: Context, space: str, rows: int) -> Iterator[dict[str, Tensor]]:
    size = context.params.rows_per_chunk
    for start, _ in iterate_rows(rows, size):
        yield read_safetensors(context.intermediates[_chunk_name(space, start // size)])


def _column(chunks: Callable[[], Iterator[dict[str, Tensor]]], column: str) -> Iterator[Tensor]:
    return (chunk[column] for chunk in chunks())


def _held_out_column(context: Context, space: str, column: str, shape: tuple[int, int]) -> Tensor:
    if not shape[0]:
        return torch.zeros(shape)
    return read_safetensors(context.intermediates[_held_out_name(space)])[column]


def _figures(context: Context, tokens: Tokens) -> Report:
    """How well the rows are reached, and with how many atoms."""
    params: Params = context.params
    gates, residuals, used = [], {}, {}
    for space in SPACES:
        chunks = list(_chunks(context, space, len(tokens.combined)))
        residual = torch.cat([chunk["residual"] for chunk in chunks]) if chunks else torch.zeros(1)
        counts = [(chunk["support"] >= 0).sum(1) for chunk in chunks]
        residuals[space] = float(residual.double().mean())
        used[space] = float(torch.cat(counts).double().mean()) if counts else 0.0
        gates.append(Gate(f"omp_mean_residual_{space}", residuals[space], "<=", params.max_mean_residual))
    metrics = {
        "tokens": {name: len(ids) for name, ids in vars(tokens).items()},
        "omp_mean_relative_residual": residuals,
        "omp_mean_atoms": used,
    }
    return Report(metrics, gates)
