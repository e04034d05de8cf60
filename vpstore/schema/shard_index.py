"""Which shard a tensor is read from where several hold its name: the index decides, as for all readers of checkpoints.

Place in the path: publish refuses what contradicts itself; `open`, `diff`, `why` and `show --tensors` go by it.
Invariants: no tensor of an artifact is left out, and none takes another's place. A name that no index gives to a shard
while several hold it is said with its shard in front (`vae/model.safetensors:weight`), and so is a tensor that an
index passes over. An index names only shards and tensors that are there.

Example:
    places = locate({"a.safetensors": table}, {"model.safetensors.index.json": {"w": "a.safetensors"}}, where="x@main")
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from vpstore.errors import BadManifest
from vpstore.schema.canonical import parse_strict
from vpstore.schema.tensor_table import TensorRow, TensorTable

SUFFIX: Final = ".safetensors.index.json"
_USUAL: Final = "model" + SUFFIX  # of several indexes in one folder the one that readers take unasked
_SHOWN: Final = 200  # characters of a name


@dataclass(frozen=True)
class Places:
    """Every tensor of an artifact."""

    rows: Mapping[str, tuple[str, TensorRow]]  # name, with its shard in front where it needs one -> shard, row
    undecided: tuple[tuple[str, tuple[str, ...]], ...]  # name and shards of one folder that hold it, and no index


def is_index(path: str) -> bool:
    """Whether a file of an artifact says which shard has which tensor."""
    return path.endswith(SUFFIX)


def parse_index(data: bytes, *, where: str) -> Mapping[str, str]:
    """The weight map of an index: tensor name to the shard's path, from the index's folder on.

    Raises:  BadManifest: not strict JSON, no `weight_map`, or one that is not text to text.
    """
    document = parse_strict(data, where=where)
    found = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise BadManifest(
            "an index does not say which shard has which tensor", where=where, expected='"weight_map": {tensor: shard}'
        )
    return found


def locate(tables: Mapping[str, TensorTable], indexes: Mapping[str, Mapping[str, str]], *, where: str) -> Places:
    """Find the shard of every tensor.

    Args:    tables: of every shard, by its path; indexes: weight maps, by the path of the index.
    Raises:  BadManifest: an index names a shard or a tensor that is not there.
    """
    holders: dict[str, list[str]] = defaultdict(list)
    for path, table in tables.items():
        for row in table.tensors:
            holders[row.name].append(path)
    claims = _claims(tables, indexes, where)
    rows: dict[str, tuple[str, TensorRow]] = {}
    for name, paths in holders.items():
        claimed = set(claims[name].values()) if name in claims else set()
        for path in paths:
            known = name if len(paths) == 1 or claimed == {path} else f"{path}:{name}"
            if known in rows:
                raise BadManifest("two tensors have one name", where=f"{where}: {known[:_SHOWN]}")
            rows[known] = path, tables[path].by_name[name]
    return Places(rows, tuple(_undecided(holders, claims)))


def _claims(
    tables: Mapping[str, TensorTable], indexes: Mapping[str, Mapping[str, str]], where: str
) -> dict[str, dict[str, str]]:
    """Tensor name -> folder of an index -> the shard that it names."""
    claims: dict[str, dict[str, str]] = defaultdict(dict)
    for path in sorted(indexes, key=lambda path: (not path.endswith(_USUAL), path)):
        folder = _folder(path)
        for name, shard in indexes[path].items():
            table = tables.get(folder + shard)
            if table is None or name not in table.by_name:
                raise BadManifest(
                    "an index names what the artifact does not have",
                    where=f"{where}, {path}: {name[:_SHOWN]}",
                    expected=f"a tensor of {(folder + shard)[:_SHOWN]}",
                    found="no such shard" if table is None else "a shard without a tensor of this name",
                )
            claims[name].setdefault(folder, folder + shard)
    return claims


def _undecided(
    holders: Mapping[str, list[str]], claims: Mapping[str, Mapping[str, str]]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, paths in holders.items():
        by_folder: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            by_folder[_folder(path)].append(path)
        for inside in by_folder.values():
            if len(inside) > 1 and not set(inside) & set(claims.get(name, {}).values()):
                yield name, tuple(inside)


def _folder(path: str) -> str:
    """The folder of a path, with its slash; "" at the top."""
    return path[: path.rfind("/") + 1]
