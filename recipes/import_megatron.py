"""A checkpoint of Megatron, taken back as a student: names, shapes and finiteness checked, and logits compared.

Place in the path: sources `checkpoint/<file>`, a torch_dist folder held against its pinned SHA-256, and the artifact
that was exported -> **import_megatron** -> whatever is made of a student.

Invariants: a tensor that Megatron did not change is the parent's bit for bit, also one that was folded on the way out;
the others are rounded to the dtype that a student's tensor has on disk; an optimizer's state is passed over, and
counted.

Example:
    stage vpMoE@stage1, recipe recipes.import_megatron, inputs parent = vpMoE@smoke,
    sources checkpoint = configs/upcycle/provenance/stage1-weights.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from recipes.checkpoint import TOKENIZER_FILES, parse_student_config
from recipes.megatron.check import MOST_RELATIVE, agreement, loss_of, own_logits
from recipes.megatron.layout import EXPERT_BIAS, SHARED_BIAS, Entry, entries, folded, megatron_key
from recipes.megatron.torch_dist import Folder
from recipes.model.config import StudentConfig
from recipes.names import layer_tensor
from recipes.params.import_megatron import Params
from recipes.planned import PlannedTensor
from recipes.recipe import Context, Gate, InputArtifact, Plan, Report, copy_file
from recipes.tensors import DTYPE_NAMES, TORCH_DTYPES, TensorReader, planned
from vpstore.errors import RecipeRefused

_ROLE = "checkpoint/"
# What a training saves beside the weights.
_NO_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state", "opt_param_scheduler", "common_state", "num_")
_WIDE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHOWN_FAULTS = 8
_KEPT_FILES = ("config.json", *TOKENIZER_FILES)


def plan(context: Context) -> Plan:
    """The student's tensors, each from its key of the checkpoint, and the parent's files.

    Raises:  RecipeRefused: no torch_dist folder of such a student; all faults of names and shapes in one message.
    """
    checkpoint = _Checkpoint(context)
    return Plan(
        tensors=[checkpoint.planned(entry) for entry in checkpoint.entries],
        files=[copy_file(name, checkpoint.parent.path / name, "application/json") for name in _KEPT_FILES],
    )


def check(context: Context, reader: TensorReader) -> Report:
    """Logits of Megatron's side against the student's, the loss against the parent's, and what has changed."""
    params: Params = context.params
    checkpoint = _Checkpoint(context)
    found = agreement(checkpoint.as_stored, reader, checkpoint.config)
    rise = found.loss_ours - loss_of(own_logits(checkpoint.source, checkpoint.config))
    names = [entry.name for entry in checkpoint.entries]
    unchanged = sum(torch.equal(reader.read(name), checkpoint.source.read(name)) for name in names)
    metrics = {
        "tensors": len(names),
        "unchanged": unchanged,
        "ignored": checkpoint.ignored,
        "logits_relative": found.relative,
        "loss": found.loss_ours,
        "loss_megatron": found.loss_megatron,
    }
    gates = [
        Gate("logits_relative", found.relative, "<=", MOST_RELATIVE),
        Gate("loss_rise", rise, "<=", params.max_loss_rise),
    ]
    return Report({"import_megatron": metrics}, gates)


