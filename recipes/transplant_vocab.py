"""qwen3-0_6B -> qwen3-0_6B-o200k: the donor under another vocabulary, its body untouched.

Place in the path: config -> **recipe**. Each row of the new embedding and of the new head is one of:
  anchor     a token whose bytes the donor has too: the donor's row, bit for bit;
  control    a control token that the params map to one of the donor's: that row, bit for bit;
  combined   a combination of anchors with the coefficients that recipes.vocab_coefficients found in the reference's
             space, carried over to the donor's rows of those anchors (recipes.ops.transfer);
  number     two or three digits without coefficients: composed from the donor's digits (recipes.ops.numbers says how);
  mean       reserved and padding ids, which no text contains and no target is: the mean of the anchors' rows.
The embedding has the coefficients of the reference's embedding space and the head those of its head space: the new head
is untied, also where the donor's is tied.

Invariants: all other tensors are the donor's bits; anchors are matched by bytes and control tokens only by the map
(never by a tokenizer's roles); coefficients of another donor's vocabulary are refused.

Example:
    stage qwen3-0_6B-o200k@transplant, inputs donor = qwen3-0_6B, coefficients = qwen3-o200k-coefficients, tokenizer
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from recipes.checkpoint import donor_config_json, parse_donor_config, tokenizer_files
from recipes.data.vocabulary import read_vocabulary
from recipes.model.config import PADDED_VOCAB, DonorConfig
from recipes.names import EMBEDDING, HEAD, coefficient_tensor
from recipes.needs import needs as needs_of
from recipes.ops.numbers import closest_pair, compose_numbers
from recipes.ops.transfer import Gain, combine, measure_gain
from recipes.ops.vocabulary_map import DIGITS, VocabularyMap, match_vocabularies
from recipes.params.transplant_vocab import Params
from recipes.planned import WIDTHS
from recipes.recipe import Context, Gate, Needs, Plan, Report, json_file
from recipes.tensors import TensorReader, iterate_rows, kept, planned_rows
from vpstore.errors import RecipeRefused

SPACES = {"embedding": EMBEDDING, "head": HEAD}
_ROWS = 8192  # rows assembled at a time
_COLUMNS = 256  # of the anchors' rows in float64 at a time


def needs(context: Context) -> Needs:
    """The donor under the new vocabulary; both matrices are made beside each other, on the host."""
    donor, config = context.inputs["donor"].tensors(), _donor_config(context)
    body = sum(
        WIDTHS[dtype] * math.prod(shape)
        for dtype, shape in (donor.spec(name) for name in donor.names() if name not in SPACES.values())
    )
    width = config.hidden_size
    old, atoms = config.vocab_size * width, len(_ids(context, "dictionary")) * width
    # Each space holds the donor's matrix in bfloat16 and the atoms in float32; a copy of theirs comes and goes.
    held = len(SPACES) * (2 * old + 4 * atoms + 2 * atoms)
    return needs_of(body + len(SPACES) * 2 * PADDED_VOCAB * width, host=held)


def plan(context: Context) -> Plan:
    """The donor's body, and two matrices put together from anchors, numbers and coefficients.

    Raises:  RecipeRefused: an input that does not fit, coefficients of another vocabulary, or a control token that one
             of the vocabularies lacks.
    """
    matched, donor = _matched(context), context.inputs["donor"].tensors()
    config = _donor_config(context)
    target = config.model_copy(update={"vocab_size": PADDED_VOCAB, "tie_word_embeddings": False})
    shape = (PADDED_VOCAB, config.hidden_size)
    tensors = [kept(donor, name) for name in donor.names() if name not in SPACES.values()]
    for space, name in SPACES.items():
        tensors.append(planned_rows(name, shape, "BF16", partial(_assemble, context, space, matched)))
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
        changed = 0
        for start, stop in iterate_rows(len(matched.copied_ids), _ROWS):
            anchors = staged.gather(name, matched.copied_ids[start:stop]).view(torch.int16)
            parents = donor.gather(_donor_name(donor, space), matched.copied_from[start:stop]).view(torch.int16)
            changed += int((anchors != parents).any(1).sum())
        gates.append(Gate(f"anchors_changed_{space}", float(changed), "==", 0.0))
        closest = closest_pair(staged.gather(name, [number for _, number in matched.numbers]))
        gates.append(Gate(f"closest_numbers_cosine_{space}", closest, "<=", 0.9999))
        metrics[f"{space}_row_norm"] = {
            "anchors": _mean_norm(staged, name, matched.copied_ids),
            "combined": _mean_norm(staged, name, matched.combined),
        }
    return Report({"rows": metrics}, gates)


def _mean_norm(staged: TensorReader, name: str, ids: Sequence[int]) -> float:
    parts = [staged.gather(name, ids[a:b]).float().norm(dim=1) for a, b in iterate_rows(len(ids), _ROWS)]
    return float(torch.cat(parts).mean()) if parts else 0.0


def _matched(context: Context) -> VocabularyMap:
    """Where each row comes from.

    Raises:  RecipeRefused: coefficients that were solved for another pair of vocabularies.
    """
    params: Params = context.params
    donor = read_vocabulary(context.inputs["donor"].path / "tokenizer.json")
    target = read_vocabulary(context.inputs["tokenizer"].path / "tokenizer.json")
    matched = match_vocabularies(
        donor, target, control_tokens=params.control_tokens, combined=_ids(context, "combined")
    )
    solved_for = _ids(context, "anchors")
    if matched.anchor_ids != solved_for:
        missing, more = set(solved_for) - set(matched.anchor_ids), set(matched.anchor_ids) - set(solved_for)
        raise RecipeRefused(
            "the coefficients were solved for another vocabulary than the donor's",
            where=f"{context.inputs['donor'].ref}: tokenizer.json, and {context.inputs['coefficients'].ref}",
            expected=f"the {len(solved_for)} tokens of {context.inputs['tokenizer'].ref} that the coefficients combine",
            found=f"{len(matched.anchor_ids)}: {len(missing)} missing, {len(more)} more",
            next_step="name coefficients whose source donor_vocabulary is the donor's own vocabulary, in objects.toml",
        )
    return matched


def _ids(context: Context, name: str) -> list[int]:
    found: list[int] = context.inputs["coefficients"].tensors().read(coefficient_tensor("rows", name)).tolist()
    return found


def _donor_config(context: Context) -> DonorConfig:
    return parse_donor_config(context.inputs["donor"].json("config.json"))


def _donor_name(donor: TensorReader, space: str) -> str:
    """The donor's matrix of a space; a tied donor's head is its embedding."""
    return HEAD if space == "head" and HEAD in donor else EMBEDDING


def _assemble(context: Context, space: str, matched: VocabularyMap) -> Iterator[Tensor]:
    """The new matrix [V, H] in bfloat16, some rows at a time."""
    donor, solved = context.inputs["donor"].tensors(), context.inputs["coefficients"].tensors()
    source_VH = donor.read(_donor_name(donor, space))
    mean_H = _mean(source_VH, matched.anchor_from).to(torch.bfloat16)
    carry = _transfer(context, space, matched, source_VH)
    numbers_NH = _numbers(context.params, space, matched, source_VH)
    copied, from_donor, numbers, combined = (
        torch.tensor(ids, dtype=torch.int64)
        for ids in (matched.copied_ids, matched.copied_from, [n for _, n in matched.numbers], matched.combined)
    )
    for start, stop in iterate_rows(PADDED_VOCAB, _ROWS):
        rows_VH = mean_H.repeat(stop - start, 1)
        here = (copied >= start) & (copied < stop)
        rows_VH[copied[here] - start] = source_VH[from_donor[here]].to(torch.bfloat16)
        here = (numbers >= start) & (numbers < stop)
        rows_VH[numbers[here] - start] = numbers_NH[here]
        first, last = torch.searchsorted(combined, torch.tensor([start, stop])).tolist()
        if last > first:
            support_BK, weight_BK = (
                solved.rows(coefficient_tensor(space, column), first, last) for column in ("support", "coefficients")
            )
            rows_VH[combined[first:last] - start] = carry.rows(support_BK, weight_BK).to(torch.bfloat16)
        yield rows_VH


def _mean(source_VH: Tensor, rows: Sequence[int]) -> Tensor:
    """The mean of some rows in float64; each column's sum is the same whichever columns are summed beside it."""
    index_N = torch.tensor(rows)
    parts = [source_VH[index_N, a:b].double().mean(0) for a, b in iterate_rows(source_VH.shape[1], _COLUMNS)]
    return torch.cat(parts)


