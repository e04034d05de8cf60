"""Measure one checkpoint, donor or student: bits per byte of held-out prose, numbers, routers.

Place in the path: config -> **recipe**; a report without tensors. Bits per byte compare across tokenizers, because the
same bytes are read by each: documents are chosen and cut by bytes, never by tokens.

Invariants: every document has fresh context; its first token counts, predicted from the document separator
`<|endoftext|>`; padding ids are not part of any softmax; the only gate is finiteness.

Example:
    stage reports@vpDense, inputs checkpoint = vpDense@wake-up, data = healing_text, tokenizer = o200k-harmony
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes import runtime
from recipes.checkpoint import (
    STUDENT_MODEL_TYPE,
    load_donor,
    load_student,
    parse_donor_config,
    parse_student_config,
)
from recipes.data.encodings import O200K_HARMONY
from recipes.data.harmony import HarmonyTokenizer
from recipes.data.rows import PROSE_COLUMNS, JsonLines
from recipes.data.vocabulary import encode_with, read_vocabulary
from recipes.model.donor import Donor
from recipes.model.health import added_counts, health_rows, router_health
from recipes.model.routing import Routing
from recipes.model.transformer import Student
from recipes.params.evaluate import Params
from recipes.recipe import Context, Gate, InputArtifact, Report, RunResult
from recipes.train.losses import VALID_VOCAB
from recipes.train.numeric import NumberTable, number_table
from recipes.train.scoring import Reader, score_documents
from vpstore.errors import RecipeRefused

HELD_OUT = "heldout.jsonl"
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Ids:
    """How a checkpoint's ids are made and read."""

    encode: Callable[[str], list[int]]
    separator: int
    valid_vocab: int


def run(context: Context) -> RunResult:
    """Read the held-out prose, ask the numbers.

    Raises:  RecipeRefused: a checkpoint of an unknown kind, or no held-out prose.
    """
    params: Params = context.params
    checkpoint = context.inputs["checkpoint"]
    model, ids = _load(checkpoint, context.inputs["tokenizer"])
    reader = Reader(model, ids.valid_vocab, params.chunk)
    listener = RoutingListener(model) if isinstance(model, Student) else None
    texts = held_out_texts(context.inputs["data"].path / HELD_OUT, params)
    documents = [ids.encode(text) for text in texts]
    prose_reader = reader if listener is None else replace(reader, model=listener)
    figures, rows = prose_figures(prose_reader, texts, documents, separator=ids.separator)
    numbers = number_table(reader, ids.encode, separator=ids.separator, stride=params.three_digit_stride)
    router = [] if listener is None else listener.rows()
    return RunResult(files=(), report=_report(model, figures, rows=rows, numbers=numbers, router=router))


def _load(checkpoint: InputArtifact, tokenizer: InputArtifact) -> tuple[Donor | Student, Ids]:
    document = checkpoint.json("config.json")
    device = runtime.device()
    if document.get("model_type") == STUDENT_MODEL_TYPE:
        student = load_student(checkpoint.tensors(), parse_student_config(document), device=device)
        return student, _ids(checkpoint, tokenizer, student.config.vocab_size)
    donor = load_donor(checkpoint.tensors(), parse_donor_config(document), device=device)
    return donor, _ids(checkpoint, tokenizer, donor.config.vocab_size)


def _ids(checkpoint: InputArtifact, tokenizer: InputArtifact, vocab_size: int) -> Ids:
    if vocab_size == O200K_HARMONY.n_vocab:
        encode = HarmonyTokenizer.from_directory(tokenizer.path).encode
        return Ids(encode, O200K_HARMONY.special[SEPARATOR], VALID_VOCAB)
    own = checkpoint.path / "tokenizer.json"
    vocabulary = read_vocabulary(own)
    if SEPARATOR not in vocabulary.special or len(vocabulary.tokens) > vocab_size:
        raise RecipeRefused(
            "a checkpoint's tokenizer does not fit its model",
            where=f"{checkpoint.ref}: tokenizer.json",
            expected=f"{SEPARATOR} and at most {vocab_size} ids",
            found=f"{len(vocabulary.tokens)} ids",
            next_step="import the donor's own tokenizer.json with it",
        )
    return Ids(encode_with(own), vocabulary.special[SEPARATOR], len(vocabulary.tokens))


