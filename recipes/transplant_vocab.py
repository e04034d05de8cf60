"""qwen3-0_6B -> qwen3-0_6B-o200k: the donor under another vocabulary, its body untouched.

Place in the path: config -> **recipe**. Each row of the new embedding and of the new head is one of:
  anchor     a token whose bytes the donor has too: the donor's row, bit for bit;
  control    a control token that the params map to one of the donor's: that row, bit for bit;
  number     two or three digits: composed from the donor's digits (recipes.ops.numbers says how and why), or OMP;
  combined   OMP: the token's reference row as a combination of anchors' reference rows (recipes.ops.omp), carried over
             to the donor's rows of those anchors with the same coefficients (recipes.ops.transfer);
  mean       reserved and padding ids, which no text contains and no target is: the mean of the anchors' rows.
The embedding is solved in the reference's embedding space and the head in its head space: the new head is untied, also
where the donor's is tied.

Invariants: all other tensors are the donor's bits; anchors are matched by bytes and control tokens only by the map
(never by a tokenizer's roles); coefficients do not depend on device, threads or the cut into chunks.

Example:
    stage qwen3-0_6B-o200k@transplant, inputs donor = qwen3-0_6B, reference = gpt-oss-20b, tokenizer = o200k-harmony
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from recipes import runtime
from recipes.checkpoint import donor_config_json, parse_donor_config, tokenizer_files
from recipes.data.vocabulary import read_vocabulary
from recipes.model.config import PADDED_VOCAB, DonorConfig
from recipes.names import EMBEDDING, HEAD
from recipes.ops.numbers import closest_pair, compose_numbers
from recipes.ops.omp import Dictionary
from recipes.ops.transfer import Gain, combine, held_out_positions, measure_gain
from recipes.ops.vocabulary_map import DIGITS, VocabularyMap, match_vocabularies
from recipes.params.transplant_vocab import Params
from recipes.recipe import Context, Gate, Intermediate, Plan, Report, json_file
from recipes.tensors import TensorReader, iterate_rows, kept, planned, read_safetensors
from vpstore.errors import ShapeMismatch

SPACES = {"embedding": EMBEDDING, "head": HEAD}
_ROWS = 8192  # rows assembled at a time


def intermediates(context: Context) -> Sequence[Intermediate]:
    """OMP coefficients of both spaces, in ranges of rows; each range is resumable on its own."""
    params: Params = context.params
    matched = _matched(context)
    steps = []
    for space in SPACES:
        solver = cache(partial(_dictionary, context, space, matched))
        for start, stop in iterate_rows(len(matched.combined), params.rows_per_chunk):
            work = partial(_solve, context, space, matched.combined[start:stop], solver)
            steps.append(Intermediate(_chunk_name(space, start // params.rows_per_chunk), work))
        held_out, _ = _held_out(params, matched)
        if held_out:
            steps.append(Intermediate(_calibration_name(space), partial(_solve, context, space, held_out, solver)))
    return steps


def plan(context: Context) -> Plan:
    """The donor's body, and two matrices put together from anchors, numbers and coefficients.

    Raises:  RecipeRefused: an input that does not fit, or a control token that one of the vocabularies lacks.
    """
    matched, donor = _matched(context), context.inputs["donor"].tensors()
    config = _donor_config(context)
    target = config.model_copy(update={"vocab_size": PADDED_VOCAB, "tie_word_embeddings": False})
    shape = (PADDED_VOCAB, config.hidden_size)
    tensors = [kept(donor, name) for name in donor.names() if name not in SPACES.values()]
    for space, name in SPACES.items():
        tensors.append(planned(name, shape, "BF16", partial(_assemble, context, space, matched)))
    files = [
        json_file("config.json", donor_config_json(target)),
        *tokenizer_files(context.inputs["tokenizer"]),
    ]
    return Plan(tensors, files, _figures(context, matched))


def check(context: Context, staged: TensorReader) -> Report:
    """Anchors must be the donor's bits, and no two numbers may share a row."""
    matched, donor = _matched(context), context.inputs["donor"].tensors()
    gates, metrics = [], {}
    for space, name in SPACES.items():
        rows_VH = staged.read(name)
        anchors = rows_VH[matched.copied_ids].view(torch.int16)
        parents = donor.read(_donor_name(donor, space))[matched.copied_from].view(torch.int16)
        gates.append(Gate(f"anchors_changed_{space}", float((anchors != parents).any(1).sum()), "==", 0.0))
        closest = closest_pair(rows_VH[[number for _, number in matched.numbers]])
        gates.append(Gate(f"closest_numbers_cosine_{space}", closest, "<=", 0.9999))
        metrics[f"{space}_row_norm"] = {
            "anchors": float(rows_VH[matched.copied_ids].float().norm(dim=1).mean()),
            "combined": float(rows_VH[matched.combined].float().norm(dim=1).mean()),
        }
    return Report({"rows": metrics}, gates)