@dataclass(frozen=True)
class _Transfer:
    """From coefficients to rows of the donor's space."""

    centred_NH: Tensor
    mean_H: Tensor
    gain: Gain

    def rows(self, support_BK: Tensor, weight_BK: Tensor) -> Tensor:
        return combine(support_BK, weight_BK, self.centred_NH, self.mean_H, gain=self.gain.slope)


def _transfer(context: Context, space: str, matched: VocabularyMap, source_VH: Tensor) -> _Transfer:
    """The transfer of one space; without held-out anchors, or when it is to be plain, nothing is shrunk."""
    params: Params = context.params
    from_donor = dict(zip(matched.anchor_ids, matched.anchor_from, strict=True))
    atoms_NH = source_VH[[from_donor[number] for number in _ids(context, "dictionary")]].float()
    if params.transfer == "plain":
        return _Transfer(atoms_NH, torch.zeros_like(atoms_NH[0]), Gain(1.0, None))
    mean_H = _mean(source_VH, matched.anchor_from).float()
    whole = _Transfer(atoms_NH.sub_(mean_H), mean_H, Gain(1.0, None))
    held_out = [from_donor[number] for number in _ids(context, "held_out")]
    if not held_out:
        return whole
    solved = context.inputs["coefficients"].tensors()
    predicted_BH = whole.rows(
        solved.read(coefficient_tensor(space, "held_out_support")),
        solved.read(coefficient_tensor(space, "held_out_coefficients")),
    )
    return replace(whole, gain=measure_gain(predicted_BH, source_VH[held_out].float(), mean_H))


def _numbers(params: Params, space: str, matched: VocabularyMap, source_VH: Tensor) -> Tensor:
    digits_10H = source_VH[[matched.donor_ids[digit] for digit in DIGITS]]
    if not matched.numbers:
        return digits_10H[:0]
    return compose_numbers(
        digits_10H,
        [text for text, _ in matched.numbers],
        leading="last" if space == "embedding" else "first",
        decay=params.number_decay,
        seed=params.number_seed,
    ).to(torch.bfloat16)


def _figures(context: Context, matched: VocabularyMap) -> Report:
    """Rows by kind, and how far the transfer is trusted."""
    donor = context.inputs["donor"].tensors()
    gains: dict[str, dict[str, float]] = {}
    for space in SPACES:
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
    return Report({"rows_by_kind": rows, "transfer": gains})
