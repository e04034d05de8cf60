"""A package that is not installed, told apart from a mistake in the code that imports it.

Place in the path: under `project_code` and the process that runs recipes. A recipe's own module that is not there is a
mistake; a package that nobody installed is none, and no other commit helps.
Invariants: only what can be found nowhere is called missing; the extra that brings a package is read from the project's
own pyproject.toml, else from vpstore's metadata.

Example:
    raise missing_package(error, [root], where="recipes/heal.py:12") or error
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from vpstore.errors import UsageError
from vpstore.repository import module_places

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_EXTRA: Final = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")
# Where a package is not called as its module.
_OTHERWISE: Final = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn", "cv2": "opencv-python"}


def missing_package(error: BaseException, roots: Sequence[Path], *, where: str) -> UsageError | None:
    """The error for a package that is not installed; None if that is not what happened.

    Args:    roots: of the project's own code, in which a module that is missing is a mistake; where: who imports it.
    """
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not name or name in sys.stdlib_module_names or any(_is_own(name, root) for root in roots) or _is_found(name):
        return None
    package = _OTHERWISE.get(name, name)
    return UsageError(
        f"the package {package} is not installed",
        where=where,
        expected=f"module {name} for {sys.executable}",
        found="none",
        next_step=next(_ways(_plain(package), roots), f"pip install {package}, in this environment"),
    )


def _is_own(name: str, root: Path) -> bool:
    return any((place / name).is_dir() or (place / f"{name}.py").is_file() for place in module_places(root))


def _is_found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _ways(package: str, roots: Sequence[Path]) -> Iterator[str]:
    """The commands that bring it."""
    for root in roots:
        project = _project(root)
        for extra, rows in project.get("optional-dependencies", {}).items():
            if package in map(_required, rows):
                yield f"pip install '.[{extra}]' in the project's folder, in this environment"
        if package in map(_required, project.get("dependencies", [])):
            yield "pip install . in the project's folder, in this environment"
    for row in metadata.requires("vpstore") or []:
        if _required(row) == package and (extra := _EXTRA.search(row)):
            yield f"pip install 'vpstore[{extra[1]}]', in this environment"


def _project(root: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _required(row: str) -> str:
    """The package that a requirement names."""
    found = _NAME.match(row.strip())
    return _plain(found[0]) if found else ""


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
