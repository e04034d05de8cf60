"""Which tokenizer an artifact has, by its own file, and what its special ids are for.

Place in the path: encodings -> **huggingface** -> documents, template, export.

Invariants: a family is told by the ids of its special tokens and the number of its ranks, not by what a manifest says.

Example:
    family_of(source.json("tokenizer.json"), where="vpMoE@smoke").eos_ids
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from recipes.data.encodings import O200K_HARMONY, QWEN3, EncodingSpec
from vpstore.errors import RecipeRefused


@dataclass(frozen=True)
class Family:
    """A vocabulary and the roles of its special tokens."""

    spec: EncodingSpec
    bos: str | None
    ends: tuple[str, ...]  # each ends what a model says; the first one stands in the tokenizer's config
    pad: str
    is_harmony: bool

    @property
    def bos_id(self) -> int | None:
        """The id of the token that begins a text."""
        return None if self.bos is None else self.spec.special[self.bos]

    @property
    def eos_ids(self) -> list[int]:
        """Ids at which `generate` stops."""
        return [self.spec.special[name] for name in self.ends]

    @property
    def pad_id(self) -> int:
        """The id that fills rows up."""
        return self.spec.special[self.pad]


# `<|call|>` ends a turn, too: then the caller has to run a tool. Documents, which all stages were trained on, end with
# `<|endoftext|>`.
HARMONY: Final = Family(
    O200K_HARMONY, "<|startoftext|>", ("<|return|>", "<|call|>", "<|endoftext|>"), "<|endoftext|>", is_harmony=True
)
QWEN: Final = Family(QWEN3, None, ("<|endoftext|>", "<|im_end|>"), "<|endoftext|>", is_harmony=False)


def family_of(tokenizer: Any, *, where: str) -> Family:
    """The family of a parsed `tokenizer.json`.

    Raises:  RecipeRefused: another one.
    """
    try:
        added = {str(one["content"]): int(one["id"]) for one in tokenizer["added_tokens"]}
        ranks = len(tokenizer["model"]["vocab"])
    except (KeyError, TypeError, ValueError):
        added, ranks = {}, 0
    for family in (HARMONY, QWEN):
        if ranks == family.spec.n_ranks and _covers(added, family.spec.special):
            return family
    raise RecipeRefused(
        "the tokenizer is of no family that this export knows",
        where=f"{where}, tokenizer.json",
        expected=", ".join(
            f"{one.spec.name} ({one.spec.n_ranks} ranks and its special tokens)" for one in (HARMONY, QWEN)
        ),
        found=f"{ranks} ranks, {len(added)} added tokens",
        next_step="export it as plain files, or add the family to recipes/huggingface/families.py",
    )


def _covers(added: Mapping[str, int], special: Mapping[str, int]) -> bool:
    return all(added.get(name) == number for name, number in special.items())
