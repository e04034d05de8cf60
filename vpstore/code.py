"""The closure of a recipe: every module of the repository that makes its bytes.

Place in the path: before the build key. Modules are read as text and parsed, never imported, so the key of a build is
known in milliseconds and without its packages.
Invariants: of each file the key covers the normal form alone; imports inside functions and under TYPE_CHECKING count;
package `__init__` files count, as importing runs them; what cannot be seen (importlib, exec, star imports of the
repository's packages) is refused.

Example:
    closure(root, "recipes.convert_dense", always=("recipes.runtime",), exclude=("recipes.run", "vpstore"))
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

from vpstore.errors import RecipeRefused
from vpstore.repository import module_places
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import RecipeFile
from vpstore.schema.normal_form import normal_form

_DYNAMIC_NAMES: Final = frozenset({"__import__", "eval", "exec"})
_DYNAMIC_ATTRIBUTES: Final = frozenset({"__import__", "import_module", "exec_module", "load_module", "run_path"})
_DYNAMIC_MODULES: Final = frozenset({"importlib", "imp", "runpy", "pkgutil", "builtins"})
_HARMLESS: Final = frozenset({"importlib.metadata"})  # reads versions, loads no code


def closure(
    root: Path, entry: str, *, always: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[RecipeFile, ...]:
    """The files that make a recipe's bytes, by path; `read_closure` has what stands in them, too.

    Raises:  RecipeRefused: as `read_closure`.
    """
    return tuple(read_closure(root, entry, always=always, exclude=exclude))


def read_closure(
    root: Path, entry: str, *, always: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[RecipeFile, bytes]:
    """The files that make a recipe's bytes, each read once.

    Args:    root: of the repository; entry: the recipe's module; always: modules that belong to every closure;
             exclude: modules that are left out with everything below them, and not followed.
    Returns: each file with its bytes, sorted by path; paths are relative to root, with forward slashes.
    Raises:  RecipeRefused: the entry is no module of the repository, a file that is not Python or not plain UTF-8, a
             dynamic import.
    """
    waiting, seen = [entry, *always], set[str]()
    found: dict[str, bytes] = {}
    for name in waiting:
        if _locate(root, name) is None:
            raise RecipeRefused("no such module in the repository", where=name, expected=f"a file under {root}")
    while waiting:
        module = waiting.pop()
        if module in seen or _is_excluded(module, exclude):
            continue
        seen.add(module)
        waiting.extend(_packages(module))
        path = _locate(root, module)
        if path is None or path.is_dir():  # from outside the repository, or a package without __init__
            continue
        data = path.read_bytes()
        where = path.relative_to(root).as_posix()
        found[where] = data
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for level, name, line in _imports_of(data, where):
            waiting.append(_absolute(level, name, package, f"{where}:{line}"))
    for module in seen:
        _refuse_hidden_names(root, module)
    return {_described(path, found[path]): found[path] for path in sorted(found)}


def _described(path: str, data: bytes) -> RecipeFile:
    return RecipeFile(path, Digest.of(data), Digest.of(normal_form(data, where=path).data))


def imported_files(root: Path, modules: Sequence[str], *, outside: Sequence[str] = ()) -> tuple[Path, ...]:
    """The files of some modules and of all that they import of the repository, for whoever runs them.

    What carries recipes out may import as it likes: nothing is refused, and what cannot be seen is not among them.

    Args:    outside: packages that are not followed.
    """
    waiting, seen, found = list(modules), set[str](), dict[Path, None]()
    while waiting:
        module = waiting.pop()
        if module in seen or _is_excluded(module, outside):
            continue
        seen.add(module)
        waiting.extend(_packages(module))
        path = _locate(root, module)
        if path is None or path.is_dir():
            continue
        found[path] = None
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(_parsed(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            waiting.extend(names)
            if isinstance(node, ast.ImportFrom) and node.level <= len(package.split(".")):
                waiting.extend(_absolute(node.level, name, package, path.name) for name in _names_of(node))
    return tuple(found)


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # whoever imports it says so
        return ast.Module([], [])


def _is_excluded(module: str, exclude: Sequence[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in exclude)


def _packages(module: str) -> Iterator[str]:
    parts = module.split(".")
    for end in range(1, len(parts)):
        yield ".".join(parts[:end])


def _locate(root: Path, module: str) -> Path | None:
    """The file of a module: its own, its package's `__init__`, or the folder of a package without one."""
    bases = [place.joinpath(*module.split(".")) for place in module_places(root)]
    for base in bases:
        for path in (base / "__init__.py", base.with_name(base.name + ".py")):
            if path.is_file():
                return path
    return next((base for base in bases if "." in module and base.is_dir() and any(base.glob("*.py"))), None)


def _absolute(level: int, name: str, package: str, where: str) -> str:
    """The full name of an import that stands in a module of `package`."""
    if level == 0:
        return name
    parts = package.split(".")
    if level > len(parts):
        raise RecipeRefused("a relative import leads out of the repository", where=where)
    return ".".join([*parts[: len(parts) - level + 1], *([name] if name else [])])


def _refuse_hidden_names(root: Path, module: str) -> None:
    base, _, last = module.rpartition(".")
    path = _locate(root, base) if last == "*" else None
    if path is not None and path.name == "__init__.py":
        _refuse(base, 0, f"from {base} import *")


@lru_cache(maxsize=1024)
def _imports_of(data: bytes, where: str) -> tuple[tuple[int, str, int], ...]:
    """Every module that a file may import, as (level, name, line); equal bytes are parsed once a process."""
    try:
        tree = ast.parse(data, filename=where)
    except (SyntaxError, ValueError) as error:
        raise RecipeRefused("a file of a recipe is not Python", where=where, found=str(error)) from error
    found: list[tuple[int, str, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.extend((0, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.extend((node.level, name, node.lineno) for name in _names_of(node))
        elif isinstance(node, ast.Name) and node.id in _DYNAMIC_NAMES:
            _refuse(where, node.lineno, node.id)
        elif isinstance(node, ast.Attribute) and node.attr in _DYNAMIC_ATTRIBUTES:
            _refuse(where, node.lineno, node.attr)
    for level, name, line in found:
        if level == 0 and name.split(".")[0] in _DYNAMIC_MODULES and not _is_harmless(name):
            _refuse(where, line, name)
    return tuple(found)


def _names_of(node: ast.ImportFrom) -> list[str]:
    """`from a import b`: both `a` and, as it may be a module, `a.b`."""
    base = node.module or ""
    below = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
    return below if base == "importlib" else [base, *below]


def _is_harmless(name: str) -> bool:
    return any(name == harmless or name.startswith(harmless + ".") for harmless in _HARMLESS)


def _refuse(where: str, line: int, name: str) -> None:
    raise RecipeRefused(
        "a recipe imports or runs code that cannot be seen beforehand",
        where=f"{where}:{line}",
        expected="import statements only: the build key covers exactly the files that make the bytes",
        found=name,
        next_step="import the module by name; inside a function if it is heavy",
    )
