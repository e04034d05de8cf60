"""What a build is going to take of disk and memory, said before the work, and a disk that is too full refused.

Place in the path: build, between the inputs and the recipe.
Invariants: what an interrupted build left in the scratch folder counts as there; little memory is a warning, as a
system may give more than it calls available.

Example:
    say(work, ref, needs, scratch)
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from vpstore.errors import VpstoreError
from vpstore.runner import Needs
from vpstore.schema.ref import StageRef
from vpstore.workspace import Workspace

_GB: Final = 10**9
_GIB: Final = 1 << 30
_MEMORY: Final = Path("/proc/meminfo")


def say(work: Workspace, ref: StageRef, needs: Needs, scratch: Path) -> None:
    """Tell what a build takes.

    Raises:  VpstoreError: the disk has less.
    """
    takes = f"{needs.disk_bytes / _GB:.2f} GB of disk and at most about {needs.memory_bytes / _GIB:.1f} GiB of memory"
    work.narrator.note(f"{ref}: takes {takes}")
    there = sum(path.lstat().st_blocks * 512 for path in scratch.rglob("*"))
    free = shutil.disk_usage(scratch).free + there
    if needs.disk_bytes > free:
        raise VpstoreError(
            "the disk is too full for this build",
            where=f"{ref}, {scratch}",
            expected=f"{needs.disk_bytes:,} bytes free",
            found=f"{free:,} bytes free",
            next_step="free some space, or point VPSTORE_ROOT at a larger disk; what is finished is kept",
        )
    available = available_memory()
    if available is not None and needs.memory_bytes > available:
        work.narrator.warn(f"{ref} takes at most about {needs.memory_bytes / _GIB:.1f} GiB of memory; "
                           f"{available / _GIB:.1f} are available here")  # fmt: skip


def available_memory() -> int | None:
    """Bytes that the system could give without swapping; None if it does not say."""
    try:
        rows = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return None
