"""A digest of the trainer's own code, so that a run is only taken up by the code that began it.

Place in the path: recipes/ on the disk -> **trainer_code** -> the identity of a Stage 1 run and its log. The trainer is
a program and has no build key, which would cover its code.

Invariants: it covers every module of the project that the program imports, at the top or inside a function, directly
or not, by name and bytes; it depends neither on the folder nor on what else the process has loaded.

Example:
    >>> code_digest()
    'blake3:…'
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from blake3 import blake3

ENTRY = "recipes.stage1_smoke"
_ROOT = Path(__file__).resolve().parents[2]


@cache  # as it was when the process began: later edits are not what it runs
def code_digest(entry: str = ENTRY, root: Path = _ROOT) -> str:
    """BLAKE3 over the modules that `entry` imports, itself included."""
    whole = blake3()
    for name, data in sorted(_modules(entry, root).items()):
        whole.update(f"{name} {blake3(data).hexdigest()}\n".encode())
    return "blake3:" + whole.hexdigest()


def _modules(entry: str, root: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        path = _file_of(name, root)
        if path is not None and name not in found:
            found[name] = path.read_bytes()
            waiting += [name.rpartition(".")[0], *_imported(found[name])]  # importing it runs its package too
    return found


def _file_of(module: str, root: Path) -> Path | None:
    """None for what is no module of ours, such as a name inside one."""
    base = root.joinpath(*module.split("."))
    candidates = (base.with_name(f"{base.name}.py"), base / "__init__.py")
    return next((path for path in candidates if module.startswith("recipes") and path.is_file()), None)


def _imported(data: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(data)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
