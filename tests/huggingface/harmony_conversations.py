"""Random conversations as chat templates take them, and the same ones as openai-harmony does."""

from __future__ import annotations

import json
import random
from typing import Any

from openai_harmony import (
    Author,
    Conversation,
    DeveloperContent,
    Message,
    ReasoningEffort,
    Role,
    SystemContent,
    ToolDescription,
)

_WORDS = [
    "alpha", "Beta gamma", "naïve é", "日本語", "x = 1;", "a\nb", "tail\n", " lead", "tab\there", "\"q\" 'z'",
    "<b>&amp;", "{{ x }}", "-3.5e2", ".", "two\r\nlines\n", "null or not", "// c", "]}", "default: 1",
]  # fmt: skip
_KINDS = [
    "string", "string", "number", "integer", "boolean", "array", "object", "enum", "types", "oneOf", "none", "odd",
]  # fmt: skip
_NAMES = ["city", "units", "max_items", "q", "filter", "when", "items", "values"]


class Drawer:
    """Draws conversations; the same seed draws the same ones."""

    def __init__(self, seed: int) -> None:
        self.r = random.Random(seed)

    def maybe(self, share: float) -> bool:
        return self.r.random() < share

    def text(self, most: int = 4) -> str:
        return " ".join(self.r.choice(_WORDS) for _ in range(self.r.randint(1, most)))

    def name(self) -> str:
        return self.r.choice(_NAMES) + str(self.r.randint(0, 9))

    def schema(self, depth: int = 0) -> dict[str, Any]:
        kind = self.r.choice(_KINDS)
        found: dict[str, Any] = {}
        if kind in ("string", "number", "integer", "boolean", "array"):
            found = {"type": kind}
        if kind == "array" and self.maybe(0.7):
            found["items"] = self.schema(depth + 1) if depth < 3 else {"type": "string"}
        elif kind == "object" and depth < 3:
            found = self.object(depth + 1)
        elif kind == "enum":
            found = {"type": "string", "enum": self.r.choice([["a", "b"], ["one"], [], [1, 2], ["x", 3]])}
        elif kind == "types":
            found = {"type": self.r.choice([["string", "null"], ["integer", "string"], [], ["number"], [1]])}
        elif kind == "oneOf" and depth < 3:
            found = {"oneOf": [self.schema(depth + 1) for _ in range(self.r.randint(0, 3))]}
        elif kind == "odd":
            found = {"type": self.r.choice(["null", "weird"])}
        for key, share, value in (
            ("description", 0.4, self.text(2)),
            ("title", 0.2, self.text(1)),
            ("nullable", 0.2, self.maybe(0.7)),
            ("examples", 0.2, self.r.choice([[], ["a", "b"], ["a", 3], [1]])),
            ("default", 0.3, self.r.choice(["a", 'x"y', 1, 2.5, True, None, [1, "a"], {"k": "v", "l": []}, -1])),
        ):
            if self.maybe(share):
                found[key] = value
        return found

    def object(self, depth: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "object"}
        if self.maybe(0.95):
            found["properties"] = {self.name(): self.schema(depth) for _ in range(self.r.randint(0, 4))}
        if self.maybe(0.7):
            found["required"] = [key for key in found.get("properties", {}) if self.maybe(0.5)]
        if self.maybe(0.3):
            found["description"] = self.text(2)
        return found

    def tools(self) -> list[dict[str, Any]]:
        found = []
        for _ in range(self.r.randint(1, 4)):
            said = self.r.choice([self.text(3), "line one\nline two", "", "crlf\r\nx\r"])
            function: dict[str, Any] = {"name": self.name(), "description": said}
            if self.maybe(0.85):
                function["parameters"] = self.object()
            found.append({"type": "function", "function": function})
        return found

    def calls(self, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """An assistant's message with calls, and what the tools answer."""
        calls = []
        for _ in range(self.r.randint(1, 2)):
            arguments = self.r.choice([{"a": 1, "b": 'é"'}, '{"raw": true}', {}])
            function = {"name": self.r.choice(tools)["function"]["name"], "arguments": arguments}
            calls.append({"type": "function", "id": f"c{self.r.randint(0, 999)}", "function": function})
        said: dict[str, Any] = {"role": "assistant", "content": self.r.choice([None, self.text()]), "tool_calls": calls}
        if self.maybe(0.7):
            said["thinking"] = self.text(5)
        answers: list[dict[str, Any]] = []
        for call in calls:
            by_name = {"name": call["function"]["name"]} if self.maybe(0.5) else {"tool_call_id": call["id"]}
            answers.append({"role": "tool", **by_name, "content": self.text()})
        return [said, *answers]

    def messages(self, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.maybe(0.6):
            found.append({"role": self.r.choice(["system", "developer"]), "content": self.text()})
        for _ in range(self.r.randint(1, 4)):
            parts = [{"type": "text", "text": self.text()}, {"type": "text", "text": self.text()}]
            found.append({"role": "user", "content": self.text(6) if self.maybe(0.8) else parts})
            for _ in range(self.r.randint(0, 2) if tools else 0):
                found += self.calls(tools or [])
            answer: dict[str, Any] = {"role": "assistant", "content": self.text(6)}
            if self.maybe(0.7):
                answer[self.r.choice(["thinking", "reasoning_content"])] = self.text(5)
            found.append(answer)
        return found[:-1] if self.maybe(0.3) else found

    def frame(self) -> dict[str, str]:
        effort = self.r.choice(["low", "medium", "high"])
        said = {"model_identity": self.text(2), "reasoning_effort": effort}
        return {**said, "current_date": "2026-01-01", "knowledge_cutoff": "2024-06"}


def _plain(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _say(role: Role, text: str, channel: str) -> Message:
    return Message.from_role_and_content(role, text).with_channel(channel)


def _assistant(message: dict[str, Any]) -> list[Message]:
    found = []
    if thought := message.get("thinking") or message.get("reasoning_content"):
        found.append(_say(Role.ASSISTANT, thought, "analysis"))
    if not message.get("tool_calls"):
        return [*found, _say(Role.ASSISTANT, message["content"], "final")]
    if message["content"]:
        found.append(_say(Role.ASSISTANT, message["content"], "commentary"))
    for call in message["tool_calls"]:
        given = call["function"]["arguments"]
        said = _say(
            Role.ASSISTANT, given if isinstance(given, str) else json.dumps(given, ensure_ascii=False), "commentary"
        )
        recipient = "functions." + call["function"]["name"]
        found.append(said.with_recipient(recipient).with_content_type("<|constrain|>json"))
    return found


def harmony(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, frame: dict[str, str]) -> Conversation:
    """The same conversation for openai-harmony."""
    system = (
        SystemContent.new()
        .with_model_identity(frame["model_identity"])
        .with_reasoning_effort(ReasoningEffort(frame["reasoning_effort"].capitalize()))
        .with_conversation_start_date(frame["current_date"])
        .with_knowledge_cutoff(frame["knowledge_cutoff"])
        .with_required_channels(["analysis", "commentary", "final"])
    )
    found = [Message.from_role_and_content(Role.SYSTEM, system)]
    developer = DeveloperContent.new()
    has_instructions = messages[0]["role"] in ("system", "developer")
    if has_instructions:
        developer = developer.with_instructions(_plain(messages[0]["content"]))
        messages = messages[1:]
    if tools:
        described = [tool["function"] for tool in tools]
        developer = developer.with_function_tools(
            [
                ToolDescription.new(one["name"], one["description"], parameters=one.get("parameters"))
                for one in described
            ]
        )
    if has_instructions or tools:
        found.append(Message.from_role_and_content(Role.DEVELOPER, developer))
    names = {call["id"]: call["function"]["name"] for one in messages for call in one.get("tool_calls", ())}
    for message in messages:
        if message["role"] == "user":
            found.append(Message.from_role_and_content(Role.USER, _plain(message["content"])))
        elif message["role"] == "assistant":
            found += _assistant(message)
            # An id that comes twice means the latest call that had it.
            names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())}
        else:
            author = Author.new(Role.TOOL, "functions." + (message.get("name") or names[message["tool_call_id"]]))
            said = Message.from_author_and_content(author, message["content"])
            found.append(said.with_recipient("assistant").with_channel("commentary"))
    return Conversation.from_messages(found)
