"""Compiled modules of installed packages, kept in a person's own cache where Python keeps none beside them.

Place in the path: under whoever is about to import a tensor library. Container images and read-only environments often
have no `__pycache__` and forbid it; compiling torch then costs every process as much as importing it.

Invariants: only modules below `site-packages` are kept, never one of a checkout or of a recorded tree; a kept module is
used only while device, inode, size, mtime_ns and ctime_ns of its source are those that it was compiled from (Python
asks its own for size and seconds only); what is damaged or cannot be written is as if it were not there.

Example:
    keep_compiled()  # then import torch
"""

from __future__ import annotations

import marshal
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
)
from importlib.util import MAGIC_NUMBER, cache_from_source
from pathlib import Path
from types import CodeType
from typing import Final

from blake3 import blake3

from vpstore.storage.stamps import Stat, cache_directory

FOLDERS: Final = ("site-packages", "dist-packages")
_DIGEST_BYTES: Final = 32
_on: Final[set[str]] = set()  # top folders whose modules are kept


def keep_compiled(paths: Sequence[str] | None = None) -> None:
    """From now on load the modules of installed packages as they were compiled before, where Python will not.

    Args:    paths: where modules are looked for; None: `sys.path`.
    """
    if not sys.dont_write_bytecode:
        return
    found = {path for path in (sys.path if paths is None else paths) if os.path.basename(path) in FOLDERS}
    if not _on and found:
        sys.path_hooks.insert(0, _finder)
    for folder in found - _on:
        _on.add(folder)
        for known in [known for known in sys.path_importer_cache if _is_below(known, folder)]:
            del sys.path_importer_cache[known]


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)


def _finder(folder: str) -> FileFinder:
    if not any(_is_below(folder, top) for top in _on):
        raise ImportError
    return FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES), (_Kept, SOURCE_SUFFIXES))


class _Kept(SourceFileLoader):
    """Loads a module from what was compiled before, or compiles it and keeps that."""

    def get_code(self, fullname: str) -> CodeType | None:
        """The module's code; Python's own compiled module is used where there is one."""
        source = self.get_filename(fullname)
        if os.path.exists(cache_from_source(source)):
            return super().get_code(fullname)
        try:
            stat = Stat.of(Path(source))
        except OSError:
            return super().get_code(fullname)
        kept, origin = cache_directory() / "compiled" / blake3(source.encode()).hexdigest(), _origin(source, stat)
        code = _read(kept, origin)
        if code is None:
            code = super().get_code(fullname)
            # A source that changed just before, or changes meanwhile, could change once more without a sign.
            if code is not None and stat.is_settled(time.time_ns()) and Stat.of(Path(source)) == stat:
                _write(kept, origin, code)
        return code


def _origin(source: str, stat: Stat) -> bytes:
    """What the code of a module follows from: its source as it lies there, and this Python."""
    return repr((MAGIC_NUMBER, sys.flags.optimize, source, *stat)).encode()


def _read(kept: Path, origin: bytes) -> CodeType | None:
    try:
        data = kept.read_bytes()
    except OSError:
        return None
    digest, body = data[:_DIGEST_BYTES], memoryview(data)[_DIGEST_BYTES:]
    if bytes(body[: len(origin)]) != origin or blake3(body).digest() != digest:
        return None
    with suppress(ValueError, EOFError, TypeError):
        code = marshal.loads(body[len(origin) :])
        return code if isinstance(code, CodeType) else None
    return None


def _write(kept: Path, origin: bytes, code: CodeType) -> None:
    body = origin + marshal.dumps(code)
    # Not by `system.disk`: how many modules are kept differs from process to process, and no fault of it is one.
    partial = kept.with_name(f"{kept.name}.{os.getpid()}")
    with suppress(OSError):  # a full disk, or no home
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.write_bytes(blake3(body).digest() + body)
        partial.replace(kept)
