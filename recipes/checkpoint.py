"""Between a directory of tensors and a model: what a checkpoint must contain, its config.json, and loading it.

Place in the path: recipe -> **tensors**. Recipes plan against `expected_tensors`, write `student_config_json`, and load
parents with `load_student` or `load_donor`.

Invariants: names, shapes and dtypes come from the model itself on the meta device, so that they cannot drift from it;
loading is strict: a missing, unexpected or misshaped tensor is refused, all faults in one message; config.json round
trips exactly.

Example:
    >>> config = parse_student_config(context.inputs["parent"].json("config.json"))
    >>> student = load_student(context.inputs["parent"].tensors(), config)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from recipes.model.config import DonorConfig, StudentConfig
from recipes.model.donor import MAX_POSITIONS, Donor
from recipes.model.precision import KeepsFloat32
from recipes.model.transformer import Student
from recipes.names import EMBEDDING, HEAD
from recipes.planned import Dtype, PlannedTensor
from recipes.recipe import InputArtifact, PlannedFile, copy_file, json_file
from recipes.tensors import TensorReader
from vpstore.errors import RecipeRefused, ShapeMismatch

STUDENT_ARCHITECTURE = "VpForCausalLM"
STUDENT_MODEL_TYPE = "vpmoe"
DONOR_ARCHITECTURE = "Qwen3ForCausalLM"
DONOR_MODEL_TYPE = "qwen3"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens.json")

# What stock Qwen3 code must be told besides the shapes, and what the donor's arithmetic takes for granted.
_DONOR_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
}
_FLOATS: tuple[Dtype, ...] = ("BF16", "F16", "F32")
_SHOWN_FAULTS = 8

Spec = tuple[Dtype, tuple[int, ...]]
_Config = TypeVar("_Config", StudentConfig, DonorConfig)


def expected_tensors(config: StudentConfig | DonorConfig) -> dict[str, Spec]:
    """Dtype and shape on disk of every tensor of a checkpoint, by name, in the model's order.

    Returns: BF16, but F32 for the frequencies, offsets, value residuals and expert biases.
    """
    model = _meta_model(config)
    pinned = _pinned_names(model)
    return {
        name: ("F32" if name in pinned else "BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()
    }


def require_shapes(planned: Iterable[PlannedTensor], config: StudentConfig | DonorConfig) -> None:
    """Hold a plan against the model before anything is computed.

    Raises:  ShapeMismatch: missing, unexpected or repeated names, other shapes or dtypes; all of them are listed.
    """
    found: dict[str, Spec] = {}
    faults = []
    for tensor in planned:
        if tensor.name in found:
            faults.append(f"{tensor.name}: planned twice")
        found[tensor.name] = (tensor.dtype, tuple(tensor.shape))
    expected = expected_tensors(config)
    faults += _name_faults(expected, found)
    faults += [
        f"{name}: {_spec_text(found[name])}, not {_spec_text(spec)}"
        for name, spec in expected.items()
        if name in found and found[name] != spec
    ]
    if faults:
        raise ShapeMismatch(
            "a plan does not fit the model that its config describes",
            expected=f"the {len(expected)} tensors of the model",
            found=_listed(faults),
            next_step="compare the recipe's names and shapes with the config",
        )


def load_student(
    reader: TensorReader,
    config: StudentConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Student:
    """The student with a checkpoint's weights in `dtype`; pinned tensors stay float32.

    Raises:  RecipeRefused: missing, unexpected, misshaped or too narrow tensors; all of them are listed.
    """
    with torch.device("meta"):
        model = Student(config)
    _fill(model, reader, dtype=dtype, device=device)
    return model


def load_donor(
    reader: TensorReader,
    config: DonorConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Donor:
    """The donor with a checkpoint's weights. A tied checkpoint may store its head too, if it is the embedding.

    Raises:  RecipeRefused: missing, unexpected or misshaped tensors, or a stored head that contradicts tying.
    """
    with torch.device("meta"):
        model = Donor(config)
    ignored = {HEAD} if config.tie_word_embeddings and HEAD in reader else set()
    if ignored and not torch.equal(reader.read(HEAD), reader.read(EMBEDDING)):
        raise RecipeRefused(
            "the config says that head and embedding are tied, but the stored head is another matrix",
            where=str(reader.directory.name),
            expected=f"{HEAD} equal to {EMBEDDING}",
            next_step="set tie_word_embeddings to false, or take the head out",
        )
    _fill(model, reader, dtype=dtype, device=device, ignored=ignored)
    return model


def _meta_model(config: StudentConfig | DonorConfig) -> Student | Donor:
    with torch.device("meta"):
        return Student(config) if isinstance(config, StudentConfig) else Donor(config)


def _pinned_names(model: nn.Module) -> set[str]:
    """Full names of the tensors that stay float32."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, KeepsFloat32)
        for name in module.pinned_names()
    }


