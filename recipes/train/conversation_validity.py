"""Does the model speak Harmony? Teacher-forced at control tokens, or by sampled answers and a parser.

Place in the path: a model + held-out conversations -> **conversation_validity** -> gates. The conversations are the
held-out documents that have a span; a prompt ends where the loss mask begins.

Invariants: greedy, ties to the lowest id; the parser accepts the format and nothing else: one or more assistant
messages on the analysis channel, each closed by `<|end|>`, then one on the final channel with text, closed by
`<|return|>`; no other special id anywhere, and words that are UTF-8. openai-harmony's parser reads every answer that
is accepted here, to the same messages; what it reads beyond that is listed in docs/TOKENIZER.md.

Example:
    >>> control_token_figures(reader, dataset, rows=4, max_tokens=2048)["control_token_accuracy"]
    0.97
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from recipes.data.batches import AlignedDataset
from recipes.data.encodings import O200K_HARMONY
from recipes.model.generation import Limits, generate
from recipes.model.precision import REFERENCE, Numerics
from recipes.model.transformer import Student
from recipes.train.losses import VALID_VOCAB
from recipes.train.scoring import Reader

_NAMES = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
START, MESSAGE, CHANNEL, END, RETURN, CALL, CONSTRAIN = (O200K_HARMONY.special[name] for name in _NAMES)
CONTROL = (START, MESSAGE, CHANNEL, END, RETURN, CALL, CONSTRAIN)
_FIRST_SPECIAL = O200K_HARMONY.n_ranks

Decode = Callable[[Sequence[int]], str]


def conversations(dataset: AlignedDataset, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and shifted loss mask of the first `rows` documents that are conversations."""
    left = rows
    for number in range(len(dataset)):
        if left == 0:
            return
        tokens, mask, span = dataset.document(number)
        if span.any():
            left -= 1
            yield tokens, mask


def control_token_figures(reader: Reader, dataset: AlignedDataset, *, rows: int, max_tokens: int) -> dict[str, float]:
    """Share of the assistant's control tokens that the model would have chosen itself, and their loss.

    Returns: control_token_accuracy, control_token_nats, control_tokens; {} if nothing is held out to look at.
    """
    right, nats, total = 0, 0.0, 0
    for tokens, mask in conversations(dataset, rows):
        ids = torch.from_numpy(tokens[: max_tokens + 1].astype(np.int64))
        is_asked = torch.isin(ids[1:], torch.tensor(CONTROL)) & torch.from_numpy(mask[: len(ids) - 1] > 0)
        at = is_asked.nonzero().flatten()
        if len(at) == 0:
            continue
        scores = reader.score(ids[:-1], None, at, ids[1:][at])
        right += int((scores.best_N == ids[1:][at]).sum())
        nats += float(scores.nll_N.double().sum())
        total += len(at)
    if total == 0:
        return {}
    return {
        "control_token_accuracy": right / total,
        "control_token_nats": nats / total,
        "control_tokens": total,
    }


def prompt_of(tokens: np.ndarray, mask: np.ndarray, opening: Sequence[int]) -> list[int]:
    """The tokens before the assistant's first, and the opening of its message."""
    first = int(np.flatnonzero(mask)[0]) + 1
    return [*(int(token) for token in tokens[:first]), *opening]


def sampled_answers(
    model: Student,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    numerics: Numerics = REFERENCE,
) -> list[list[int]]:
    """What the model says to each prompt, greedily, up to and including `<|return|>` or `<|call|>`."""
    limits = Limits(max_new_tokens, stops=(RETURN, CALL), valid_vocab=VALID_VOCAB)
    return generate(model, prompts, limits, numerics=numerics)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn and read."""

    rows: int
    max_new_tokens: int
    decode: Decode
    assistant: Sequence[int]  # ids of the word in the header
    numerics: Numerics = REFERENCE


def sampled_figures(model: Student, dataset: AlignedDataset, sampling: Sampling) -> dict[str, float]:
    """Share of sampled answers that are valid; {} if nothing is held out to ask."""
    opening = [START, *sampling.assistant]
    asked = [prompt_of(tokens, mask, opening) for tokens, mask in conversations(dataset, sampling.rows)]
    answers = sampled_answers(model, asked, max_new_tokens=sampling.max_new_tokens, numerics=sampling.numerics)
    verdicts = [is_valid_answer([*opening, *answer], sampling.decode) for answer in answers]
    return {"valid_answers": sum(verdicts) / len(verdicts), "answers": len(verdicts)} if verdicts else {}


def is_valid_answer(ids: Sequence[int], decode: Decode) -> bool:
    """Whether ids, from the assistant's `<|start|>` on, are messages on analysis and then one final."""
    return not answer_fault(ids, decode)


def answer_fault(ids: Sequence[int], decode: Decode) -> str:
    """The first rule that an answer breaks; empty if it breaks none.

    Args:    ids: from the assistant's `<|start|>` to `<|return|>`. decode: text of ids, U+FFFD for broken bytes.
    """
    messages, fault = _messages(ids)
    if fault:
        return fault
    channels = [decode(header) for header, _, _ in messages]
    if not set(channels) <= {_ANALYSIS, _FINAL}:
        return "a header that is neither the assistant's analysis nor its final"
    if channels != [*[_ANALYSIS] * (len(messages) - 1), _FINAL] or len(messages) == 1:
        return "not analysis first and then one final"
    if any(closing != END for _, _, closing in messages[:-1]):
        return "an analysis that <|end|> does not close"
    if messages[-1][2] != RETURN:
        return "a final that <|return|> does not close"
    texts = [decode(words) for _, words, _ in messages]
    if any("\ufffd" in text for text in texts):
        return "words that are not UTF-8"
    return "" if texts[-1].strip() else "an empty final"


_SPACE = 220  # the id of " "
_ANALYSIS, _FINAL = "assistant analysis", "assistant final"
_Message = tuple[list[int], list[int], int]


def _messages(ids: Sequence[int]) -> tuple[list[_Message], str]:
    """(header with a space in the place of `<|channel|>`, words, closing token) of each message; and what is wrong."""
    found: list[_Message] = []
    at = 0
    while at < len(ids):
        if ids[at] != START:
            return found, "a token outside of messages"
        middle = next((i for i in range(at + 1, len(ids)) if ids[i] == MESSAGE), None)
        if middle is None:
            return found, "a header that <|message|> does not end"
        stop = next((i for i in range(middle, len(ids)) if ids[i] in (END, RETURN)), None)
        if stop is None:
            return found, "a message that nothing closes"
        header, words = list(ids[at + 1 : middle]), list(ids[middle + 1 : stop])
        if header.count(CHANNEL) != 1:
            return found, "a header without one <|channel|>"
        header[header.index(CHANNEL)] = _SPACE
        if any(not 0 <= token < _FIRST_SPECIAL for token in [*header, *words]):
            return found, "a special token inside a header or words"
        found.append((header, words, ids[stop]))
        at = stop + 1
    return found, "" if found else "no message"