class _Checkpoint:
    """A checkpoint that was seen to hold such a student as its parent is."""

    def __init__(self, context: Context) -> None:
        self.parent: InputArtifact = context.inputs["parent"]
        self.config: StudentConfig = parse_student_config(self.parent.json("config.json"))
        self.source: TensorReader = self.parent.tensors()
        self.entries: list[Entry] = entries(self.config)
        self._by_key = {entry.key: entry for entry in self.entries}
        self._folder = _folder(context.sources)
        found = self._folder.tensors()
        weights = {key: spec for key, spec in found.items() if not key.startswith(_NO_WEIGHTS)}
        self.ignored = len(found) - len(weights)  # tensors of an optimizer, most often
        _refuse_other_weights(self.entries, weights, self.config)
        self._restored = {name for number in self._folds() for name in self._unfolded(number)}

    def planned(self, entry: Entry) -> PlannedTensor:
        """A tensor of the student, read when it is written."""
        if entry.name in self._restored:
            return planned(entry.name, entry.shape, entry.dtype, lambda: self.source.read(entry.name))
        return planned(entry.name, entry.shape, entry.dtype, lambda: self._folder.read(entry.key))

    def as_stored(self, key: str) -> Tensor:
        """What Megatron has under a key, rounded as the student is; a fold stays in float32, as it was written."""
        entry, value = self._by_key[key], self._folder.read(key)
        return value.float() if entry.name in self._restored else value.to(TORCH_DTYPES[entry.dtype])

    def _folds(self) -> list[int]:
        layers = range(1, self.config.num_layers + 1)
        return [number for number in layers if self.config.is_moe(number)]

    def _unfolded(self, number: int) -> set[str]:
        """The two biases of a layer, if they are what folding the parent's gives, and nothing was learned since."""
        names = layer_tensor(number, EXPERT_BIAS), layer_tensor(number, SHARED_BIAS)
        bias, shared = (self._folder.read(megatron_key(name)) for name in names)
        own, own_shared = (self.source.read(name) for name in names)
        assert self.config.moe is not None
        is_fold = not shared.any() and torch.equal(bias, folded(own, own_shared, self.config.moe).to(bias.dtype))
        # Where the parent's shared bias is 0, folding changes nothing, and the tensors are the parent's anyway.
        return set(names) if is_fold else set()


def _folder(sources: Mapping[str, Path]) -> Folder:
    """The torch_dist folder that the sources are, and nothing that is not among them."""
    files = {name.removeprefix(_ROLE): path for name, path in sources.items() if name.startswith(_ROLE)}
    folders = {path.parent for path in files.values()}
    if len(folders) != 1 or any("/" in name for name in files):
        raise RecipeRefused(
            "the sources are not the files of one torch_dist folder",
            where="source role checkpoint",
            expected="the folder of one iteration, release/ or iter_0000005/, and not the one above it",
            found=", ".join(sorted(files)[:_SHOWN_FAULTS]) or "no file",
            next_step="vpstore import --pin OBJECT FOLDER pins the files of a folder",
        )
    folder = Folder(folders.pop())
    strangers = sorted(folder.data_files() - files.keys())
    if strangers:
        raise RecipeRefused(
            "the index of a checkpoint names files that are not pinned",
            where="source role checkpoint",
            expected="data files beside the index, each with its SHA-256",
            found=", ".join(strangers[:_SHOWN_FAULTS]),
            next_step="copy the whole folder, and pin it again: vpstore import --pin OBJECT FOLDER",
        )
    return folder


def _refuse_other_weights(
    wanted: list[Entry], found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], config: StudentConfig
) -> None:
    faults = [f"{key}: extra" for key in sorted(found.keys() - {entry.key for entry in wanted})]
    for entry in wanted:
        if entry.key not in found:
            faults.append(f"{entry.key}: missing")
            continue
        dtype, shape = found[entry.key]
        if dtype not in _WIDE:
            faults.append(f"{entry.key}: {DTYPE_NAMES.get(dtype, dtype)}, no floating-point weights")
        if shape != entry.shape:
            faults.append(f"{entry.key}: {list(shape)}, not {list(entry.shape)}{_hint(shape, entry, config)}")
    if not faults:
        return
    hint = "export the parent again to see what it wants: the table in PROVENANCE.json has names and shapes"
    if any(key.startswith("decoder.layers.self_attention") for key in found):
        hint = "layers are stacked there: save with --hetereogenous-dist-checkpoint, or with the plugin"
    more = f"; and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
    raise RecipeRefused(
        "a checkpoint of Megatron does not hold a student like its parent",
        where="source role checkpoint",
        expected=f"{len(wanted)} tensors, shapes of the parent's config.json",
        found="; ".join(faults[:_SHOWN_FAULTS]) + more,
        next_step=hint,
    )


def _hint(shape: tuple[int, ...], entry: Entry, config: StudentConfig) -> str:
    if shape == entry.shape[::-1]:
        return ", as if transposed"
    is_table = entry.shape[:1] == (config.vocab_size,)
    return f", another padded vocabulary: {config.vocab_size} rows" if is_table and shape[1:] == entry.shape[1:] else ""
