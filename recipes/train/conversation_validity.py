"""Does the model speak Harmony? Teacher-forced at control tokens, or by sampled answers and a parser.

Place in the path: a model + held-out conversations -> **conversation_validity** -> gates. The conversations are the
held-out documents that have a span; a prompt ends where the loss mask begins.

Invariants: greedy, ties to the lowest id; the parser accepts what UPCYCLING's rules ask for and nothing else: an
assistant message on the analysis channel or more, then one on the final channel with text, closed by `<|return|>`,
with no other control token and no id outside the named ones.

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
from recipes.train.losses import score_tokens
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


@torch.no_grad()
def sampled_answer(reader: Reader, prompt: Sequence[int], *, max_new_tokens: int) -> list[int]:
    """What the model says, greedily, up to and including `<|return|>` or `<|call|>`."""
    device = reader.model.head_weight.device
    ids = list(prompt)
    for _ in range(max_new_tokens):
        hidden_TH = reader.model.forward_hidden(torch.tensor([ids], device=device))[0]
        any_label = torch.zeros(1, dtype=torch.int64, device=device)
        scores = score_tokens(
            hidden_TH[-1:], reader.model.head_weight, any_label, valid_vocab=reader.valid_vocab, chunk=reader.chunk
        )
        ids.append(int(scores.best_N))
        if ids[-1] in (RETURN, CALL):
            break
    return ids[len(prompt) :]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn and read."""

    rows: int
    max_new_tokens: int
    decode: Decode
    assistant: Sequence[int]  # ids of the word in the header


def sampled_figures(reader: Reader, dataset: AlignedDataset, sampling: Sampling) -> dict[str, float]:
    """Share of sampled answers that are valid; {} if nothing is held out to ask."""
    opening = [START, *sampling.assistant]
    verdicts = []
    for tokens, mask in conversations(dataset, sampling.rows):
        answer = sampled_answer(reader, prompt_of(tokens, mask, opening), max_new_tokens=sampling.max_new_tokens)
        verdicts.append(is_valid_answer([*opening, *answer], sampling.decode))
    return {"valid_answers": sum(verdicts) / len(verdicts), "answers": len(verdicts)} if verdicts else {}


def is_valid_answer(ids: Sequence[int], decode: Decode) -> bool:
    """Whether ids, from the assistant's `<|start|>` on, are messages on analysis and then one final."""
    messages = _messages(ids)
    if messages is None:
        return False
    channels = [decode(header) for header, _, _ in messages]
    *thoughts, (_, words, closing) = messages
    return (
        bool(thoughts)
        and channels == [*["assistant analysis"] * len(thoughts), "assistant final"]
        and all(end == END for _, _, end in thoughts)
        and closing == RETURN
        and bool(decode(words).strip())
    )


def _messages(ids: Sequence[int]) -> list[tuple[list[int], list[int], int]] | None:
    """(header with a space in the place of `<|channel|>`, words, closing token) of each message; None if malformed."""
    space = 220  # the id of " "
    found = []
    at = 0
    while at < len(ids):
        if ids[at] != START:
            return None
        middle = next((i for i in range(at + 1, len(ids)) if ids[i] == MESSAGE), None)
        stop = None if middle is None else next((i for i in range(middle, len(ids)) if ids[i] in (END, RETURN)), None)
        if middle is None or stop is None:
            return None
        header, words = list(ids[at + 1 : middle]), list(ids[middle + 1 : stop])
        if header.count(CHANNEL) != 1:
            return None
        header[header.index(CHANNEL)] = space
        if any(token >= _FIRST_SPECIAL for token in [*header, *words]):
            return None
        found.append((header, words, ids[stop]))
        at = stop + 1
    return found or None
