"""A vocabulary reference made from spelling: an embedding and a head over the o200k ids, from the bytes of each token.

Place in the path: input `tokenizer` -> **vocab_reference** -> the vocabulary transplant, in place of a trained
model's matrices. Tokens that share beginnings, endings or pieces come out close; that is the structure a transplant
needs.

Invariants: a row is a sum of random signs, one line of signs a feature, with whole weights: exact in float32, so
that the bytes depend on no machine, thread or order. Features of a token, case folded and without its leading
space: its n-grams of 1 to 4 bytes (from 2 on with the marks of beginning and end; the mark of the beginning says
whether a space led or the token is special), its first and last bytes with their places, and the whole token as it
is. Embedding and head have the same features under unrelated signs.

Shapes: V vocabulary, D dimension.

Example: `vpstore build gpt-oss-20b` under a profile that names this recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from hashlib import blake2b, shake_256
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from recipes.data.encodings import O200K_HARMONY
from recipes.data.vocabulary import Vocabulary, read_vocabulary
from recipes.names import EMBEDDING, HEAD
from recipes.params.vocab_reference import Params
from recipes.recipe import Context, Plan, Report, copy_file, json_file
from recipes.tensors import planned
from vpstore.errors import RecipeRefused

_BEGIN, _SPACE, _SPECIAL, _END = 256, 257, 258, 259  # marks, beyond the bytes
_CODE_BITS, _TAG_SHIFT = np.uint64(9), np.uint64(48)
_GRAM_WEIGHTS = {1: 1, 2: 1, 3: 2, 4: 2}
_PLACES, _PLACE_WEIGHT, _WHOLE_WEIGHT = 3, 2, 3
_BUCKETS = 1 << 15

_Keys = npt.NDArray[np.uint64]


class Family(NamedTuple):
    """Features of one sort: keys in the order of the tokens, and how many each token has."""

    keys: _Keys
    counts_V: npt.NDArray[np.int64]
    weight: int


def plan(context: Context) -> Plan:
    """Two matrices, the tokenizer and a config that says what they are.

    Raises:  RecipeRefused: the tokenizer is not that of o200k_harmony.
    """
    params: Params = context.params
    source = context.inputs["tokenizer"].path / "tokenizer.json"
    vocabulary = read_vocabulary(source)
    V = len(vocabulary.tokens)
    if len(vocabulary.tokens) != O200K_HARMONY.n_vocab:
        raise RecipeRefused(
            "the reference needs the o200k Harmony vocabulary",
            where=context.inputs["tokenizer"].ref,
            expected=f"{O200K_HARMONY.n_vocab} ids",
            found=str(V),
        )
    features = cache(lambda: token_features(vocabulary))

    def matrix(name: str) -> torch.Tensor:
        return reference_matrix(
            features(), dimension=params.dimension, row_norm=params.row_norm, seed=f"{params.seed}/{name}"
        )

    shape = (V, params.dimension)
    config = {
        "model_type": "vocabulary_reference",
        "vocab_size": V,
        "hidden_size": params.dimension,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return Plan(
        tensors=[planned(name, shape, "BF16", partial(matrix, name)) for name in (EMBEDDING, HEAD)],
        files=[copy_file("tokenizer.json", source, "application/json"), json_file("config.json", config)],
        report=Report(metrics={"vocabulary": V, "dimension": params.dimension}),
    )


def token_features(vocabulary: Vocabulary) -> list[Family]:
    """The features of every token, as 64-bit keys that mean the same for every token."""
    names = {number: name.encode() for name, number in vocabulary.special.items()}
    whole = [names.get(number, token or b"") for number, token in enumerate(vocabulary.tokens)]
    marks = np.array([_mark(number in names, token) for number, token in enumerate(whole)], dtype=np.uint64)
    bodies = [token[1:] if mark == _SPACE else token for token, mark in zip(whole, marks, strict=True)]
    text, lengths_V = _joined([body.lower() for body in bodies])
    framed, framed_lengths_V = _framed(text, lengths_V, marks)
    families = [_grams(text if n == 1 else framed, lengths_V if n == 1 else framed_lengths_V, n) for n in _GRAM_WEIGHTS]
    families += [_places(text, lengths_V, from_end=from_end) for from_end in (False, True)]
    digests = b"".join(blake2b(token, digest_size=16).digest() for token in whole)
    keys = np.frombuffer(digests, dtype="<u8").astype(np.uint64)
    counts = np.full(len(whole), 2, dtype=np.int64)  # twice: one key alone meets another token's in the same bucket
    return [*families, Family(keys, counts, _WHOLE_WEIGHT)]


def _mark(is_special: bool, token: bytes) -> int:
    if is_special:
        return _SPECIAL
    return _SPACE if token.startswith(b" ") and len(token) > 1 else _BEGIN


def _joined(bodies: Sequence[bytes]) -> tuple[_Keys, npt.NDArray[np.int64]]:
    lengths = np.array([len(body) for body in bodies], dtype=np.int64)
    return np.frombuffer(b"".join(bodies), dtype=np.uint8).astype(np.uint64), lengths


def _framed(text: _Keys, lengths_V: npt.NDArray[np.int64], marks: _Keys) -> tuple[_Keys, npt.NDArray[np.int64]]:
    """Each token between its mark and the mark of the end."""
    framed_lengths_V = lengths_V + 2
    starts = np.cumsum(framed_lengths_V) - framed_lengths_V
    framed = np.empty(int(framed_lengths_V.sum()), dtype=np.uint64)
    framed[starts] = marks
    framed[starts + framed_lengths_V - 1] = _END
    token_of = np.repeat(np.arange(lengths_V.size), lengths_V)
    framed[np.arange(text.size) + 2 * token_of + 1] = text
    return framed, framed_lengths_V


def _grams(codes: _Keys, lengths_V: npt.NDArray[np.int64], n: int) -> Family:
    """All windows of n codes that lie inside one token."""
    keys = np.zeros(max(codes.size - n + 1, 0), dtype=np.uint64)
    for offset in range(n):
        keys = (keys << _CODE_BITS) | codes[offset : offset + keys.size]
    places = np.arange(codes.size) - np.repeat(np.cumsum(lengths_V) - lengths_V, lengths_V)
    fits = (places + n <= np.repeat(lengths_V, lengths_V))[: keys.size]
    tagged = keys[fits] | (np.uint64(n) << _TAG_SHIFT)
    return Family(tagged, np.maximum(lengths_V - n + 1, 0), _GRAM_WEIGHTS[n])


def _places(codes: _Keys, lengths_V: npt.NDArray[np.int64], *, from_end: bool) -> Family:
    """The first or last bytes with their distance from that side."""
    places = np.arange(codes.size) - np.repeat(np.cumsum(lengths_V) - lengths_V, lengths_V)
    distances = np.repeat(lengths_V, lengths_V) - 1 - places if from_end else places
    near = distances < _PLACES
    tag = np.uint64(6 if from_end else 5) << _TAG_SHIFT
    keys = (distances[near].astype(np.uint64) << _CODE_BITS) | codes[near] | tag
    return Family(keys, np.minimum(lengths_V, _PLACES), _PLACE_WEIGHT)


def reference_matrix(families: Sequence[Family], *, dimension: int, row_norm: float, seed: str) -> torch.Tensor:
    """Rows of equal length out of features.

    Args:    seed: names the signs; another seed gives unrelated rows with about the same angles between them.
    Returns: float32 [V, dimension]; a row without any feature stays zero.
    """
    bits = np.frombuffer(shake_256(f"signs/{seed}".encode()).digest(_BUCKETS * dimension // 8), dtype=np.uint8)
    signs = torch.from_numpy(np.unpackbits(bits).reshape(_BUCKETS, dimension).astype(np.float32)) * 2 - 1
    salt = np.frombuffer(blake2b(f"buckets/{seed}".encode(), digest_size=8).digest(), dtype="<u8").astype(np.uint64)
    sum_VD = torch.zeros(families[0].counts_V.size, dimension)
    for family in families:
        buckets = torch.from_numpy((_mix(family.keys ^ salt) % np.uint64(_BUCKETS)).astype(np.int64))
        starts = torch.from_numpy(np.cumsum(family.counts_V) - family.counts_V)
        part_VD = torch.nn.functional.embedding_bag(buckets, signs, starts, mode="sum")
        sum_VD.add_(part_VD, alpha=family.weight)
    # In float64 the sum of squares is exact too, whatever its order.
    norms_V1 = torch.linalg.vector_norm(sum_VD, dim=1, keepdim=True, dtype=torch.float64).clamp_min_(1.0)
    return sum_VD.mul_(row_norm).div_(norms_V1.to(torch.float32))


def _mix(keys: _Keys) -> _Keys:
    """Spread the bits of 64-bit keys; the finalizer of SplitMix64."""
    mixed = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
