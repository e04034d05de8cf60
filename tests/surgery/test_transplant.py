"""Coefficients and transplant: anchors bit-equal, control tokens by the map, numbers told apart, the rest by OMP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_pico import Built, build, damaged, gates, shuffled
from torch import Tensor

from recipes import transplant_vocab, vocab_coefficients
from recipes.checkpoint import donor_config_json, load_donor, parse_donor_config
from recipes.data.bpe import to_byte_level
from recipes.data.vocabulary import Vocabulary, read_vocabulary
from recipes.model.config import PADDED_VOCAB, DonorConfig
from recipes.model.donor import Donor
from recipes.names import EMBEDDING, HEAD
from recipes.ops.numbers import closest_pair, compose_numbers
from recipes.ops.omp import Dictionary
from recipes.ops.vocabulary_map import match_vocabularies, shared_tokens
from recipes.params.transplant_vocab import Params
from recipes.params.vocab_coefficients import Params as CoefficientParams
from recipes.recipe import Context, InputArtifact
from recipes.tensors import TensorReader, read_safetensors, write_safetensors
from vpstore.errors import RecipeRefused, ShapeMismatch

HIDDEN, DIMENSION = 32, 24
LETTERS = [bytes([byte]) for byte in range(256)]
WORDS = [a + b for a in (b"ab", b"cd", b"ef", b"\xc3") for b in (b"g", b"h", b"\xa9", b"1")]
NUMBERS = [str(n).encode() for n in range(10, 100)] + [f"{n:03d}".encode() for n in range(300)]
DONOR_TOKENS = LETTERS[::-1] + WORDS[:10]  # the same bytes under other ids
TARGET_TOKENS = LETTERS + WORDS + NUMBERS + [b"only", b"here"]
DONOR_SPECIAL = {"<|endoftext|>": 300, "<|im_start|>": 301, "<|im_end|>": 302}
TARGET_SPECIAL = {
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|call|>": 200012,
}


def write_tokenizer(path: Path, tokens: list[bytes], special: Mapping[str, int]) -> None:
    vocab = {to_byte_level(token): number for number, token in enumerate(tokens)}
    added = [{"id": number, "content": name, "special": True} for name, number in special.items()]
    path.write_text(json.dumps({"added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": []}}))


def coefficient_params(**changes: Any) -> CoefficientParams:
    fields: dict[str, Any] = {
        "dictionary_size": 200,
        "calibration_anchors": 0,
        "atoms_per_token": 6,
        "unit_atoms": False,
        "rows_per_chunk": 7,
        "control_by_omp": ("<|call|>",),
        "numbers_by_omp": False,
        "max_mean_residual": 0.9,
    }
    return CoefficientParams(**{**fields, **changes})


def params(**changes: Any) -> Params:
    fields: dict[str, Any] = {
        "transfer": "plain",
        "control_tokens": {
            "<|start|>": "<|im_start|>",
            "<|end|>": "<|im_end|>",
            "<|return|>": "<|im_end|>",
            "<|endoftext|>": "<|endoftext|>",
        },
        "number_decay": 0.5,
        "number_seed": 0,
    }
    return Params(**{**fields, **changes})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Donor, reference and tokenizer of a small vocabulary under the full range of ids."""
    folder = tmp_path_factory.mktemp("transplant")
    torch.manual_seed(0)
    config = DonorConfig(hidden_size=HIDDEN, num_hidden_layers=1, intermediate_size=16, vocab_size=320)
    (folder / "donor").mkdir()
    weights = {name: torch.randn(value.shape).bfloat16() for name, value in Donor(config).state_dict().items()}
    write_safetensors(folder / "donor/model.safetensors", weights)
    (folder / "donor/config.json").write_text(json.dumps(donor_config_json(config)))
    write_tokenizer(folder / "donor/tokenizer.json", DONOR_TOKENS, DONOR_SPECIAL)
    (folder / "reference").mkdir()
    matrices = {name: torch.randn(PADDED_VOCAB, DIMENSION) for name in (EMBEDDING, HEAD)}
    write_safetensors(folder / "reference/model.safetensors", matrices)
    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer/tokenizer.json", TARGET_TOKENS, TARGET_SPECIAL)
    for name in ("tokenizer_config.json", "special_tokens.json"):
        (folder / "tokenizer" / name).write_text("{}")
    return folder


