"""The two vocabularies of the chain as data: pattern, special tokens, normalizer, size.

Place in the path: rank file -> **encodings** -> bpe, harmony. What is stated here cannot be derived from a rank file.

Invariants: special tokens are listed in the order of their ids, which follow the last rank without a gap.

Example:
    >>> O200K_HARMONY.special["<|return|>"], O200K_HARMONY.n_vocab
    (200002, 201088)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"

_O200K_PATTERN = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_CONTRACTIONS}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

_QWEN_PATTERN = "|".join(
    (
        _CONTRACTIONS,
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Ids of the harmony format that carry a name; every other id up to the end of the vocabulary is reserved.
_HARMONY_NAMED = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
    "<|endofprompt|>": 200018,
}

# The second name of an id that has two: a text file maps one id to one string, so this one is kept beside it.
O200K_ALIASES = {"<|reserved_200018|>": 200018}

_QWEN_ADDED = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)


@dataclass(frozen=True)
class EncodingSpec:
    """One vocabulary: what a rank file leaves open."""

    name: str
    pattern: str
    special: Mapping[str, int]  # in the order of the ids
    n_ranks: int
    ranks_sha256: str  # of the published rank file
    n_vocab: int  # rows of an embedding that has one row an id, without padding
    normalizer: str | None = None
    plain: frozenset[str] = frozenset()  # added tokens that a decoder shows like text


def _harmony_special() -> dict[str, int]:
    named = {number: name for name, number in _HARMONY_NAMED.items()}
    return {named.get(number, f"<|reserved_{number}|>"): number for number in range(199998, 201088)}


O200K_HARMONY = EncodingSpec(
    name="o200k_harmony",
    pattern=_O200K_PATTERN,
    special=_harmony_special(),
    n_ranks=199998,
    ranks_sha256="446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    n_vocab=201088,
)

QWEN3 = EncodingSpec(
    name="qwen3",
    pattern=_QWEN_PATTERN,
    special={name: 151643 + offset for offset, name in enumerate(_QWEN_ADDED)},
    n_ranks=151643,
    ranks_sha256="b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
    n_vocab=151669,
    normalizer="NFC",
    plain=frozenset(_QWEN_ADDED[_QWEN_ADDED.index("<tool_call>") :]),
)
