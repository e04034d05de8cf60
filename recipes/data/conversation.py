"""One question with its reasoning and answer as Harmony tokens, with the loss mask and span of every token.

Place in the path: a SYNTH row -> **conversation** -> indexed datasets. openai-harmony renders; the masks are read
off the control tokens, which no text can produce.

Invariants: the reasoning is kept (analysis channel), the last message ends with `<|return|>`, then one
end-of-document token. The mask is 1 on every token of an assistant message, from its `<|start|>` to its end; the
span says 1 for analysis, 2 for final, 0 for all else. Both are then moved one place to the left and padded with 0:
index t speaks of label t + 1.

Example:
    renderer = HarmonyRenderer(directory, frame)
    rendered = renderer.training(Exchange(user="2 + 2?", analysis="2 + 2 = 4.", final="4"))
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from openai_harmony import (
    Conversation,
    DeveloperContent,
    HarmonyEncoding,
    Message,
    ReasoningEffort,
    RenderConversationConfig,
    Role,
    SystemContent,
    load_harmony_encoding,
)

from recipes.data.encodings import O200K_HARMONY
from recipes.data.harmony import EOD, RANKS_FILE, verified_ranks
from recipes.data.text import require_scalar_text
from vpstore.errors import RecipeRefused

_START = O200K_HARMONY.special["<|start|>"]
_MESSAGE = O200K_HARMONY.special["<|message|>"]
_CHANNEL = O200K_HARMONY.special["<|channel|>"]
ANALYSIS, FINAL = 1, 2
_KEEP_ANALYSIS = RenderConversationConfig(auto_drop_analysis=False)


@dataclass(frozen=True)
class Frame:
    """What stands before the user's words, the same for all conversations of a data set."""

    model_identity: str
    reasoning: Literal["Low", "Medium", "High"]
    date: str  # YYYY-MM-DD
    knowledge_cutoff: str  # YYYY-MM
    instructions: str


@dataclass(frozen=True)
class Exchange:
    """One turn of each side."""

    user: str
    analysis: str
    final: str


@dataclass(frozen=True)
class Rendered:
    """Three arrays of one length; loss_mask and span are shifted: index t speaks of label t + 1."""

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    span: npt.NDArray[np.uint8]

    @property
    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """All three, in the order of the fields."""
        return self.tokens, self.loss_mask, self.span


class HarmonyRenderer:
    """Renders exchanges in one frame."""

    def __init__(self, directory: Path, frame: Frame) -> None:
        """Load openai-harmony's encoding from the rank file in `directory`.

        Raises:  RecipeRefused: no rank file, or not the published one.
        """
        verified_ranks(directory / RANKS_FILE)
        self._encoding = _load(directory)
        self._opening = _opening(frame)
        self._assistant = tuple(self._encoding.encode("assistant"))
        self._channels = {
            tuple(self._encoding.encode("analysis")): ANALYSIS,
            tuple(self._encoding.encode("final")): FINAL,
        }

    def training(self, exchange: Exchange, *, where: str = "a conversation") -> Rendered:
        """The whole exchange, ended by `<|return|>` and an end-of-document token that is not learned.

        Args:    where: the row that it is made of, for a refusal.
        Raises:  RecipeRefused: a lone surrogate, or a text that the library breaks down on.
        """
        for name in ("user", "analysis", "final"):
            require_scalar_text(getattr(exchange, name), where=name)
        messages = [
            *self._opening,
            Message.from_role_and_content(Role.USER, exchange.user),
            Message.from_role_and_content(Role.ASSISTANT, exchange.analysis).with_channel("analysis"),
            Message.from_role_and_content(Role.ASSISTANT, exchange.final).with_channel("final"),
        ]
        conversation = Conversation.from_messages(messages)
        with _without_panic(where):
            tokens = self._encoding.render_conversation_for_training(conversation, _KEEP_ANALYSIS)
        spans = np.asarray([*self._spans(tokens), 0], dtype=np.uint8)
        return Rendered(
            np.asarray([*tokens, EOD], dtype=np.int32), shifted((spans > 0).astype(np.uint8)), shifted(spans)
        )

    def prompt(self, user: str, *, where: str = "a prompt") -> list[int]:
        """The frame and a question, up to where the assistant speaks.

        Args:    where: the row that it is made of, for a refusal.
        Raises:  RecipeRefused: a lone surrogate, or a text that the library breaks down on.
        """
        require_scalar_text(user, where="user")
        messages = [*self._opening, Message.from_role_and_content(Role.USER, user)]
        conversation = Conversation.from_messages(messages)
        with _without_panic(where):
            return list(self._encoding.render_conversation_for_completion(conversation, Role.ASSISTANT, _KEEP_ANALYSIS))

    def _spans(self, tokens: list[int]) -> list[int]:
        """Per token: 1 in an analysis message, 2 in a final message, 0 in another role's."""
        starts = [place for place, token in enumerate(tokens) if token == _START]
        spans = [0] * len(tokens)
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            header = tokens[start + 1 : tokens.index(_MESSAGE, start)]
            role, _, channel = _cut(header, _CHANNEL)
            if role == self._assistant:
                spans[start:stop] = [self._channels[channel]] * (stop - start)
        return spans


@contextmanager
def _without_panic(where: str) -> Iterator[None]:
    """A panic of the library's Rust code as a refusal; it is no Exception, and its class cannot be imported."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RecipeRefused(
            "openai-harmony broke down on a text",
            where=where,
            expected="a text that it can encode",
            found=str(error)[-200:],
            next_step="take the row out of the source, and report its text: rows that it fails on should be dropped",
        ) from error


def shifted(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Each value one place to the left, 0 in the last place."""
    moved = np.zeros_like(values)
    moved[:-1] = values[1:]
    return moved


def _cut(header: list[int], mark: int) -> tuple[tuple[int, ...], bool, tuple[int, ...]]:
    at = header.index(mark) if mark in header else len(header)
    return tuple(header[:at]), at < len(header), tuple(header[at + 1 :])


def _opening(frame: Frame) -> list[Message]:
    system = (
        SystemContent.new()
        .with_model_identity(frame.model_identity)
        .with_reasoning_effort(ReasoningEffort(frame.reasoning))
        .with_conversation_start_date(frame.date)
        .with_knowledge_cutoff(frame.knowledge_cutoff)
        .with_required_channels(["analysis", "commentary", "final"])
    )
    developer = DeveloperContent.new().with_instructions(frame.instructions)
    return [
        Message.from_role_and_content(Role.SYSTEM, system),
        Message.from_role_and_content(Role.DEVELOPER, developer),
    ]


def _load(directory: Path) -> HarmonyEncoding:
    """The library looks for its rank file where a variable of the environment says, and only there."""
    with _environment("TIKTOKEN_ENCODINGS_BASE", str(directory.absolute())):
        try:
            return load_harmony_encoding("HarmonyGptOss")
        except Exception as error:  # the library's own class derives from Exception alone
            raise RecipeRefused(
                "openai-harmony cannot load its encoding",
                where=RANKS_FILE,
                expected="the published rank file",
                found=str(error)[:200],
            ) from error


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