def _matched(context: Context) -> VocabularyMap:
    params: Params = context.params
    donor = read_vocabulary(context.inputs["donor"].path / "tokenizer.json")
    target = read_vocabulary(context.inputs["tokenizer"].path / "tokenizer.json")
    return match_vocabularies(
        donor,
        target,
        control_tokens=params.control_tokens,
        control_by_omp=params.control_by_omp,
        numbers_by_omp=params.numbers == "omp",
    )


def _donor_config(context: Context) -> DonorConfig:
    return parse_donor_config(context.inputs["donor"].json("config.json"))


def _donor_name(donor: TensorReader, space: str) -> str:
    """The donor's matrix of a space; a tied donor's head is its embedding."""
    return HEAD if space == "head" and HEAD in donor else EMBEDDING


def _anchors(params: Params, matched: VocabularyMap) -> tuple[list[int], list[int]]:
    """The dictionary's tokens as new ids and as donor ids: the lowest new ids, which are the most frequent tokens."""
    held_out = set(_held_out(params, matched)[0])
    chosen = [place for place, token in enumerate(matched.anchor_ids) if token not in held_out][
        : params.dictionary_size
    ]
    return [matched.anchor_ids[place] for place in chosen], [matched.anchor_from[place] for place in chosen]


def _held_out(params: Params, matched: VocabularyMap) -> tuple[list[int], list[int]]:
    """The anchors that the transfer is measured on, as new ids and as donor ids."""
    wanted = params.calibration_anchors if params.transfer == "calibrated" else 0
    places = held_out_positions(len(matched.anchor_ids), wanted)
    return [matched.anchor_ids[place] for place in places], [matched.anchor_from[place] for place in places]


def _dictionary(context: Context, space: str, matched: VocabularyMap) -> tuple[Dictionary, Tensor]:
    """The solver of one space, and the reference's whole matrix."""
    name = SPACES[space]
    reference_VD = context.inputs["reference"].tensors().read(name)
    if reference_VD.ndim != 2 or reference_VD.shape[0] != PADDED_VOCAB:
        raise ShapeMismatch(
            "the reference has another vocabulary",
            where=f"{context.inputs['reference'].ref}: {name}",
            expected=f"[{PADDED_VOCAB}, …]",
            found=str(list(reference_VD.shape)),
            next_step="name a reference over the o200k ids",
        )
    params: Params = context.params
    ids, _ = _anchors(params, matched)
    return Dictionary(reference_VD[ids], unit_atoms=params.unit_atoms, device=runtime.device()), reference_VD


def _solve(
    context: Context,
    space: str,
    ids: list[int],
    solver: Callable[[], tuple[Dictionary, Tensor]],
    previous: Mapping[str, Path],
) -> dict[str, Tensor]:
    params: Params = context.params
    dictionary, reference_VD = solver()
    context.progress(f"OMP, {space} ({dictionary.route})", ids[0] if ids else 0, PADDED_VOCAB)
    atoms = min(params.atoms_per_token, len(dictionary.atoms_ND))
    found = dictionary.solve(reference_VD[ids], atoms=atoms)
    return {
        "support": found.support_BK.int().cpu(),
        "coefficients": found.coefficients_BK.float().cpu(),
        "residual": found.residual_B.float().cpu(),
    }


def _assemble(context: Context, space: str, matched: VocabularyMap) -> Tensor:
    """The new matrix [V, H] in bfloat16."""
    params: Params = context.params
    donor = context.inputs["donor"].tensors()
    source_VH = donor.read(_donor_name(donor, space))
    mean_H = source_VH[matched.anchor_from].double().mean(0)
    rows_VH = mean_H.to(torch.bfloat16).repeat(PADDED_VOCAB, 1)
    rows_VH[matched.copied_ids] = source_VH[matched.copied_from].to(torch.bfloat16)
    if params.numbers == "composed":
        rows_VH[[number for _, number in matched.numbers]] = _numbers(params, space, matched, source_VH)
    carry = _transfer(context, space, matched, source_VH)
    for start, stop, solution in _chunks(context, space, matched):
        for first, last in iterate_rows(stop - start, _ROWS):
            ids = matched.combined[start + first : start + last]
            rows_VH[ids] = carry.rows(solution, slice(first, last)).to(torch.bfloat16)
    return rows_VH