def context(root: Path, chosen: Params, scratch: str, *, coefficients: Path) -> Context:
    paths = {"donor": root / "donor", "coefficients": coefficients, "tokenizer": root / "tokenizer"}
    inputs = {role: InputArtifact(role, f"{role}@test", "blake3:0", path) for role, path in paths.items()}
    (root / scratch).mkdir(exist_ok=True)
    return Context(chosen, inputs, {}, root / scratch)


def solving(root: Path, chosen: CoefficientParams, scratch: str) -> Context:
    roles = ("reference", "tokenizer")
    inputs = {role: InputArtifact(role, f"{role}@test", "blake3:0", root / role) for role in roles}
    (root / scratch).mkdir(exist_ok=True)
    sources = {"donor_vocabulary/tokenizer.json": root / "donor/tokenizer.json"}
    return Context(chosen, inputs, sources, root / scratch)


@pytest.fixture(scope="module")
def solved(root: Path) -> Built:
    return build(vocab_coefficients, solving(root, coefficient_params(), "solved"), with_check=False)


@pytest.fixture(scope="module")
def built(root: Path, solved: Built) -> Built:
    return build(transplant_vocab, context(root, params(), "built", coefficients=solved.staged.directory))


def bits(rows: Tensor) -> Tensor:
    return rows.view(torch.int16)


def donor_rows(root: Path) -> Tensor:
    return TensorReader(root / "donor").read(EMBEDDING)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_anchors_are_the_donors_bits_in_both_matrices(root: Path, built: Built, name: str) -> None:
    rows, donor = built.staged.read(name), donor_rows(root)
    assert rows.shape == (PADDED_VOCAB, HIDDEN)
    for new, token in enumerate(LETTERS + WORDS[:10]):
        assert torch.equal(bits(rows[new]), bits(donor[DONOR_TOKENS.index(token)]))


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_control_tokens_follow_the_map_and_nothing_else(root: Path, built: Built, name: str) -> None:
    """T17: roles and equal strings decide nothing; the map does."""
    rows, donor = built.staged.read(name), donor_rows(root)
    for new, old in params().control_tokens.items():
        assert torch.equal(bits(rows[TARGET_SPECIAL[new]]), bits(donor[DONOR_SPECIAL[old]]))


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_reserved_and_padding_ids_get_the_mean_of_the_anchors(root: Path, built: Built, name: str) -> None:
    rows, donor = built.staged.read(name), donor_rows(root)
    anchors = [DONOR_TOKENS.index(token) for token in LETTERS + WORDS[:10]]
    mean = donor[anchors].double().mean(0).bfloat16()
    for number in (700, 150_000, 200_018, PADDED_VOCAB - 1):
        assert torch.equal(rows[number], mean)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_other_rows_carry_the_references_coefficients_over(root: Path, built: Built, name: str) -> None:
    """Each space by its own OMP over the lowest anchors; the donor's rows with the same coefficients."""
    reference, donor, rows = TensorReader(root / "reference").read(name), donor_rows(root), built.staged.read(name)
    atoms = list(range(200))  # the dictionary: the 200 lowest new ids, all of them anchors
    others = [*range(266, 272), TARGET_TOKENS.index(b"only"), TARGET_TOKENS.index(b"here"), TARGET_SPECIAL["<|call|>"]]
    found = Dictionary(reference[atoms]).solve(reference[others], atoms=6)
    donor_atoms = donor[[DONOR_TOKENS.index(LETTERS[atom]) for atom in atoms]].double()
    wanted = torch.einsum("bk,bkh->bh", found.coefficients_BK, donor_atoms[found.support_BK])
    torch.testing.assert_close(rows[others].double(), wanted, rtol=0.01, atol=0.01)