def held_out_texts(path: Path, params: Params) -> list[str]:
    """Documents in file order, each cut to `max_bytes_per_document`, until `total_bytes` are reached.

    Raises:  RecipeRefused: no text at all, or a malformed row.
    """
    texts: list[str] = []
    size = 0
    with JsonLines(path, PROSE_COLUMNS) as file:
        for _, row in file.rows():
            text = cut_bytes(row["text"], min(params.max_bytes_per_document, params.total_bytes - size))
            if text:
                texts.append(text)
                size += len(text.encode())
            if size >= params.total_bytes:
                break
    if not texts:
        raise RecipeRefused(
            "there is no held-out prose",
            where=path.name,
            expected="at least one document with text",
            next_step="raise the held-out share of the data set",
        )
    return texts


def cut_bytes(text: str, limit: int) -> str:
    """The longest beginning of `text` with at most `limit` bytes of UTF-8 that ends between two characters."""
    return text.encode()[:limit].decode("utf-8", errors="ignore")


def prose_figures(
    reader: Reader, texts: Sequence[str], documents: Sequence[Sequence[int]], *, separator: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures over all documents, and one row a document.

    Args:    documents: ids of the texts.
    """
    rows: list[dict[str, Any]] = []
    scores = score_documents(reader, documents, separator=separator, is_packed=runtime.device() != "cpu")
    for number, (text, ids, nll_N) in enumerate(zip(texts, documents, scores, strict=True)):
        nats = float(nll_N.double().sum())
        rows.append({"document": number, "bytes": len(text.encode()), "tokens": len(ids), "nats": nats})
    total = {key: sum(row[key] for row in rows) for key in ("bytes", "tokens")}
    total["nats"] = math.fsum(row["nats"] for row in rows)
    figures = {
        "bits_per_byte": total["nats"] / math.log(2) / total["bytes"],
        "nats_per_token": total["nats"] / total["tokens"],
        "bytes": total["bytes"],
        "tokens": total["tokens"],
        "documents": len(rows),
    }
    return figures, rows


class RoutingListener:
    """A student as a language model that keeps what its routers did."""

    def __init__(self, student: Student) -> None:
        self._student = student
        self._passes: list[Mapping[int, Routing]] = []

    @property
    def head_weight(self) -> Tensor:
        """[V, H]."""
        return self._student.head_weight

    def forward_hidden(self, ids_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """As the student's own."""
        hidden_BTH, state = self._student.hidden_and_state(ids_BT, documents_BT, collect=True)
        self._passes.append(state.routing)
        return hidden_BTH

    def rows(self) -> list[dict[str, Any]]:
        """Router health of each layer over all passes; [] for a dense model."""
        if self._student.config.moe is None:
            return []
        return health_rows(router_health(self._student, added_counts(self._passes)))


def _report(
    model: Donor | Student,
    figures: dict[str, float],
    *,
    rows: list[dict[str, Any]],
    numbers: NumberTable,
    router: list[dict[str, Any]],
) -> Report:
    is_finite = all(math.isfinite(row["nats"]) for row in rows) and all(
        bool(torch.isfinite(weight).all()) for weight in model.state_dict().values()
    )
    measured = {**figures, **{f"numeric_{name}": value for name, value in numbers.figures().items()}}
    metrics: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in measured.items()}
    metrics["finite"] = is_finite
    plots: dict[str, Any] = {"documents": rows, "numeric": numbers.rows} if is_finite else {}
    if router:
        plots["router"] = router
        metrics["router_max_load_percent"] = max(row["max_load_percent"] for row in router)
        metrics["router_max_dead_percent"] = max(row["dead_percent"] for row in router)
    return Report(metrics, (Gate("finite", float(is_finite), "==", 1.0),), plots)
