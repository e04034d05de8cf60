from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes import vocab_reference
from recipes.data.harmony import HarmonyTokenizer
from recipes.data.vocabulary import Vocabulary, read_vocabulary
from recipes.names import EMBEDDING, HEAD
from recipes.params.vocab_reference import Params
from recipes.recipe import Context, InputArtifact, Plan
from recipes.vocab_reference import Family, reference_matrix, token_features
from vpstore.errors import RecipeRefused

GOLDEN = "f80145e639cf06944a011f34f2fad0233e8b6de8fab9bd436675f0d709c80d57"
WORDS = (b"walk", b" walk", b" Walk", b"walking", b"talking", b"zebra", b"2", b"1\xe4")


def plan(tokenizer: Path) -> Plan:
    parent = InputArtifact("tokenizer", "o200k-harmony@main", "blake3:00", tokenizer.parent)
    return vocab_reference.plan(
        Context(Params(dimension=64, row_norm=2.0, seed=3), {"tokenizer": parent}, {}, tokenizer.parent)
    )


def small(special: dict[str, int] | None = None) -> list[Family]:
    names = special or {}
    return token_features(Vocabulary([*WORDS, *[None] * len(names)], names))


def slow_matrix(families: list[Family], *, dimension: int, row_norm: float, seed: str) -> torch.Tensor:
    """One feature at a time: the matrix of a family of one key is that key's line of signs."""
    rows = []
    for token in range(families[0].counts_V.size):
        total = torch.zeros(dimension)
        for family in families:
            start = int(family.counts_V[:token].sum())
            for key in family.keys[start : start + int(family.counts_V[token])]:
                one = Family(np.array([key]), np.array([1]), 1)
                line = reference_matrix([one], dimension=dimension, row_norm=1.0, seed=seed)[0]
                total += family.weight * line.sign()
        rows.append(row_norm * total / total.norm())
    return torch.stack(rows)


def test_rows_are_the_sums_of_their_features() -> None:
    families = small({"<|a|>": 8})
    fast = reference_matrix(families, dimension=32, row_norm=0.5, seed="x")
    torch.testing.assert_close(fast, slow_matrix(families, dimension=32, row_norm=0.5, seed="x"))


def test_features_of_a_word() -> None:
    counts = {n: small()[n - 1].counts_V.tolist() for n in (1, 2, 3, 4)}
    assert counts[1] == [4, 4, 4, 7, 7, 5, 1, 2]  # bytes without marks and leading space
    assert counts[2] == [5, 5, 5, 8, 8, 6, 2, 3]  # with both marks
    assert counts[4] == [3, 3, 3, 6, 6, 4, 0, 1]


def test_spelling_decides_nearness() -> None:
    matrix = reference_matrix(small(), dimension=2048, row_norm=1.0, seed="x")
    cosines = matrix @ matrix.T
    walk, spaced, capital, walking, talking, zebra, *_ = range(len(WORDS))
    assert cosines[spaced, capital] > cosines[spaced, walk] > cosines[spaced, talking] > cosines[spaced, zebra]
    assert cosines[walking, talking] > cosines[walking, walk] > cosines[walking, zebra]
    assert cosines[spaced, capital] < 0.99
    assert cosines[walk, zebra].abs() < 0.1


def test_bytes_are_the_same_for_ever_and_with_any_threads() -> None:
    before = torch.get_num_threads()
    digests = set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            matrix = reference_matrix(small(), dimension=64, row_norm=1.0, seed="golden").bfloat16()
            digests.add(sha256(matrix.view(torch.uint8).numpy().tobytes()).hexdigest())
    finally:
        torch.set_num_threads(before)
    assert digests == {GOLDEN}


@pytest.mark.slow
def test_the_whole_vocabulary(o200k_file: Path, harmony: HarmonyTokenizer) -> None:
    made = plan(o200k_file)
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in made.tensors] == [
        (EMBEDDING, "BF16", (201088, 64)),
        (HEAD, "BF16", (201088, 64)),
    ]
    embedding, head = (tensor.compute() for tensor in made.tensors)
    for matrix in (embedding, head):
        norms = matrix.float().norm(dim=1)
        assert float((norms - 2).abs().max()) < 0.01
    crossed = torch.nn.functional.cosine_similarity(embedding.float(), head.float())
    assert float(crossed.mean().abs()) < 0.01
    rows = embedding.float() / 2
    for word, other in ((" Paris", " paris"), ("walking", "Walking"), ("ation", "ATION")):
        first, second = harmony.encode(word)[0], harmony.encode(other)[0]
        scores = rows @ rows[first]
        assert int((scores > scores[second]).sum()) < 8


def test_another_vocabulary_is_refused(qwen_file: Path) -> None:
    assert len(read_vocabulary(qwen_file).tokens) == 151669
    with pytest.raises(RecipeRefused, match="o200k"):
        plan(qwen_file)
