"""The chat template of an export, with the frame of the conversations that the model was trained on as its defaults.

Place in the path: history -> **huggingface** -> card, export. Pure but for the template's own file beside this one.

Invariants: what it renders is what openai-harmony renders, token for token; tests hold it on generated conversations.

Example:
    template_text(frame_of(history))
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from recipes.huggingface.history import Ancestor

TEMPLATE_FILE: Final = "chat_template.jinja"
# openai-harmony's own defaults, for a model that has seen no conversation.
_DEFAULTS: Final = {
    "model_identity": "You are ChatGPT, a large language model trained by OpenAI.",
    "reasoning": "Medium",
    "knowledge_cutoff": "2024-06",
}


def frame_of(history: Sequence[Ancestor]) -> Mapping[str, Any] | None:
    """What stood before the user's words in the data that a lineage was trained on last; None: there was none."""
    frames = [ancestor.params["frame"] for ancestor in history if "frame" in ancestor.params]
    return frames[-1] if frames else None


def template_text(frame: Mapping[str, Any] | None) -> str:
    """The template for a frame."""
    values = _DEFAULTS if frame is None else frame
    text = (Path(__file__).parent / TEMPLATE_FILE).read_text(encoding="utf-8")
    for key in ("model_identity", "knowledge_cutoff"):
        text = text.replace(f'"@{key.upper()}@"', json.dumps(values[key], ensure_ascii=False))
    return text.replace("@REASONING@", str(values["reasoning"]).lower())
