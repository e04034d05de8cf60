"""A donor from outside, held against what it must be, and taken over without a change.

Place in the path: sources `donor/<file>`, each already held against its published SHA-256 -> **import_donor** -> the
vocabulary transplant. Either the files are kept as they are, or some tensors are taken out of verified shards.

Invariants: kept files are equal byte for byte, kept tensors bit for bit; nothing is read from a shard that is not a
verified source; config, tensor names, dtypes and shapes are checked in full before the first byte is written.

Example: `vpstore build qwen3-0_6B`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from recipes.data.vocabulary import read_vocabulary
from recipes.names import INDEX_FILE
from recipes.needs import needs as needs_of
from recipes.params.import_donor import Params
from recipes.recipe import Context, Needs, Plan, Report, copy_file
from recipes.tensors import TensorReader, kept
from vpstore.errors import RecipeRefused

_ROLE = "donor/"
_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"
_MEDIA_TYPES = {".json": "application/json", ".safetensors": "application/vnd.safetensors", ".txt": "text/plain"}
_SHOWN_FAULTS = 8


def needs(context: Context) -> Needs:
    """What is kept of the donor, and nothing of it in memory but pieces. What is wrong with it is for `plan` to say."""
    params: Params = context.params
    size = 0
    with suppress(RecipeRefused, SafetensorError, OSError):
        files = _files(context.sources, params)
        size += sum(files[name].stat().st_size for name in params.keep_files)
        size += sum(kept(_reader(files), name).size_bytes for name in params.keep_tensors)
    return needs_of(size)


def plan(context: Context) -> Plan:
    """The donor's kept files, and its kept tensors in shards of their own.

    Raises:  RecipeRefused: a file is missing or is not what it must be; all faults of a kind in one message.
    """
    params: Params = context.params
    files = _files(context.sources, params)
    config = _config(files[_CONFIG])
    _refuse("config.json is not the donor's", _CONFIG, _config_faults(config, params.expect))
    _require_vocabulary(files[_TOKENIZER], params.ordinary_tokens)
    reader = _reader(files)
    _refuse("the donor's tensors are not what its config says", "the shards", _tensor_faults(reader, config, params))
    parameters = sum(prod(reader.spec(name)[1]) for name in reader.names())
    return Plan(
        tensors=[kept(reader, name) for name in params.keep_tensors],
        files=[copy_file(name, files[name], _media_type(name)) for name in params.keep_files],
        report=Report(metrics={"tensors": len(reader.names()), "parameters": parameters}),
    )


def _files(sources: Mapping[str, Path], params: Params) -> dict[str, Path]:
    """Name -> path of the donor's sources."""
    files = {name.removeprefix(_ROLE): path for name, path in sources.items() if name.startswith(_ROLE)}
    absent = sorted(set(params.keep_files) - set(files))
    if absent:
        raise RecipeRefused(
            "the donor lacks files",
            where="source role donor",
            expected=", ".join(params.keep_files),
            found=f"without {', '.join(absent)}",
            next_step="put them into the folder that the provenance file names as its root, and list them in it",
        )
    folders = {path.parent for path in files.values()}
    if len(folders) > 1:
        raise RecipeRefused(
            "the donor's files do not lie in one folder",
            where="source role donor",
            expected="one folder",
            found=f"{len(folders)} folders",
            next_step="put all files of the donor side by side",
        )
    return files


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _not_json(_CONFIG, str(error)) from error
    if not isinstance(config, dict):
        raise _not_json(_CONFIG, type(config).__name__)
    return config


def _not_json(name: str, found: str) -> RecipeRefused:
    return RecipeRefused("a file of the donor is not a JSON object", where=name, found=found[:200])


def _config_faults(config: Mapping[str, Any], expect: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} is {config[key]!r}, not {value!r}" if key in config else f"{key} is absent, not {value!r}"
        for key, value in expect.items()
        if key not in config or config[key] != value or isinstance(config[key], bool) != isinstance(value, bool)
    ]


def _require_vocabulary(path: Path, expected: int) -> None:
    found = sum(token is not None for token in read_vocabulary(path).tokens)
    if found != expected:
        raise RecipeRefused(
            "tokenizer.json is not the donor's",
            where=_TOKENIZER,
            expected=f"{expected} ordinary tokens",
            found=str(found),
            next_step="put the tokenizer.json of the pinned revision there",
        )


def _reader(files: Mapping[str, Path]) -> TensorReader:
    """A reader that touches verified shards only."""
    folder = files[_CONFIG].parent
    if INDEX_FILE in files:
        shards = set(_config(files[INDEX_FILE]).get("weight_map", {}).values())
    elif (folder / INDEX_FILE).exists():
        shards = {INDEX_FILE}  # the reader would follow an index that nobody verified
    else:
        shards = {path.name for path in folder.glob("*.safetensors")}
    strangers = sorted(map(str, shards - set(files)))
    if strangers or not shards:
        raise RecipeRefused(
            "the donor's shards and its provenance do not agree",
            where="the donor's folder",
            expected="safetensors shards that the provenance file pins",
            found=", ".join(strangers) or "no shard",
            next_step="list the shards in the provenance file, or take strange files out of the folder",
        )
    return TensorReader(folder)


def _tensor_faults(reader: TensorReader, config: Mapping[str, Any], params: Params) -> list[str]:
    expected = _expected_shapes(config, params)
    names = set(reader.names())
    faults = [f"{name} is absent" for name in sorted(set(expected) - names - set(params.optional_tensors))]
    if not params.keep_tensors:  # of a donor that is only read in part, the rest is nobody's business
        faults += [f"{name} is not part of the architecture" for name in sorted(names - set(expected))]
    for name in sorted(names & set(expected)):
        try:
            dtype, shape = reader.spec(name)
        except (OSError, SafetensorError) as error:
            faults.append(f"{name} cannot be read: {error}")
            continue
        if (dtype, shape) != (params.dtype, expected[name]):
            faults.append(f"{name} is {dtype} {list(shape)}, not {params.dtype} {list(expected[name])}")
    return faults


def _expected_shapes(config: Mapping[str, Any], params: Params) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for pattern, sizes in params.tensors.items():
        shape = tuple(prod(_size(config, key) for key in size.split("*")) for size in sizes)
        layers = range(_size(config, "num_hidden_layers")) if "*" in pattern else (0,)
        shapes.update({pattern.replace("*", str(layer)): shape for layer in layers})
    return shapes


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeRefused(
            "a size of the architecture is missing",
            where=f"{_CONFIG}: {key}",
            expected="a whole number above 0",
            found=repr(value),
            next_step="use the config.json of the pinned revision",
        )
    return value


def _refuse(what: str, where: str, faults: list[str]) -> None:
    if not faults:
        return
    more = f"; and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
    raise RecipeRefused(
        what,
        where=where,
        expected="the architecture that params name",
        found="; ".join(faults[:_SHOWN_FAULTS]) + more,
        next_step="put the donor's files of the pinned revision there, or mend the configuration",
    )


def _media_type(name: str) -> str:
    return _MEDIA_TYPES.get(Path(name).suffix, "application/octet-stream")
