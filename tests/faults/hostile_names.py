"""Names that mean something else on some system or lead out of a folder, and the places that take names."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from parsers import _manifest
from small_project import OBJECTS

from vpstore.errors import VpstoreError
from vpstore.schema.canonical import canonical_bytes
from vpstore.schema.lockfile import LockEntry, Lockfile
from vpstore.schema.manifest import Manifest
from vpstore.schema.objects import parse_objects
from vpstore.schema.paths import check_distinct, check_path
from vpstore.schema.ref import StageRef, check_name, parse_ref
from vpstore.storage.pointers import Pointer
from vpstore.storage.remotes.failures import check_name as check_remote_name

# No path of an artifact may be one of these.
PATHS = (
    "", ".", "..", "../x", "a/../b", "a/..", "./a", "a/.", "a//b", "/", "/etc/passwd", "//server/share", "a/",
    "a\\b", "..\\x", "\\\\server\\share", "C:", "C:\\x", "C:x", "a:b", "a:$DATA", "file:///x",
    "a\0b", "a\nb", "a\rb", "\x1b[2J", "a\x7f", "a\x85b", "\x9b31m", "a\ud800", "\udc80",
    "\u202egpj.exe", "a\u200bb", "a\u200db", "\ufeffa", "a\u2028b", "a\xadb",
    "e\u0301", "\u2126", "\u212b", "\u1100\u1161",
    "a.", "a ", " a", "a./b", "a /b", "con", "CON", "nul.txt", "aux.tar.gz", "b/prn", "com1", "LPT9.log", "com\xb9",
    "a?", "a*", "a|b", "<a>", 'a"b', "a" * 256, "\u00e9" * 128, "a/" * 512 + "a", "ab/" * 342,
)  # fmt: skip
# No object, stage, mode, profile or remote may be called so: what is no path, and more.
_DEVICES = ("con", "CON", "com1")  # always with a suffix where a name becomes a file
NAMES = (
    *(path for path in PATHS if path not in _DEVICES), "a/b", "a@b", "a.b", "a#b", "-a", "_a", "a b", "\u00e9",
    "\u0131", "\uff41", "a" * 81, "~", "$HOME", "`id`", "a;b", "--help", "-rf",
)  # fmt: skip
# Two paths that one file system or another takes for one.
COLLISIONS = (
    ("a", "A"), ("model.safetensors", "MODEL.safetensors"), ("stra\u00dfe", "STRASSE"), ("stra\u00dfe", "strasse"),
    ("\u1e9e", "ss"), ("\u00e9", "\u00c9"), ("\u0130", "i\u0307"), ("\ufb01le", "file"),
    ("\uff21", "a"), ("\u03c2", "\u03c3"),
    ("\u0345", "\u03b9"), ("K", "\u212a".casefold()), ("\u2460", "1"), ("a/b", "A/b"), ("a/B", "A/b"),
    ("x\u00b2", "x2"),
    ("a", "a/b"), ("A", "a/b"), ("stra\u00dfe", "STRASSE/x"), ("a/b/c", "A/B"),
)  # fmt: skip
# What must stay possible.
FINE = (
    "a", "config.json", "model-00001-of-00004.safetensors", "a/b/c.txt", ".gitattributes", "_x", "\u00e9",
    "\u65e5\u672c.json", "a b", "a-b_c.d", "console.log", "communication", "x" * 255, "\u0131",
)  # fmt: skip


def _edited(change: Callable[[Any], None]) -> bytes:
    document = json.loads(_manifest().encoded)
    change(document)
    return canonical_bytes(document)


def _in_file(name: str) -> None:
    Manifest.decode(_edited(lambda d: d["files"][0].update(path=name)), where="name")


def _in_recipe(name: str) -> None:
    Manifest.decode(_edited(lambda d: d["build"]["recipe"]["files"][0].update(path=name)), where="name")


def _in_role(name: str) -> None:
    Manifest.decode(_edited(lambda d: d["build"]["inputs"][0].update(role=name)), where="name")


def _in_source(name: str) -> None:
    Manifest.decode(_edited(lambda d: d["build"]["sources"].__setitem__(
        slice(None), [{"role": name, "sha256": "1" * 64, "size_bytes": None}])), where="name")  # fmt: skip


def _in_intermediate(name: str) -> None:
    Manifest.decode(_edited(lambda d: d["intermediates"][0].update(name=name)), where="name")


def _as_object(name: str) -> None:
    Manifest.decode(_edited(lambda d: d.update(object=name)), where="name")


def _in_pointer(name: str) -> None:
    document = json.loads(Pointer(StageRef("a", "b"), _manifest().digest, _manifest().digest).encode())
    Pointer.decode(json.dumps({**document, "stage": name}).encode(), where="name")


def _in_lock(name: str) -> None:
    document = json.loads(Lockfile({"tiny": {StageRef("a", "b"): LockEntry.of(_manifest())}}).encode())
    document["profiles"]["tiny"] = {f"a@{name}": document["profiles"]["tiny"]["a@b"]}
    Lockfile.decode(json.dumps(document).encode(), where="name")


def _in_objects(name: str) -> None:
    import tomllib

    declared = tomllib.loads(OBJECTS)
    declared["objects"][name] = declared["objects"].pop("reports")
    parse_objects(declared, {}, where="name")


def _in_config(name: str) -> None:
    import tomllib

    declared = tomllib.loads(OBJECTS)
    declared["objects"]["plant"]["stages"]["bloom"]["config"] = [name]
    parse_objects(declared, {}, where="name")


PATH_PLACES: dict[str, Callable[[str], object]] = {
    "a path by itself": lambda name: check_path(name, where="name"), "a file of a manifest": _in_file,
    "a recipe file": _in_recipe, "an input's role": _in_role, "a source's role": _in_source,
    "an intermediate": _in_intermediate, "a config file of objects.toml": _in_config,
}  # fmt: skip
NAME_PLACES: dict[str, Callable[[str], object]] = {
    "a name by itself": lambda name: check_name(name, where="name"), "an object of a manifest": _as_object,
    "a stage of a pointer": _in_pointer, "a stage of the lock": _in_lock, "an object of objects.toml": _in_objects,
}  # fmt: skip
REMOTE_NAMES = tuple(f"blobs/blake3/{name}" for name in ("..", "../../x", ".", "a\0b", "a\\b")) + (
    "", "/", "/etc/passwd", "../x", "keys/../../x", "a//b", "./a")  # fmt: skip
BAD_REFS = (
    "", "@", "a@", "@a", "a@b@c", "a.b.c", "a..b", "a#", "a#12345", "a#xyz123", "a#ABCDEF", "#abcdef", "a@b#abcdef",
    "a/b", "../a", "a\0", "a\n", "a ", "a@b ", "\u00e9", "a@\u0131", "-a", "a" * 81, "a#" + "0" * 65,
)  # fmt: skip


def accepted(call: Callable[[str], object], names: tuple[str, ...]) -> list[str]:
    """The names that a place takes."""
    found = []
    for name in names:
        try:
            call(name)
        except VpstoreError as error:
            str(error).encode("utf-8", "backslashreplace")
        else:
            found.append(name)
    return found


def colliding(first: str, second: str) -> bool:
    """Whether two paths are refused beside one another."""
    try:
        check_distinct([first, second], where="name")
    except VpstoreError:
        return True
    return False


def accepted_refs() -> list[str]:
    """Refs that are none, and are taken for one."""
    return accepted(parse_ref, BAD_REFS)


def accepted_remote_names() -> list[str]:
    """Names of objects on a remote that lead elsewhere, and are taken."""
    return accepted(lambda name: check_remote_name(name), REMOTE_NAMES)