def _fill(
    model: nn.Module,
    reader: TensorReader,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    ignored: Iterable[str] = (),
) -> None:
    """Put the reader's tensors into a model on the meta device, after all of them have been checked."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    pinned = _pinned_names(model)
    found = {name: reader.spec(name) for name in reader.names() if name not in set(ignored)}
    faults = _name_faults(expected, found)
    for name in sorted(expected.keys() & found.keys()):
        allowed: tuple[Dtype, ...] = ("F32",) if name in pinned else _FLOATS
        if found[name][0] not in allowed or found[name][1] != expected[name]:
            faults.append(f"{name}: {_spec_text(found[name])}, not {'/'.join(allowed)} {list(expected[name])}")
    if faults:
        raise RecipeRefused(
            "a checkpoint does not fit the model that its config describes",
            where=str(reader.directory.name),
            expected=f"{len(expected)} tensors",
            found=_listed(faults),
            next_step="rebuild the checkpoint, or load it with the config.json beside it",
        )
    # First to the device, then to the dtype: the other way round the host would hold and send what is made there.
    weights: dict[str, Tensor] = {
        name: reader.read(name).to(device).to(torch.float32 if name in pinned else dtype) for name in expected
    }
    model.load_state_dict(weights, strict=True, assign=True)


def _name_faults(expected: Mapping[str, object], found: Mapping[str, object]) -> list[str]:
    missing = [f"{name}: missing" for name in sorted(expected.keys() - found.keys())]
    return missing + [f"{name}: unexpected" for name in sorted(found.keys() - expected.keys())]


def _spec_text(spec: Spec) -> str:
    return f"{spec[0]} {list(spec[1])}"


def _listed(faults: list[str]) -> str:
    """The first faults, and how many more there are."""
    more = len(faults) - _SHOWN_FAULTS
    return "; ".join(faults[:_SHOWN_FAULTS]) + (f"; and {more} more" if more > 0 else "")


def student_config_json(config: StudentConfig) -> dict[str, Any]:
    """config.json of a student: Hugging Face's two identifying fields, then every field of the config."""
    return {"architectures": [STUDENT_ARCHITECTURE], "model_type": STUDENT_MODEL_TYPE, **config.model_dump(mode="json")}


def parse_student_config(document: Mapping[str, Any]) -> StudentConfig:
    """The inverse of `student_config_json`, exact.

    Raises:  RecipeRefused: another model type, an unknown or a missing field, a value out of range.
    """
    fields = dict(document)
    _require_kind(fields.pop("architectures", None), fields.pop("model_type", None), STUDENT_ARCHITECTURE)
    missing = sorted(StudentConfig.model_fields.keys() - fields.keys())
    if missing:
        raise RecipeRefused("config.json is not complete", where="config.json", expected=", ".join(missing))
    return _validated(StudentConfig, fields)


def donor_config_json(config: DonorConfig) -> dict[str, Any]:
    """config.json of a Qwen3 model, as stock `transformers` reads it."""
    return {
        "architectures": [DONOR_ARCHITECTURE],
        "model_type": DONOR_MODEL_TYPE,
        "max_position_embeddings": MAX_POSITIONS,
        "torch_dtype": "bfloat16",
        **_DONOR_FIXED,
        **config.model_dump(mode="json"),
    }


def parse_donor_config(document: Mapping[str, Any]) -> DonorConfig:
    """Shapes out of a Qwen3 config.json; fields that do not change the arithmetic are passed over.

    Raises:  RecipeRefused: not a Qwen3 model, a missing field, or an option that the donor's code does not have.
    """
    _require_kind(document.get("architectures"), document.get("model_type"), DONOR_ARCHITECTURE)
    fields = dict(document)
    rope = fields.get("rope_parameters") or {}  # where newer writers keep the base
    if "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
    unlike = {key: fields[key] for key, value in _DONOR_FIXED.items() if fields.get(key, value) != value}
    if rope.get("rope_type", "default") != "default":
        unlike["rope_parameters"] = rope
    missing = sorted(DonorConfig.model_fields.keys() - fields.keys())
    if unlike or missing:
        raise RecipeRefused(
            "this Qwen3 config asks for what the donor's code does not do, or leaves something open",
            where="config.json",
            expected=", ".join([f"{key} = {_DONOR_FIXED.get(key, 'default')}" for key in unlike] + missing),
            found=", ".join(f"{key} = {value}" for key, value in unlike.items()) or "fields are missing",
            next_step="take the donor that the provenance file pins",
        )
    return _validated(DonorConfig, {key: fields[key] for key in DonorConfig.model_fields})


def _require_kind(architectures: object, model_type: object, architecture: str) -> None:
    wanted = STUDENT_MODEL_TYPE if architecture == STUDENT_ARCHITECTURE else DONOR_MODEL_TYPE
    if architectures != [architecture] or model_type != wanted:
        raise RecipeRefused(
            "config.json describes another kind of model",
            where="config.json",
            expected=f"{architecture} ({wanted})",
            found=f"{architectures} ({model_type})",
        )


def _validated(kind: type[_Config], fields: Mapping[str, Any]) -> _Config:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise RecipeRefused(
            "config.json holds values that make no model", where="config.json", found=_listed(faults)
        ) from error


def student_files(config: StudentConfig, tokenizer: InputArtifact) -> list[PlannedFile]:
    """What stands beside a student's weights: config.json, and the tokenizer's files.

    Raises:  RecipeRefused: as for `tokenizer_files`.
    """
    return [json_file("config.json", student_config_json(config)), *tokenizer_files(tokenizer)]


def tokenizer_files(tokenizer: InputArtifact) -> list[PlannedFile]:
    """The tokenizer's files, copied into a checkpoint byte for byte.

    Raises:  RecipeRefused: the artifact lacks one of them.
    """
    absent = [name for name in TOKENIZER_FILES if not (tokenizer.path / name).is_file()]
    if absent:
        raise RecipeRefused(
            "the tokenizer artifact is not complete",
            where=f"{tokenizer.role} {tokenizer.ref}",
            expected=", ".join(absent),
            next_step=f"vpstore build {tokenizer.ref}",
        )
    return [copy_file(name, tokenizer.path / name, "application/json") for name in TOKENIZER_FILES]