def test_the_two_spaces_are_solved_apart(built: Built) -> None:
    """T16: a tied donor still gets a head of its own."""
    number = TARGET_TOKENS.index(b"only")
    assert not torch.equal(built.staged.read(EMBEDDING)[number], built.staged.read(HEAD)[number])


def test_the_result_is_an_untied_donor_over_the_new_vocabulary(root: Path, built: Built, tmp_path: Path) -> None:
    files = {file.name: file for file in built.plan.files}
    assert {"tokenizer.json", "tokenizer_config.json", "special_tokens.json", "config.json"} <= set(files)
    with (tmp_path / "config.json").open("wb") as out:
        files["config.json"].write(out)
    config = parse_donor_config(json.loads((tmp_path / "config.json").read_text()))
    assert (config.vocab_size, config.tie_word_embeddings, config.hidden_size) == (PADDED_VOCAB, False, HIDDEN)
    assert load_donor(built.staged, config).head_weight.shape == (PADDED_VOCAB, HIDDEN)
    donor = TensorReader(root / "donor")
    for name in donor.names():
        if name != EMBEDDING:
            assert torch.equal(bits(built.staged.read(name)), bits(donor.read(name)))


def test_the_report_counts_every_row_once(built: Built) -> None:
    assert built.plan.report is not None
    kinds = built.plan.report.metrics["rows_by_kind"]
    assert kinds["anchors"] == 266
    assert kinds["controls_copied"] == 4
    assert kinds["numbers"] == len(NUMBERS)
    assert kinds["combined"] == len(WORDS) - 10 + 2 + 1
    assert sum(kinds.values()) == PADDED_VOCAB
    assert set(gates(built.report).values()) == {"passed"}


def test_the_report_of_the_coefficients(solved: Built) -> None:
    assert solved.plan.report is not None
    assert solved.plan.report.metrics["tokens"] == {
        "anchors": 266,
        "dictionary": 200,
        "combined": len(WORDS) - 10 + 3,
        "held_out": 0,
    }
    assert 0 < solved.plan.report.metrics["omp_mean_relative_residual"]["embedding"] < 0.9
    assert set(gates(solved.plan.report).values()) == {"passed"}


def test_coefficients_are_the_same_whatever_the_order_and_the_chunks(root: Path, solved: Built) -> None:
    chosen = coefficient_params(rows_per_chunk=1000)
    again = build(vocab_coefficients, solving(root, chosen, "again"), order=shuffled, with_check=False)
    assert len(again.context.intermediates) == 2 < len(solved.context.intermediates)
    for name in solved.staged.names():
        assert torch.equal(again.staged.read(name), solved.staged.read(name))


def test_a_transplant_is_the_same_whatever_the_order(root: Path, solved: Built, built: Built) -> None:
    made = context(root, params(), "again-built", coefficients=solved.staged.directory)
    again = build(transplant_vocab, made, order=shuffled, with_check=False)
    for name in (EMBEDDING, HEAD):
        assert torch.equal(bits(again.staged.read(name)), bits(built.staged.read(name)))


def test_an_interrupted_solve_takes_up_where_it_was(root: Path, solved: Built) -> None:
    steps = vocab_coefficients.intermediates(solved.context)
    alone = steps[-1].compute({})  # the last range of the head, with nothing before it
    path = root / "alone.safetensors"
    write_safetensors(path, alone)
    assert path.read_bytes() == solved.context.intermediates[steps[-1].name].read_bytes()


