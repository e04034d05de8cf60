"""Copies of this checkout as it is built: one as it is, one whose stages have plain commands, one without code deps.

Place: for the measures of the no-op `dvc repro` and of `resolve`. The first two have the same stages, dependencies,
params and outs; the third depends on pointers and params only. Nothing runs in any, as nothing has changed.
Invariants: this checkout and its store are only read; without a built chain there is no copy and no figure.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from benchmarks.projects import REPOSITORY, Place, dvc_repository, remove

_COMMAND = re.compile(r"^(    cmd:) vpstore build .*$", re.MULTILINE)


def copies(place: Place) -> tuple[Path, Path, Path] | None:
    """The three copies, each asked once, so that DVC knows its files; None if nothing is built here."""
    store = REPOSITORY / ".vpstore"
    if not (REPOSITORY / "dvc.lock").is_file() or not store.is_dir():
        return None
    ours, plain, bare = (place.root / "graph" / name for name in ("ours", "plain", "bare"))
    for copy in (ours, plain, bare):
        _copy_files(copy)
        remove(copy / ".dvc")
    shutil.copytree(store, ours / ".vpstore", symlinks=True)
    for name in ("dvc.yaml", "dvc.lock"):
        text = (plain / name).read_text()
        (plain / name).write_text(_COMMAND.sub(r"\1 'true'", text))
    _strip(bare)
    for copy in (ours, plain, bare):
        dvc_repository(place, copy)
        place.command(copy, "git", "add", "--all").run()
        place.command(copy, "git", "commit", "-q", "-m", "as built").run()
        # The lock of the copy says what is there, whether or not this checkout has been run to its end.
        place.dvc(copy, "commit", "-q", "--force").run()
        if "Data and pipelines are up to date" not in place.dvc(copy, "status").run().output:
            return None
        place.dvc(copy, "repro", "-q").run()
    place.vpstore(ours, "resolve", "vpMoE").run()
    return ours, plain, bare


def _strip(copy: Path) -> None:
    """Leave each stage its pointers and params."""
    import yaml

    document = yaml.safe_load((copy / "dvc.yaml").read_text())
    for stage in document["stages"].values():
        stage["cmd"] = "true"
        stage["deps"] = [name for name in stage.get("deps", []) if name.startswith("weights/")]
    (copy / "dvc.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    (copy / "dvc.lock").unlink()


def _copy_files(target: Path) -> None:
    """Everything that git tracks or would track, as it is in the working tree, and the pointers."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True).stdout
    for name in listed.decode().split("\0"):
        source = REPOSITORY / name
        if name and source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    for pointers in (REPOSITORY / "weights").glob("*/refs"):
        shutil.copytree(pointers, target / pointers.relative_to(REPOSITORY))
