"""The o200k Harmony tokenizer as an artifact: ranks, the exact `tokenizers` file, and what the ids mean.

Place in the path: source `ranks` -> **tokenizer** -> every stage that reads or writes ids over o200k.

Invariants: the files follow from the published rank file alone; the gates hold the produced tokenizer.json against
tiktoken before anything is published: on the numeric prompts, on hard text, and on documents strung together from
all tokens.

Example: `vpstore build o200k-harmony` publishes the five files of `plan`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from recipes.data.bpe import json_bytes, tokenizer_json
from recipes.data.encodings import O200K_ALIASES, O200K_HARMONY
from recipes.data.harmony import NUMERIC_GOLDENS, RANKS_FILE, HarmonyTokenizer, verified_ranks
from recipes.data.order import document_order
from recipes.recipe import Context, Gate, Plan, Report, bytes_file, copy_file, json_file
from vpstore.errors import RecipeRefused

_TOKENS_A_DOCUMENT = 64

# Text on which encoders are known to part: white space, scripts, joiners, contractions, look-alikes of special tokens.
_HARD_TEXT = (
    "",
    " ",
    "  two  spaces\tand\ttabs \n\n\r\n \u00a0\u3000end  ",
    "I'll, we'VE, it's, THEY'D'nt, 'S, \u2019s",
    "x=1;y+=22;z=333;w=4444;v=55555;u=666666",
    "naïve Ångström ÅÄÖ straße İstanbul ǅungla",
    "русский язык, ελληνικά, עברית, العربية, हिन्दी, ไทย, 한국어, 日本語, 中文",
    "👩‍👩‍👧‍👦 🏳️‍🌈 é e\u0301 \u200d\u200b\ufeff",
    "<|start|>assistant<|channel|>final<|message|>no<|return|><|endoftext|><|reserved_200500|>",
    "http://example.org/a/b?c=d&e=%20#f\n\n\n/// ...",
    "\x00\x01\x1f\x7f\x85\u2028\u2029",
    "½ ² Ⅷ ١٢٣ १२३ 一二三",
)


def plan(context: Context) -> Plan:
    """Five files: rank file, tokenizer.json and its config, special tokens, manifest.

    Raises:  RecipeRefused: another rank file than the published one, or another padded vocabulary.
    """
    source = _rank_file(context.sources)
    _require_vocabulary(context.params.padded_vocab)
    ranks = verified_ranks(source)
    spec = O200K_HARMONY
    data = json_bytes(tokenizer_json(ranks, pattern=spec.pattern, special=spec.special))
    small = {"tokenizer_config.json": _config(), "special_tokens.json": _special()}
    files = [
        copy_file(RANKS_FILE, source, "text/plain"),
        bytes_file("tokenizer.json", data, "application/json"),
        *(json_file(name, value) for name, value in small.items()),
        json_file("manifest.json", _manifest(data)),
    ]
    report = _report(HarmonyTokenizer(ranks), data, documents=context.params.sample_documents)
    return Plan(files=files, report=report)


def _rank_file(sources: Mapping[str, Path]) -> Path:
    found = sources.get(f"ranks/{RANKS_FILE}")
    if found is None:
        raise RecipeRefused(
            "the tokenizer has no rank file",
            where="source role ranks",
            expected=f"ranks/{RANKS_FILE}",
            found=", ".join(sorted(sources)) or "no sources",
            next_step="name the provenance of the rank file in objects.toml",
        )
    return found


def _require_vocabulary(padded_vocab: int) -> None:
    if padded_vocab != O200K_HARMONY.n_vocab:
        raise RecipeRefused(
            "the padded vocabulary is not that of the encoding",
            where="params.padded_vocab",
            expected=str(O200K_HARMONY.n_vocab),
            found=str(padded_vocab),
            next_step="the o200k Harmony vocabulary fills its rows: there is nothing to pad",
        )


def _config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }


def _special() -> dict[str, Any]:
    special = O200K_HARMONY.special
    return {
        "special": dict(special),
        "aliases": O200K_ALIASES,
        "end_of_document": special["<|endoftext|>"],
        "end_of_turn": [special["<|return|>"], special["<|call|>"]],
    }


def _manifest(data: bytes) -> dict[str, Any]:
    return {
        "format": 1,
        "encoding": O200K_HARMONY.name,
        "ranks": O200K_HARMONY.n_ranks,
        "ranks_sha256": O200K_HARMONY.ranks_sha256,
        "special_tokens": len(O200K_HARMONY.special),
        "padded_vocab": O200K_HARMONY.n_vocab,
        "tokenizer_json_sha256": sha256(data).hexdigest(),
    }


def _report(reference: HarmonyTokenizer, data: bytes, *, documents: int) -> Report:
    produced = Tokenizer.from_buffer(data)
    produced.encode_special_tokens = True  # special-looking text is text, as for the reference
    texts = [*_HARD_TEXT, *NUMERIC_GOLDENS, *_strung_together(reference, documents)]
    encoded = produced.encode_batch(texts, add_special_tokens=False)
    differing = sum(found.ids != reference.encode(text) for found, text in zip(encoded, texts, strict=True))
    wrong = sum(tuple(reference.encode(text)) != ids for text, ids in NUMERIC_GOLDENS.items())
    size = produced.get_vocab_size(with_added_tokens=True)
    return Report(
        metrics={"vocabulary": size, "compared_documents": len(texts), "compared_tokens": sum(map(len, encoded))},
        gates=(
            Gate("documents that tokenizer.json encodes differently from tiktoken", differing, "==", 0),
            Gate("numeric prompts with other ids than stated", wrong, "==", 0),
            Gate("vocabulary of tokenizer.json", size, "==", O200K_HARMONY.n_vocab),
        ),
    )


def _strung_together(reference: HarmonyTokenizer, documents: int) -> Iterator[str]:
    """Documents of tokens drawn over the whole vocabulary; halves of characters are left out."""
    order = document_order(O200K_HARMONY.n_ranks, seed=0, epoch=0)
    for ids in np.array_split(order[: documents * _TOKENS_A_DOCUMENT], documents):
        yield reference.decode_bytes(int(number) for number in ids).decode("utf-8", errors="ignore")