@dataclass(frozen=True)
class _Transfer:
    """From coefficients to rows of the donor's space."""

    atoms_NH: Tensor
    mean_H: Tensor
    gain: Gain

    def rows(self, solution: Mapping[str, Tensor], part: slice) -> Tensor:
        support_BK, weight_BK = solution["support"][part], solution["coefficients"][part]
        return combine(support_BK, weight_BK, self.atoms_NH, self.mean_H, gain=self.gain.slope)


def _transfer(context: Context, space: str, matched: VocabularyMap, source_VH: Tensor) -> _Transfer:
    """The transfer of one space; without held-out anchors, or when it is to be plain, nothing is shrunk."""
    params: Params = context.params
    atoms_NH = source_VH[_anchors(params, matched)[1]].float()
    if params.transfer == "plain":
        return _Transfer(atoms_NH, torch.zeros_like(atoms_NH[0]), Gain(1.0, None))
    mean_H = source_VH[matched.anchor_from].double().mean(0).float()
    whole = _Transfer(atoms_NH, mean_H, Gain(1.0, None))
    _, donor_ids = _held_out(params, matched)
    if not donor_ids:
        return whole
    predicted_BH = whole.rows(read_safetensors(context.intermediates[_calibration_name(space)]), slice(None))
    return replace(whole, gain=measure_gain(predicted_BH, source_VH[donor_ids].float(), mean_H))


def _numbers(params: Params, space: str, matched: VocabularyMap, source_VH: Tensor) -> Tensor:
    digits_10H = source_VH[[matched.donor_ids[digit] for digit in DIGITS]]
    return compose_numbers(
        digits_10H,
        [text for text, _ in matched.numbers],
        leading="last" if space == "embedding" else "first",
        decay=params.number_decay,
        seed=params.number_seed,
    ).to(torch.bfloat16)


def _calibration_name(space: str) -> str:
    return f"{space}-calibration"


def _chunk_name(space: str, number: int) -> str:
    return f"{space}-{number:03d}"


def _chunks(context: Context, space: str, matched: VocabularyMap) -> list[tuple[int, int, dict[str, Tensor]]]:
    size = context.params.rows_per_chunk
    spans = iterate_rows(len(matched.combined), size)
    return [(a, b, read_safetensors(context.intermediates[_chunk_name(space, a // size)])) for a, b in spans]


def _figures(context: Context, matched: VocabularyMap) -> Report:
    """What is known from the coefficients alone."""
    params: Params = context.params
    donor = context.inputs["donor"].tensors()
    gates, residuals, used = [], {}, {}
    gains: dict[str, dict[str, float]] = {}
    for space in SPACES:
        chunks = [solution for _, _, solution in _chunks(context, space, matched)]
        residual = torch.cat([chunk["residual"] for chunk in chunks]) if chunks else torch.zeros(1)
        residuals[space] = float(residual.double().mean())
        used[space] = float(torch.cat([(chunk["support"] >= 0).sum(1) for chunk in chunks]).double().mean())
        gates.append(Gate(f"omp_mean_residual_{space}", residuals[space], "<=", params.max_mean_residual))
        gain = _transfer(context, space, matched, donor.read(_donor_name(donor, space))).gain
        gains[space] = {"slope": gain.slope}
        if gain.r_squared is not None:
            gains[space]["r_squared"] = gain.r_squared
    rows = {
        "anchors": len(matched.anchor_ids),
        "controls_copied": len(matched.copied_ids) - len(matched.anchor_ids),
        "numbers": len(matched.numbers),
        "combined": len(matched.combined),
        "mean": PADDED_VOCAB - len(matched.copied_ids) - len(matched.numbers) - len(matched.combined),
    }
    if params.numbers == "omp":
        rows["mean"] += len(matched.numbers)  # they stand among the combined ones
    metrics = {
        "rows_by_kind": rows,
        "dictionary": len(_anchors(params, matched)[0]),
        "omp_mean_relative_residual": residuals,
        "omp_mean_atoms": used,
        "transfer": gains,
    }
    return Report(metrics, gates)
