"""The chat template against openai-harmony, which is the reference: the same tokens for generated conversations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harmony_conversations import Drawer, harmony
from jinja2.exceptions import TemplateError
from openai_harmony import HarmonyEncoding, RenderConversationConfig, Role, load_harmony_encoding
from transformers.utils.chat_template_utils import render_jinja_template

from recipes.huggingface.history import Ancestor
from recipes.huggingface.template import frame_of, template_text

ROOT = Path(__file__).resolve().parents[2]
FRAME = {"current_date": "2026-01-01"}


@pytest.fixture(scope="module")
def library() -> HarmonyEncoding:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(ROOT / "assets"))
        return load_harmony_encoding("HarmonyGptOss")


def rendered(template: str, messages: list[dict[str, Any]], **more: Any) -> str:
    texts, _ = render_jinja_template(conversations=[messages], chat_template=template, **more)
    return str(texts[0])


def differing(library: HarmonyEncoding, count: int, change: Callable[[str], str] = lambda text: text) -> list[int]:
    """Numbers of the conversations that the template renders otherwise."""
    template, found = change(template_text(None)), []
    for number in range(count):
        draw = Drawer(number)
        tools = draw.tools() if draw.maybe(0.6) else None
        messages, frame = draw.messages(tools), draw.frame()
        drops, completes = draw.maybe(0.5), draw.maybe(0.5)
        config = RenderConversationConfig(auto_drop_analysis=drops)
        conversation = harmony(messages, tools, frame)
        if completes:
            expected = library.render_conversation_for_completion(conversation, Role.ASSISTANT, config)
        else:
            expected = library.render_conversation_for_training(conversation, config)
        how = {"add_generation_prompt": completes, "auto_drop_analysis": drops, **frame}
        text = rendered(template, messages, tools=tools, **how)
        if library.encode(text, allowed_special="all") != list(expected):
            found.append(number)
    return found


def test_conversations_are_what_openai_harmony_renders(library: HarmonyEncoding) -> None:
    assert differing(library, 120) == []


@pytest.mark.slow
def test_two_thousand_conversations_are_what_openai_harmony_renders(library: HarmonyEncoding) -> None:
    assert differing(library, 2000) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (" to=assistant", ""),
        ("<|constrain|>json", "json"),
        ("loop.index0 <= seen.first_final", "loop.index0 < seen.first_final"),
        ('else "?"', 'else ""'),
        ('{{- " | null" -}}', ""),
    ],
)
def test_a_wrong_template_is_noticed(library: HarmonyEncoding, right: str, wrong: str) -> None:
    def change(text: str) -> str:
        assert right in text
        return text.replace(right, wrong)

    assert differing(library, 40, change)


def test_the_frame_of_the_training_is_the_default() -> None:
    frame = {"model_identity": 'I am "vp".', "reasoning": "High", "knowledge_cutoff": "2023-01", "date": "2020-01-01"}
    history = [Ancestor("text@main", "blake3:1", params={"frame": frame}), Ancestor("vp@main", "blake3:2")]
    text = rendered(template_text(frame_of(history)), [{"role": "user", "content": "x"}], **FRAME)
    assert text.startswith(
        '<|start|>system<|message|>I am "vp".\nKnowledge cutoff: 2023-01\nCurrent date: 2026-01-01\n'
    )
    assert "Reasoning: high" in text
    assert frame_of(history[1:]) is None


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "narrator", "content": "x"}], "narrator"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "first message"),
        ([{"role": "tool", "content": "x"}], "needs its name"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "only text"),
        ([{"role": "user", "content": 3}], "must be text"),
    ],
)
def test_what_harmony_cannot_say_is_refused(messages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        rendered(template_text(None), messages, **FRAME)
