"""The folder in which one run of a recipe has its tree, and what must stay while it runs.

Place in the path: around every run of recipes. It is one of the store's own work folders, on the file system
that has room for artifacts, unless a person names another to keep.
Invariants: it begins empty and is gone at the end, also after an interruption; one that a killed process left is wiped
by the next; the artifacts that are read cannot be collected meanwhile.

Example:
    with scratch_folder(work, "reproduce", task, keep=None) as folder: ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vpstore.errors import UsageError
from vpstore.rebuilding.ingredients import Task
from vpstore.schema.digest import Digest
from vpstore.storage import atomic
from vpstore.workspace import Workspace


@contextmanager
def scratch_folder(work: Workspace, purpose: str, task: Task, *, keep: Path | None = None) -> Iterator[Path]:
    """An empty folder for one run; a second process with the same purpose and task waits.

    Args:    keep: use this folder instead, and leave it; it must be empty or absent.
    Raises:  UsageError: the folder to keep is not empty.
    """
    needed = [row.artifact for row in task.record.inputs]
    needed += [task.manifest.digest] if task.manifest is not None else []
    name = Digest.of(f"{purpose} {task.ref} {task.record.key()}".encode())
    waiting = f"{task.ref}: another process is at it; waiting"
    with (
        atomic.disk_errors(work.store.root, f"{purpose} of {task.ref}"),
        work.store.roots.running(artifacts=needed),
        work.store.lock(name, waiting=lambda: work.narrator.warn(waiting)),
    ):
        if keep is not None:
            yield _kept(keep.expanduser().absolute())
            return
        work.store.drop_scratch(name)
        try:
            yield work.store.scratch(name)
        finally:
            work.store.drop_scratch(name)


def _kept(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            "the folder to keep things in is not empty", where=str(folder), next_step="name an empty or absent one"
        )
    atomic.make_directory(folder)
    return folder