def test_another_donor_of_the_vocabulary_takes_the_same_coefficients(root: Path, solved: Built, tmp_path: Path) -> None:
    """Nothing of a donor but the bytes of its tokens goes in: other weights, other ids, other control tokens."""
    target = read_vocabulary(root / "tokenizer/tokenizer.json")
    options: dict[str, Any] = {"control_by_omp": ("<|call|>",), "numbers_by_omp": False}
    assert shared_tokens(DONOR_TOKENS, target, **options) == shared_tokens(sorted(DONOR_TOKENS), target, **options)
    ids, weights = sorted(DONOR_TOKENS), read_safetensors(root / "donor/model.safetensors")
    (tmp_path / "donor").mkdir()
    write_tokenizer(tmp_path / "donor/tokenizer.json", ids, DONOR_SPECIAL)
    shutil.copy(root / "donor/config.json", tmp_path / "donor")
    write_safetensors(tmp_path / "donor/model.safetensors", {name: 2 * value for name, value in weights.items()})
    (tmp_path / "tokenizer").symlink_to(root / "tokenizer")
    other = build(transplant_vocab, context(tmp_path, params(), "other", coefficients=solved.staged.directory))
    assert set(gates(other.report).values()) == {"passed"}
    new = TARGET_TOKENS.index(b"ab" + b"g")
    assert torch.equal(other.staged.read(EMBEDDING)[new], 2 * weights[EMBEDDING][ids.index(b"abg")])


@pytest.mark.parametrize("tokens", [DONOR_TOKENS[:-1], [*DONOR_TOKENS, b"only"]], ids=["fewer", "more"])
def test_coefficients_of_another_vocabulary_are_refused(
    root: Path, solved: Built, tmp_path: Path, tokens: list[bytes]
) -> None:
    (tmp_path / "donor").mkdir()
    write_tokenizer(tmp_path / "donor/tokenizer.json", tokens, DONOR_SPECIAL)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(root / "donor" / name, tmp_path / "donor")
    (tmp_path / "tokenizer").symlink_to(root / "tokenizer")
    with pytest.raises(RecipeRefused, match="another vocabulary than the donor's"):
        transplant_vocab.plan(context(tmp_path, params(), "refused", coefficients=solved.staged.directory))


@pytest.mark.parametrize("sources", [{}, {"donor_vocabulary/a.json": Path("a"), "donor_vocabulary/b": Path("b")}])
def test_a_donors_vocabulary_is_one_file(root: Path, sources: dict[str, Path]) -> None:
    refused = replace(solving(root, coefficient_params(), "refused"), sources=sources)
    with pytest.raises(RecipeRefused, match="not one file"):
        vocab_coefficients.intermediates(refused)


def test_a_changed_anchor_and_equal_numbers_miss_their_gates(built: Built, tmp_path: Path) -> None:
    def flip(rows: Tensor) -> Tensor:
        rows[5, 0] += 1
        return rows

    def same(rows: Tensor) -> Tensor:
        rows[TARGET_TOKENS.index(b"21")] = rows[TARGET_TOKENS.index(b"12")]
        return rows

    verdicts = gates(transplant_vocab.check(built.context, damaged(built, EMBEDDING, flip, tmp_path)))
    assert verdicts["anchors_changed_embedding"] == "missed"
    assert verdicts["anchors_changed_head"] == "passed"
    verdicts = gates(transplant_vocab.check(built.context, damaged(built, HEAD, same, tmp_path)))
    assert verdicts["closest_numbers_cosine_head"] == "missed"


def test_a_reference_that_says_nothing_misses_its_gate(solved: Built) -> None:
    strict = replace(solved.context, params=coefficient_params(max_mean_residual=0.01))
    report = vocab_coefficients.plan(strict).report
    assert gates(report)["omp_mean_residual_embedding"] == "missed"


@pytest.mark.parametrize(
    "mapped",
    [{"<|nowhere|>": "<|im_end|>"}, {"<|start|>": "<|nowhere|>"}, {"<|call|>": "<|im_end|>"}],
    ids=["no new one", "no old one", "combined too"],
)
def test_control_tokens_that_do_not_exist_or_stand_twice_are_refused(
    root: Path, solved: Built, mapped: dict[str, str]
) -> None:
    chosen = context(root, params(control_tokens=mapped), "refused", coefficients=solved.staged.directory)
    with pytest.raises(RecipeRefused):
        transplant_vocab.plan(chosen)


