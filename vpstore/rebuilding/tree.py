"""The tree that a recipe is imported from: the normal form of its files, and beside them what carries them out.

Place in the path: closure -> **tree** -> the process that runs the recipe. It is the first place of that process's
module path, and the only one with modules of the repository.
Invariants: of each recipe file the tree has exactly what the key covers (of the first format: its bytes); whatever the
runner and the modules that closures leave out import of the repository is there, too.

Example:
    lines = lay_tree(work, ref, preparation.recipe, prepared, scratch / "tree")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vpstore.code import imported_files
from vpstore.errors import BadManifest
from vpstore.repository import module_places
from vpstore.runner import Prepared
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import RecipeFile
from vpstore.schema.normal_form import normal_form
from vpstore.schema.ref import StageRef
from vpstore.storage import passing
from vpstore.workspace import Workspace

_PROGRAM = "vpstore"  # this program runs itself, never a copy out of the checkout


def lay_tree(
    work: Workspace, ref: StageRef, recipe: Mapping[RecipeFile, bytes], current: Prepared, tree: Path
) -> dict[str, tuple[int, ...]]:
    """Fill an empty folder.

    Returns: for each file in normal form, which line of the file each of its lines is.
    Raises:  BadManifest: a recipe file has another normal form than its record says.
    """
    lines = {}
    for row, data in recipe.items():
        if row.code is None:
            passing.write(tree / row.path, data)
            continue
        form = normal_form(data, where=row.path)
        if (found := Digest.of(form.data)) != row.code:
            raise BadManifest(
                "a manifest contradicts what it names",
                where=f"{ref}: code of recipe file {row.path}",
                expected=found,
                found=row.code,
                next_step=f"vpstore audit {ref} lists all that is wrong",
            )
        passing.write(tree / row.path, form.data)
        lines[row.path] = form.lines
    _lay_support(work, support(work, current), tree)
    return lines


def support(work: Workspace, current: Prepared) -> list[str]:
    """The modules that closures leave out: the runner, and what it says."""
    names = dict.fromkeys([work.checkout.objects.runner, *current.code_exclude])
    return [name for name in names if name.partition(".")[0] != _PROGRAM]


def _lay_support(work: Workspace, names: list[str], tree: Path) -> None:
    """Copy the modules that closures leave out, each with all below it, the packages it lies in and what it imports."""
    root = work.checkout.root
    for name in names:
        below = (path for place in module_places(root) for path in place.joinpath(*name.split(".")).rglob("*"))
        for path in [path for path in below if path.is_file() and "__pycache__" not in path.parts]:
            _copy(path, tree / path.relative_to(root))
    for path in imported_files(root, names, outside=(_PROGRAM,)):
        _copy(path, tree / path.relative_to(root))


def _copy(path: Path, target: Path) -> None:
    if not target.exists():
        passing.write(target, path.read_bytes())
