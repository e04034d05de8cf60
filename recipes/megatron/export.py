"""An artifact as a checkpoint that Megatron-LM's own loader takes, with what was done to it written beside it.

Place in the path: layout, torch_dist, arguments, check -> **megatron** -> run, for `vpstore export --to`.

What is in the folder:
    release/                             the torch_dist checkpoint
    latest_checkpointed_iteration.txt    "release": a loader starts at step 0 and asks for no optimizer state
    arguments-stock.txt, arguments-public.txt
    PROVENANCE.json                      the artifact's digest, each tensor's before and after, the numeric check
    tokenizer/                           as in the artifact

Invariants: two exports of one artifact are equal byte for byte; two tensors are in memory at a time; nothing counts as
exported before its logits were compared.

Example:
    export("megatron", InputArtifact("source", "vpMoE@smoke", digest, view), folder, progress)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from blake3 import blake3
from torch import Tensor

from recipes.checkpoint import TOKENIZER_FILES, parse_student_config, require_shapes
from recipes.megatron.arguments import PUBLIC_FILE, STOCK_FILE, public_file, stock_file
from recipes.megatron.check import Agreement, agreement, require_agreement
from recipes.megatron.layout import SHARED_BIAS, Entry, entries, extra_states, folded, partner
from recipes.megatron.targets import FOLDING
from recipes.megatron.torch_dist import Folder, write_folder
from recipes.model.config import StudentConfig
from recipes.names import split_layer
from recipes.planned import PlannedTensor
from recipes.recipe import InputArtifact, Progress
from recipes.tensors import TensorReader, kept, raw_bytes
from vpstore.errors import RecipeRefused

FORMAT: Final = 1
RELEASE, TRACKER, PROVENANCE = "release", "latest_checkpointed_iteration.txt", "PROVENANCE.json"
_FOLD = (
    "experts.fc2_bias += shared_expert.fc2.bias / routed_scaling in float32, and the shared bias is 0: the public "
    "stack drops that bias; gates sum to routed_scaling, so the output is the same"
)


def export(target: str, source: InputArtifact, folder: Path, progress: Progress) -> None:
    """Write an artifact into an empty folder.

    Args:    target: of `targets.TARGETS`.
    Raises:  RecipeRefused: no student, a tensor that is not finite, a feature that Megatron cannot hold, or logits that
             differ.
    """
    config, reader = _student(source)
    _require_held(config, target)
    tensors = _Tensors(reader, config, folds=target == FOLDING)
    (folder / RELEASE).mkdir()
    after = write_folder(
        folder / RELEASE, tensors.planned(progress), states=extra_states(config), stacks=tensors.stacks()
    )
    found = agreement(Folder(folder / RELEASE).read, reader, config)
    require_agreement(found, where=f"{source.ref}, written for {target}")
    document = _provenance(target, source, config, found) | {"tensors": tensors.table(after)}
    texts = {
        PROVENANCE: json.dumps(document, indent=1, sort_keys=True) + "\n",
        TRACKER: RELEASE,
        STOCK_FILE: stock_file(config),
        PUBLIC_FILE: public_file(config, folds_shared_bias=target == FOLDING),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        (folder / "tokenizer" / name).write_bytes((source.path / name).read_bytes())


def _student(source: InputArtifact) -> tuple[StudentConfig, TensorReader]:
    absent = [name for name in ("config.json", *TOKENIZER_FILES) if not (source.path / name).is_file()]
    if absent:
        raise RecipeRefused(
            "only a student can be exported to Megatron",
            where=source.ref,
            expected="a checkpoint of the vp architecture with its tokenizer",
            found=f"an artifact without {', '.join(absent)}",
            next_step="name a stage of vpDense or vpMoE; vpstore ls lists them",
        )
    try:
        config = parse_student_config(source.json("config.json"))
    except RecipeRefused as error:
        error.where = f"{source.ref}, {error.where}"
        error.advise("only students can be exported to Megatron: name a stage of vpDense or vpMoE")
        raise
    reader = source.tensors()
    require_shapes([kept(reader, name) for name in reader.names()], config)
    return config, reader


def _require_held(config: StudentConfig, target: str) -> None:
    """Refuse what a stack has no place for, although a student's config can say it."""
    faults = []
    if config.rope_base != int(config.rope_base):
        faults.append(f"rope_base {config.rope_base}: --rotary-base takes whole numbers")
    if config.moe is not None and config.num_layers < 2:
        faults.append("experts in a model of one layer: the first is dense")
    if target == FOLDING and config.moe is not None and config.moe.routed_scaling <= 0:
        faults.append(
            f"routed_scaling {config.moe.routed_scaling}: a shared bias can be folded into gates above 0 only"
        )
    if faults:
        raise RecipeRefused(
            "this target cannot hold the student",
            where=target,
            expected="features that Megatron has flags for",
            found="; ".join(faults),
            next_step="export it as plain files, or train a student without that feature",
        )


class _Tensors:
    """A student's tensors on their way out, and their digests before."""

    def __init__(self, reader: TensorReader, config: StudentConfig, *, folds: bool) -> None:
        self._reader, self._config = reader, config
        self._entries = entries(config, folds_shared_bias=folds)
        self._before: dict[str, str] = {}  # of folded tensors; the others keep their bytes

    def stacks(self) -> list[str]:
        """Keys of what is written expert by expert."""
        return [entry.key for entry in self._entries if entry.is_stack]

    def planned(self, progress: Progress) -> list[PlannedTensor]:
        """Each to be computed when it is written."""

        def compute(number: int, entry: Entry) -> Tensor:
            progress("export", number, len(self._entries))
            return self._folded(entry) if entry.is_folded else self._reader.read(entry.name)

        return [
            PlannedTensor(entry.key, entry.dtype, entry.shape, lambda n=number, e=entry: compute(n, e))  # type: ignore[misc]
            for number, entry in enumerate(self._entries)
        ]

    def _folded(self, entry: Entry) -> Tensor:
        own, moe = self._reader.read(entry.name), self._config.moe
        self._before[entry.key] = f"blake3:{blake3(raw_bytes(own)).hexdigest()}"
        layer = split_layer(entry.name)
        if moe is None or (layer and layer[1] == SHARED_BIAS):
            return own.new_zeros(own.shape)
        return folded(own, self._reader.read(partner(entry.name)), moe)

    def table(self, after: Mapping[str, str]) -> list[dict[str, Any]]:
        """A row for each tensor, in the model's order."""
        return [
            {
                "key": entry.key,
                "name": entry.name,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "before": self._before.get(entry.key, after[entry.key]),
                "after": after[entry.key],
            }
            for entry in self._entries
        ]


def _provenance(target: str, source: InputArtifact, config: StudentConfig, found: Agreement) -> dict[str, Any]:
    is_folded = target == FOLDING and config.moe is not None
    return {
        "format": FORMAT,
        "target": target,
        "artifact": source.digest,
        "ref": source.ref,
        "config": config.model_dump(mode="json"),
        "changes": [_FOLD] if is_folded else [],
        "check": {
            "what": "logits of fixed tokens, as Megatron computes them from this folder and as load_student does",
            "relative": found.relative,
            "loss": found.loss_ours,
            "loss_megatron": found.loss_megatron,
        },
    }