def test_a_control_token_that_does_not_exist_has_no_coefficients(root: Path) -> None:
    with pytest.raises(RecipeRefused):
        vocab_coefficients.intermediates(solving(root, coefficient_params(control_by_omp=("<|nowhere|>",)), "refused"))


def test_a_reference_of_another_vocabulary_is_refused(root: Path, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {name: torch.zeros(500, 8) for name in (EMBEDDING, HEAD)})
    base = solving(root, coefficient_params(), "refused")
    inputs = {**base.inputs, "reference": replace(base.inputs["reference"], path=tmp_path)}
    with pytest.raises(ShapeMismatch):
        vocab_coefficients.intermediates(replace(base, inputs=inputs))[0].compute({})


def test_vocabularies_without_digits_share_too_little(tmp_path: Path) -> None:
    donor = Vocabulary([b"a", b"b"], {})
    with pytest.raises(RecipeRefused):
        match_vocabularies(donor, donor, control_tokens={}, combined=())


def test_of_two_donor_tokens_with_equal_bytes_the_lowest_id_is_the_anchor() -> None:
    digits: list[bytes | None] = [str(digit).encode() for digit in range(10)]
    donor, target = Vocabulary([*digits, b"x", b"x"], {}), Vocabulary([*digits, None, b"x"], {})
    found = match_vocabularies(donor, target, control_tokens={}, combined=())
    assert found.anchor_from[-1] == 10


def test_numbers_can_be_left_to_omp(root: Path) -> None:
    target = read_vocabulary(root / "tokenizer/tokenizer.json")
    donor = read_vocabulary(root / "donor/tokenizer.json")
    both = [
        shared_tokens(donor.tokens, target, control_by_omp=(), numbers_by_omp=by_omp).combined
        for by_omp in (False, True)
    ]
    composed, left = (
        match_vocabularies(donor, target, control_tokens={}, combined=combined).numbers for combined in both
    )
    assert [number for _, number in composed] == sorted(set(both[1]) - set(both[0]))
    assert len(composed) == len(NUMBERS)
    assert left == []


