"""Knobs of the donor import.

Place in the path: **config** -> recipe.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from recipes.params.base import ParamsBase


class Params(ParamsBase):
    """What is taken over from a donor, and what it is held against before.

    keep_files: files taken over byte for byte. keep_tensors: tensors taken out of the donor's shards; empty if the
    shards are among keep_files. verbatim: the artifact holds the donor's own files and nothing else.
    expect: keys of config.json with the values they must have.
    tensors: names with their sizes, in keys of config.json joined by `*`; a `*` in a name stands for every layer.
    optional_tensors: those of them that may be absent. dtype: of all of them.
    ordinary_tokens: tokens of tokenizer.json without the added ones.
    """

    keep_files: tuple[str, ...]
    keep_tensors: tuple[str, ...]
    verbatim: bool
    expect: dict[str, str | int | float | bool]
    tensors: dict[str, tuple[str, ...]]
    optional_tensors: tuple[str, ...]
    dtype: str
    ordinary_tokens: int = Field(gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        if self.verbatim and self.keep_tensors:
            raise ValueError("a verbatim donor keeps whole files: keep_tensors must be empty")
        if not {"config.json", "tokenizer.json"} <= set(self.keep_files):
            raise ValueError("keep_files must name config.json and tokenizer.json")
        if not set(self.keep_tensors) <= set(self.tensors):
            raise ValueError("every one of keep_tensors needs its sizes under tensors")
        return self
