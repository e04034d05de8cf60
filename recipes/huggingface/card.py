"""The model card of an export, README.md: made from manifests and measured figures, so that nothing in it is claimed.

Place in the path: history, documents -> **huggingface** -> export. Pure.

Invariants: equal artifacts give equal cards; no date, host, path or version of a package; a gate is shown with its
verdict, also one that could not be measured.

Example:
    text = card(Subject("vpMoE@smoke", digest, config, metrics, HARMONY), history, sources)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from recipes.huggingface.families import Family
from recipes.huggingface.history import Ancestor, Source
from recipes.huggingface.template import frame_of

_SPDX: Final = {"Apache-2.0": "apache-2.0", "MIT": "mit"}  # as Hugging Face's cards spell them
_HEADINGS: Final = ("What it is", "Use", "How it was made", "Figures", "Data and licences", "Verify")
_SHOWN: Final = (
    "attention", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "sliding_window", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "shared_expert_intermediate_size", "vocab_size", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What a card is about."""

    ref: str
    artifact: str  # digest
    config: Mapping[str, Any]  # config.json of the export
    metrics: Mapping[str, Any]  # reports/metrics.json
    family: Family
    parameters: int

    @property
    def is_student(self) -> bool:
        """Whether it needs the modelling file."""
        return "auto_map" in self.config


def card(subject: Subject, history: Sequence[Ancestor], sources: Sequence[tuple[str, str, Source]]) -> str:
    """README.md, with the block of fields that Hugging Face reads at its head."""
    bodies = (
        _what(subject),
        _use(subject, history),
        _made(history),
        _figures(subject),
        _data(sources),
        _verify(subject),
    )
    parts = [_head(subject, sources), f"# {subject.ref}"]
    for heading, body in zip(_HEADINGS, bodies, strict=True):
        parts += [f"## {heading}", "\n".join(body)]
    return "\n\n".join(parts) + "\n"


def _head(subject: Subject, sources: Sequence[tuple[str, str, Source]]) -> str:
    donors = [source for _, role, source in sources if role == "donor"]
    licences = sorted({_SPDX.get(source.license, "other") for source in donors}) or ["other"]
    hub = [source.origin.rpartition(" ")[2] for source in donors if source.origin.startswith("Hugging Face ")]
    lines = [
        "---",
        f"license: {licences[0] if len(licences) == 1 else 'other'}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *(["base_model:", *(f"- {name}" for name in dict.fromkeys(hub))] if hub else []),
        "tags:",
        *(["- custom_code"] if subject.is_student else []),
        "- vpstore",
        "---",
    ]
    return "\n".join(lines)


def _what(subject: Subject) -> Iterator[str]:
    yield f"Artifact `{subject.artifact}` of vpstore, a checkpoint with {subject.parameters:,} parameters."
    yield ""
    yield "| | |"
    yield "|---|---|"
    for key in _SHOWN:
        if subject.config.get(key) is not None:
            yield f"| {key} | {subject.config[key]} |"
    yield f"| tokenizer | {subject.family.spec.name} |"


def _use(subject: Subject, history: Sequence[Ancestor]) -> Iterator[str]:
    more = ", trust_remote_code=True" if subject.is_student else ""
    yield "```python"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield f'tokenizer = AutoTokenizer.from_pretrained("DIR"{more})'
    yield f'model = AutoModelForCausalLM.from_pretrained("DIR"{more})'
    yield "```"
    yield ""
    if not subject.family.is_harmony:
        yield "There is no chat template: this tokenizer has no Harmony tokens, and the donor's folder brings none."
        return
    yield "`tokenizer.apply_chat_template` renders Harmony as openai-harmony does: tools, analysis and answers."
    yield "Text of users may spell special tokens: `tokenizer(text, split_special_tokens=True)` reads it as text."
    frame = frame_of(history)
    if frame is not None:
        yield f"All its conversations had this frame: `{frame['model_identity']}`, reasoning {frame['reasoning']},"
        yield f"knowledge cutoff {frame['knowledge_cutoff']}, date {frame['date']}, and the instructions"
        yield f"`{frame['instructions']}`, which the template does not add by itself."


def _made(history: Sequence[Ancestor]) -> Iterator[str]:
    names = {ancestor.artifact: ancestor.ref for ancestor in history}
    yield "By these recipes from these parents; each digest covers its own parents, code, parameters and tokenizer."
    yield ""
    yield "| artifact | digest | recipe | parents |"
    yield "|---|---|---|---|"
    for ancestor in history:
        parents = ", ".join(f"{role} `{names.get(digest, digest)}`" for role, digest in ancestor.inputs)
        recipe = f"`{ancestor.recipe}`" if ancestor.recipe else "its manifest is not in the store"
        yield f"| `{ancestor.ref}` | `{ancestor.artifact}` | {recipe} | {parents or 'none'} |"


def _figures(subject: Subject) -> Iterator[str]:
    gates = subject.metrics.get("gates", {})
    others = {key: value for key, value in subject.metrics.items() if key != "gates"}
    if gates:
        yield "Gates; an artifact with a missed one is not published."
        yield ""
        yield "| gate | value | wanted | verdict |"
        yield "|---|---:|---|---|"
        for name, gate in sorted(gates.items()):
            value = "" if gate["value"] is None else f"{gate['value']:.6g}"
            why = f": {gate['reason']}" if gate.get("reason") else ""
            yield f"| {name} | {value} | {gate['relation']} {gate['threshold']:.6g} | {gate['verdict']}{why} |"
        yield ""
    flat = dict(_flat("", others))
    if flat:
        yield "| figure | value |"
        yield "|---|---:|"
        for name, value in flat.items():
            yield f"| {name} | {value:.6g} |" if isinstance(value, float) else f"| {name} | {value} |"
    if not gates and not flat:
        yield "None were measured when it was made."


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in sorted(values.items()):
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{key}.", value)
        elif isinstance(value, (int, float, str)):
            yield f"{prefix}{key}", value


def _data(sources: Sequence[tuple[str, str, Source]]) -> Iterator[str]:
    yield "| from outside | used by | as | revision | licence |"
    yield "|---|---|---|---|---|"
    for ref, role, source in sources:
        yield f"| {source.name}: {source.origin} | `{ref}` | {role} | `{source.revision}` | {source.license} |"
    yield ""
    yield "The texts of the licences lie in `licenses/`; `LICENSE` is that of the project and of the files it adds."


def _verify(subject: Subject) -> Iterator[str]:
    yield "In a checkout of the project:"
    yield ""
    yield "```"
    yield "vpstore export --check DIR     # every file against its record, and against a fresh export of the artifact"
    yield f"vpstore audit {subject.ref}    # the artifact, back to the donors"
    yield "```"
    yield ""
    yield "Without it: `b3sum` of each weight file is the `digest` that `artifact.json` names; `b3sum artifact.json` is"
    yield f"`{subject.artifact.removeprefix('blake3:')}`."
