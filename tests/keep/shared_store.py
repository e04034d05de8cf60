"""Checkouts that share one store, and what tests ask about it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_project import Project, make_project

from vpstore.collecting.judging import Collection, Terms
from vpstore.schema.digest import Digest
from vpstore.storage.stamps import Stamps
from vpstore.storage.store import Store
from vpstore.verbs.gc import collect
from vpstore.workspace import Workspace

STAGES = ("seed@main", "plant@sprout", "plant@bloom")


class Member(Project):
    """One checkout of several that share a store."""

    @property
    def store(self) -> Path:
        return Path(self.environment["VPSTORE_ROOT"])

    def set_steps(self, *, sprout: int = 1, bloom: int = 2) -> None:
        """Make the configs call for other artifacts."""
        (self.root / "configs/plant.toml").write_text(f"[sprout]\nstep = {sprout}\n[bloom]\nstep = {bloom}\n")

    def build(self, *refs: str) -> dict[str, str]:
        """Build; which artifact each ref is now."""
        return {row["ref"]: row["artifact"] for row in self.json("build", *(refs or STAGES))["builds"]}

    def gc(self, *options: str, code: int = 0) -> Any:
        """The real command, with no grace."""
        return self.json("gc", "--grace", "0", *options, code=code)

    def work(self) -> Workspace:
        """A workspace in this process."""
        return Workspace.find(self.root)

    def collect(self, *, grace: float = 0, forget: Iterable[Path] = (), **terms: bool) -> Collection:
        """gc in this process, where a test can break it."""
        return collect(self.work(), Terms(grace_seconds=grace, **terms), forget=forget)

    def drop(self, ref: str, *kinds: str) -> None:
        """Remove the pointer, the views or the lock entry of a ref by hand."""
        name, stage = ref.split("@")
        if "pointer" in kinds:
            self.pointer(f"{name}-{stage}").unlink()
        if "view" in kinds:
            for view in (self.root / "weights/tiny").glob(f"{ref}-*"):
                remove(view)
        if "lock" in kinds:
            document = json.loads((self.root / "vpstore.lock").read_text())
            del document["profiles"]["tiny"][ref]
            (self.root / "vpstore.lock").write_text(json.dumps(document, indent=2) + "\n")

    def verify(self) -> None:
        """Everything that refs lead to and everything in the store is whole."""
        self.run("verify", "--all")
        for ref in STAGES:
            if self.pointer(ref.replace("@", "-")).exists():
                self.run("resolve", ref, "--full")


@dataclass
class Team:
    """A folder with a store and checkouts."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "store"

    def checkout(self, name: str, **steps: int) -> Member:
        """A new checkout in which nothing is built."""
        root = self.folder / name
        root.mkdir()
        made = make_project(root, self.folder / f"{name}-cache")
        member = Member(made.root, made.cache, {"VPSTORE_ROOT": str(self.root)})
        member.set_steps(**steps)
        return member

    @property
    def store(self) -> Store:
        return Store.open(self.root, stamps=Stamps(self.folder / "stamps"))

    def blobs(self) -> set[Digest]:
        return set(self.store.blobs.all())

    def has(self, artifact: str) -> bool:
        """Whether an artifact and all that it needs, its ancestors too, is here."""
        store = self.store
        left = [Digest(artifact)]
        while left:
            digest = left.pop()
            if not store.blobs.is_whole(digest):
                return False
            manifest = store.manifest(digest)
            if not all(store.blobs.is_whole(blob) for blob in manifest.blobs()):
                return False
            left += [row.artifact for row in manifest.build.inputs]
        return True

    def names(self) -> set[str]:
        """Every artifact that a key or an attestation names, as hex digits."""
        store = self.store
        return {path.name for path in store.keys.claims()} | {a.hex for a in store.attestations.artifacts()}

    def check_names(self) -> None:
        """No name leads to missing bytes."""
        assert [name for name in sorted(self.names()) if not self.has(f"blake3:{name}")] == []


def remove(path: Path) -> None:
    """As `rm -r`."""
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            remove(inner)
        path.rmdir()
    else:
        path.unlink()


def unload_recipes() -> None:
    """Forget the modules of a project that was worked on in this process; the next one has modules of these names."""
    for name in [name for name in sys.modules if name == "small" or name.startswith("small.")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def reasons(document: Any, kind: str = "blob") -> dict[str, tuple[bool, str]]:
    """name -> (goes, why) of one kind of things."""
    return {row["name"]: (row["goes"], row["why"]) for row in document["things"] if row["kind"] == kind}
