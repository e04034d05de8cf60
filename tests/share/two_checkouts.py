"""Two checkouts of the small project with stores of their own, one DVC remote between them, and what lies where."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_project import Project

from vpstore.errors import BadManifest
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Manifest
from vpstore.storage.remotes.base import blob_name
from vpstore.storage.stamps import Stamps
from vpstore.storage.store import Store

STAGES = ("seed@main", "plant@sprout", "plant@bloom", "reports@plant-sprout", "reports@plant-bloom")


@dataclass(frozen=True)
class Pair:
    """Two checkouts and the remote between them."""

    folder: Path
    a: Project
    b: Project

    @property
    def remote(self) -> Path:
        """Where the objects of the remote lie."""
        return self.folder / "remote" / "vpstore"

    def objects(self) -> dict[str, bytes]:
        """Every object of the remote."""
        return objects(self.remote)


def objects(remote: Path) -> dict[str, bytes]:
    found = (path for path in sorted(remote.rglob("*")) if path.is_file())
    names = {path.relative_to(remote).as_posix(): path for path in found}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith("tmp/")}


def configure(project: Project, url: Path | str, name: str = "shared") -> None:
    """Give a checkout one DVC remote."""
    (project.root / ".dvc").mkdir(exist_ok=True)
    text = f"[core]\n    remote = {name}\n    analytics = false\n['remote \"{name}\"']\n    url = {url}\n"
    (project.root / ".dvc" / "config").write_text(text)


def copy_of(template: Pair, folder: Path) -> Project:
    """A's checkout and the remote, elsewhere."""
    shutil.copytree(template.folder / "a", folder / "a", symlinks=True)
    shutil.copytree(template.folder / "remote", folder / "remote")
    project = Project(folder / "a", folder / "a-cache")
    configure(project, folder / "remote")
    return project


def fresh_clone(project: Project, root: Path) -> Project:
    """What git would give: no store, no weights."""
    shutil.copytree(project.root, root, ignore=shutil.ignore_patterns(".vpstore", "weights", "__pycache__"))
    return Project(root, root.with_name(f"{root.name}-cache"))


def take_lock(source: Project, target: Project) -> None:
    """What `git pull` does to a clone: the lock, the configs and the reports of the other."""
    shutil.copy(source.root / "vpstore.lock", target.root / "vpstore.lock")
    for name in ("configs", "reports"):
        shutil.copytree(source.root / name, target.root / name, dirs_exist_ok=True)


def store_of(project: Project) -> Store:
    return Store.open(project.store, stamps=Stamps(project.cache / "stamps"))


def lock_of(project: Project) -> dict[str, Any]:
    """The lock's entries of the profile tiny."""
    return dict(json.loads((project.root / "vpstore.lock").read_text())["profiles"]["tiny"])


def artifact_of(project: Project, ref: str) -> Digest:
    return Digest(lock_of(project)[ref]["artifact"])


def remote_blob(pair: Pair, digest: str) -> Path:
    return pair.remote / blob_name(Digest(digest))


def recipes_run(project: Project, *arguments: str, **more: str) -> list[str]:
    """Run a command; which of the recipes that keep a log ran meanwhile."""
    log = project.cache / "recipes.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    project.run(*arguments, SMALL_LOG=str(log), **more)
    return log.read_text().splitlines() if log.exists() else []


def named_by_remote(remote: Path) -> list[str]:
    """What the remote names and does not have, or has wrong: the invariant of the write order."""
    faults = []
    have = objects(remote)
    for name, data in have.items():
        if name.startswith("blobs/") and blob_name(Digest.of(data)) != name:
            faults.append(f"{name} has other bytes")
        if not name.startswith("keys/"):
            continue
        document = json.loads(data)
        manifest = have.get(blob_name(Digest(document["artifact"])))
        if manifest is None:
            faults.append(f"{name} names a manifest that is not there")
    for artifact, manifest in _manifests(have):
        wanted = [*manifest.blobs(), *(row.artifact for row in manifest.build.inputs)]
        faults += [f"{artifact} lacks {digest}" for digest in wanted if blob_name(digest) not in have]
    for name in have:
        if name.startswith("attestations/") and blob_name(Digest.from_hex(name.split("/")[1])) not in have:
            faults.append(f"{name} is about a manifest that is not there")
    return faults


def _manifests(have: dict[str, bytes]) -> list[tuple[Digest, Manifest]]:
    found = []
    for name, data in have.items():
        if name.startswith("blobs/"):
            try:
                found.append((Digest.of(data), Manifest.decode(data, where=name)))
            except BadManifest:
                continue
    return found