def digits(width: int = 64) -> Tensor:
    """Rows of digits as trained ones are: mostly what all digits share."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, width, generator=generator) + 0.4 * torch.randn(10, width, generator=generator)


@pytest.mark.parametrize("leading", ["first", "last"])
def test_composed_numbers_differ_in_digits_order_and_length(leading: Any) -> None:
    everything = [str(n) for n in range(10)] + [text.decode() for text in NUMBERS]
    everything += [f"{n:03d}" for n in range(300, 1000)]
    rows = compose_numbers(digits(), everything, leading=leading, decay=0.5, seed=0)
    assert rows.shape == (1100, 64)
    assert closest_pair(rows) < 0.995
    torch.testing.assert_close(rows[:10], digits().double())


def test_an_unordered_mixture_cannot_tell_permutations_apart() -> None:
    """Negative control: what a bag of digits gives."""
    texts = ("202", "220", "022", "345", "789")
    bag = torch.stack([digits()[[int(digit) for digit in text]].sum(0) for text in texts])
    assert closest_pair(bag) == pytest.approx(1.0)
    assert closest_pair(compose_numbers(digits(), texts, leading="last", decay=0.5, seed=0)) < 0.95


def test_a_weighted_sum_without_signs_cannot_tell_repetitions_apart() -> None:
    """Negative control: "2", "22" and "222" point the same way if places are not bound."""
    texts = ("2", "22", "222")
    weighted = torch.stack([digits()[2] * weight for weight in (1.0, 1.5, 1.75)])
    assert closest_pair(weighted) == pytest.approx(1.0)
    assert closest_pair(compose_numbers(digits(), texts, leading="last", decay=0.5, seed=0)) < 0.5


def test_the_leading_digit_is_the_nearest_one() -> None:
    numbers = [f"{n:03d}" for n in range(1000)]
    unit = torch.nn.functional.normalize(digits().double(), dim=1)
    for leading, place in (("first", 0), ("last", -1)):
        rows = compose_numbers(digits(), numbers, leading=leading, decay=0.5, seed=0)  # type: ignore[arg-type]
        nearest = (torch.nn.functional.normalize(rows, dim=1) @ unit.T).argmax(1)
        right = sum(int(text[place]) == int(found) for text, found in zip(numbers, nearest, strict=True))
        assert right > 950


def test_digits_can_be_read_off_linearly() -> None:
    """Each place by one linear map: what a layer of the model could learn to do."""
    numbers = [f"{n:03d}" for n in range(1000)]
    rows = compose_numbers(digits(), numbers, leading="last", decay=0.5, seed=0)
    design = torch.cat([rows, torch.ones(1000, 1)], 1)
    for place in range(3):
        wanted = torch.nn.functional.one_hot(torch.tensor([int(text[place]) for text in numbers]), 10).double()
        # The rows span fewer dimensions than they have: the solver must find the rank, and find it the same each time.
        read = (design @ torch.linalg.lstsq(design, wanted, driver="gelsd").solution).argmax(1)
        assert (read == wanted.argmax(1)).double().mean() > 0.99


@pytest.mark.parametrize(("rows", "numbers"), [(9, ["12"]), (10, ["1a"]), (10, ["١٢"]), (10, [""])])
def test_what_is_no_number_is_refused(rows: int, numbers: list[str]) -> None:
    with pytest.raises(ShapeMismatch):
        compose_numbers(torch.zeros(rows, 8), numbers, leading="last", decay=0.5, seed=0)


def test_calibrated_transfer_trusts_what_held_out_anchors_confirm(root: Path, tmp_path: Path) -> None:
    """Donor rows that follow the reference give a gain near 1; unrelated ones give the mean row instead of noise."""
    config = json.loads((root / "donor/config.json").read_text())
    donor = dict(read_safetensors(root / "donor/model.safetensors"))
    reference = TensorReader(root / "reference").read(EMBEDDING)
    generator = torch.Generator().manual_seed(3)
    linear = torch.randn(DIMENSION, HIDDEN, generator=generator) / DIMENSION**0.5
    rows = donor[EMBEDDING].clone()
    for new, token in enumerate(TARGET_TOKENS):
        if token in DONOR_TOKENS:
            rows[DONOR_TOKENS.index(token)] = (reference[new] @ linear + 50.0).bfloat16()
    (tmp_path / "donor").mkdir()
    write_safetensors(tmp_path / "donor/model.safetensors", {**donor, EMBEDDING: rows})
    (tmp_path / "donor/config.json").write_text(json.dumps(config))
    shutil.copy(root / "donor/tokenizer.json", tmp_path / "donor")
    for name in ("reference", "tokenizer"):
        (tmp_path / name).symlink_to(root / name)
    exact = coefficient_params(calibration_anchors=20, atoms_per_token=DIMENSION)
    folder = build(vocab_coefficients, solving(root, exact, "exact"), with_check=False).staged.directory
    chosen = params(transfer="calibrated")
    related = build(transplant_vocab, context(tmp_path, chosen, "related", coefficients=folder)).plan.report
    unrelated = build(transplant_vocab, context(root, chosen, "unrelated", coefficients=folder))
    assert related is not None
    assert unrelated.plan.report is not None
    assert related.metrics["transfer"]["embedding"]["slope"] > 0.8
    assert related.metrics["transfer"]["embedding"]["r_squared"] > 0.8
    assert unrelated.plan.report.metrics["transfer"]["embedding"]["slope"] < 0.2
