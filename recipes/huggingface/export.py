"""An artifact as a folder that Hugging Face's libraries open, with all that a stranger needs beside the weights.

Place in the path: documents, template, card, history -> **huggingface** -> run, for `vpstore export --to hf`.

What is in the folder:
    the artifact's files                 bytes and paths as they are, artifact.json too; but for these two:
    config.json, tokenizer_config.json   in the library's names, with the special ids and the longest row
    modeling_vpmoe.py                    of a student: the architecture, in one file that needs torch and transformers
    generation_config.json               where `generate` stops
    chat_template.jinja                  Harmony, if the tokenizer has its tokens
    README.md, LICENSE, licenses/        the model card, and the licences of all that went in

Invariants: two exports of one artifact are equal byte for byte; each file that is taken over is held against its digest
while it is copied; weights are never read into memory.

Example:
    export(InputArtifact("source", "vpMoE@smoke", digest, view), history, root=Path("."), folder=folder)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from recipes.checkpoint import (
    DONOR_ARCHITECTURE,
    STUDENT_ARCHITECTURE,
    expected_tensors,
    parse_donor_config,
    parse_student_config,
    require_shapes,
)
from recipes.huggingface.card import Subject, card
from recipes.huggingface.documents import (
    MODELING,
    donor_document,
    generation_document,
    student_document,
    tokenizer_document,
)
from recipes.huggingface.families import Family, family_of
from recipes.huggingface.history import PROVENANCES, Ancestor, licence_files, provenances, sources_of
from recipes.huggingface.template import TEMPLATE_FILE, frame_of, template_text
from recipes.names import EMBEDDING
from recipes.recipe import InputArtifact, Progress
from recipes.tensors import kept
from vpstore.errors import DigestMismatch, RecipeRefused

MANIFEST_FILE: Final = "artifact.json"
_CHUNK: Final = 1 << 22


def export(source: InputArtifact, history: Sequence[Ancestor], *, root: Path, folder: Path, progress: Progress) -> None:
    """Write an artifact into an empty folder.

    Args:    history: its lineage, parents first, itself last. root: of the repository, for licences and provenance.
    Raises:  RecipeRefused: no causal language model, a tokenizer of another family, or a licence that is not known;
             DigestMismatch: a file is not what the manifest says.
    """
    family, config, parameters = _checked(source)
    outside = sources_of(history, provenances(root / PROVENANCES))
    made = _documents(source, config, family)
    if family.is_harmony:
        made[TEMPLATE_FILE] = template_text(frame_of(history))
    subject = Subject(source.ref, source.digest, config, _optional(source, "reports/metrics.json"), family, parameters)
    made["README.md"] = card(subject, history, outside)
    copied = licence_files([one for _, _, one in outside], root=root)
    if "auto_map" in config:
        copied[f"{MODELING}.py"] = Path(__file__).parent / f"{MODELING}.py"
    _take_over(source, folder, but=set(made) | set(copied), progress=progress)
    for name, path in copied.items():
        _write(folder / name, path.read_bytes())
    for name, text in made.items():
        _write(folder / name, text.encode())


def _checked(source: InputArtifact) -> tuple[Family, dict[str, Any], int]:
    """The tokenizer's family, config.json for the library, and the number of parameters."""
    absent = [name for name in ("config.json", "tokenizer.json") if not (source.path / name).is_file()]
    document = {} if absent else source.json("config.json")
    kinds = document.get("architectures") if isinstance(document, dict) else None
    if absent or kinds not in ([STUDENT_ARCHITECTURE], [DONOR_ARCHITECTURE]):
        raise RecipeRefused(
            "only a model can be exported for Hugging Face",
            where=source.ref,
            expected=f"a checkpoint of {STUDENT_ARCHITECTURE} or {DONOR_ARCHITECTURE} with its tokenizer",
            found=f"an artifact without {', '.join(absent)}" if absent else f"architectures {kinds}",
            next_step="name a model: vpstore ls lists what is built",
        )
    family = family_of(source.json("tokenizer.json"), where=source.ref)
    reader = source.tensors()
    if kinds == [DONOR_ARCHITECTURE]:
        donor = parse_donor_config(document)
        _require_vocabulary(source, family, donor.vocab_size)
        shapes = [reader.spec(name)[1] for name in reader.names()]
        return family, donor_document(document, family), sum(map(prod, shapes))
    student = parse_student_config(document)
    _require_vocabulary(source, family, student.vocab_size)
    require_shapes([kept(reader, name) for name in reader.names()], student)
    parameters = sum(prod(shape) for _, shape in expected_tensors(student).values())
    return family, student_document(student, family), parameters


def _require_vocabulary(source: InputArtifact, family: Family, rows: int) -> None:
    if rows < family.spec.n_vocab:
        raise RecipeRefused(
            "the tokenizer has ids that the model has no rows for",
            where=f"{source.ref}: {EMBEDDING}",
            expected=f"at least {family.spec.n_vocab} rows, for {family.spec.name}",
            found=str(rows),
            next_step="the artifact has another model's tokenizer: build it again",
        )


def _documents(source: InputArtifact, config: Mapping[str, Any], family: Family) -> dict[str, str]:
    """The JSON files that the library reads, by name."""
    own = _optional(source, "tokenizer_config.json")
    documents = {
        "config.json": config,
        "generation_config.json": generation_document(_optional(source, "config.json"), family),
        "tokenizer_config.json": tokenizer_document(own, config, family),
    }
    if (source.path / "generation_config.json").is_file():  # a donor's own stays
        del documents["generation_config.json"]
    return {
        name: json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        for name, value in documents.items()
    }


def _take_over(source: InputArtifact, folder: Path, *, but: set[str], progress: Progress) -> None:
    """Copy the artifact's files, each held against the manifest, and the manifest against the artifact's digest."""
    digests = {MANIFEST_FILE: source.digest}
    digests |= {file["path"]: file["digest"] for file in source.json(MANIFEST_FILE)["files"]}
    names = sorted(digests.keys() - but)
    for number, name in enumerate(names):
        progress("export", number, len(names))
        found = _copy(source.path / name, folder / name)
        if found != digests[name]:
            raise DigestMismatch(
                "a file of the artifact is not what its manifest says",
                where=f"{source.ref}, {name}",
                expected=digests[name],
                found=found,
                next_step=f"vpstore verify {source.ref} lists all damage",
            )
    progress("export", len(names), len(names))


def _copy(path: Path, target: Path) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = blake3()
    with path.open("rb") as read, target.open("xb") as out:
        while chunk := read.read(_CHUNK):
            digest.update(chunk)
            out.write(chunk)
    return f"blake3:{digest.hexdigest()}"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _optional(source: InputArtifact, name: str) -> dict[str, Any]:
    """A JSON object of the artifact, empty where there is none."""
    return dict(source.json(name)) if (source.path / name).is_file() else {}
