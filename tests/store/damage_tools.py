"""Damage as a bad disk does it, mode and mtime put back, and where in a project to do it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from small_project import Project


def flip(path: Path, at: int) -> None:
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(before.st_mode & 0o777)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(path: Path) -> None:
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    path.chmod(before.st_mode & 0o777)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def shown(project: Project) -> Any:
    return project.json("show", "plant")


def file_of(document: Any, path: str) -> Any:
    return next(row for row in document["manifest"]["files"] if row["path"] == path)


def tensor_begin(project: Project, name: str) -> int:
    table = json.loads(project.blob(file_of(shown(project), "model.safetensors")["tensors"]).read_text())
    return int(next(row for row in table["tensors"] if row["name"] == name)["span"][0])
