"""The same damage done to DVC and to vpstore, each by its real commands, and who finds it.

Each trial is a fresh checkout with two versions of a directory of three files, and a local remote; the damage is the
same kind in the same place. A trial is found if one of the tool's own commands fails or says that something is wrong
before anybody is handed the bytes; it is served if a command that ends well hands over bytes that are not the ones that
were published.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from damage_tools import file_of, flip, shown
from small_project import Project, make_project

BIN = Path(sys.executable).parent
CLEAN = ("up to date", "in sync", "everything is up to date")


class Verdict(NamedTuple):
    """What one tool made of one trial."""

    found: bool
    served: bool  # wrong bytes were handed over as right
    mended: bool | None = None  # whether the tool's own way to mend it did; None where that is not asked


@dataclass
class Dvc:
    """A git and DVC repository with one tracked directory and a local remote."""

    root: Path
    home: Path

    @classmethod
    def create(cls, folder: Path, *, verify: bool = False) -> Dvc:
        made = cls(folder / "repo", folder)
        made.root.mkdir(parents=True)
        made.run("git", "init", "-q", "-b", "main")
        made.run("dvc", "init", "-q")
        made.run("dvc", "remote", "add", "-q", "-d", "shelf", str(folder / "shelf"))
        if verify:
            made.run("dvc", "remote", "modify", "shelf", "verify", "true")
        made.write(b"first")
        made.run("dvc", "add", "-q", "model")
        made.commit()
        return made

    def write(self, salt: bytes) -> None:
        (self.root / "model").mkdir(exist_ok=True)
        for name in ("a.bin", "b.bin", "c.bin"):
            path = self.root / "model" / name
            path.unlink(missing_ok=True)
            path.write_bytes((salt + name.encode()) * 3000)

    def run(self, *command: str, code: int | None = 0) -> str:
        variables = _variables(self.home) | {"DVC_SITE_CACHE_DIR": str(self.home / "site")}
        for who in ("AUTHOR", "COMMITTER"):
            variables |= {f"GIT_{who}_NAME": "faults", f"GIT_{who}_EMAIL": "faults@example.org"}
        done = subprocess.run(
            command, cwd=self.root, env=variables, text=True, capture_output=True, timeout=120, check=False
        )
        self.code = done.returncode
        assert code is None or done.returncode == code, (command, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def is_clean(self, *command: str) -> bool:
        """Whether a status command ends well and complains of nothing."""
        said = self.run(*command, code=None).lower()
        return self.code == 0 and any(text in said for text in CLEAN)

    def commit(self) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "-q", "-m", "state")

    def objects(self, place: Path) -> list[Path]:
        """The files of the cache or the remote that hold bytes, without directory listings, largest first."""
        found = [path for path in place.rglob("*") if path.is_file() and path.suffix != ".dir" and len(path.name) == 30]
        return sorted(found, key=lambda path: (-path.stat().st_size, path))

    def clone(self, name: str) -> Dvc:
        self.run("git", "clone", "-q", str(self.root), str(self.home / name))
        return Dvc(self.home / name, self.home)

    def is_right(self, salt: bytes) -> bool:
        files = {path.name: path.read_bytes() for path in (self.root / "model").glob("*.bin")}
        return files == {name: (salt + name.encode()) * 3000 for name in ("a.bin", "b.bin", "c.bin")}


def _variables(home: Path) -> dict[str, str]:
    """The environment of dvc's commands: a home of their own, and the dvc of this Python."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HOME": str(home), "DVC_NO_ANALYTICS": "1"}


def _vpstore(folder: Path) -> Project:
    """The small project, built and locked, with a DVC remote that vpstore uses."""
    (folder / "checkout").mkdir(parents=True)
    made = make_project(folder / "checkout", folder / "cache")
    quiet = _variables(folder)
    for command in (
        ["dvc", "init", "-q", "--no-scm"],
        ["dvc", "remote", "add", "-q", "-d", "shelf", str(folder / "shelf")],
    ):
        subprocess.run(command, cwd=made.root, env=quiet, check=True, capture_output=True)
    made.run("build", "--all")
    made.run("lock")
    return made


def _clone(project: Project, name: str) -> Project:
    """What git would bring: configs, code and the lock, without store and weights."""
    target = project.root.parent / name
    shutil.copytree(
        project.root, target, symlinks=True, ignore=shutil.ignore_patterns(".vpstore", "weights", "reports")
    )
    return Project(target, project.root.parent / f"{name}-cache")


def _ends(project: Project, *arguments: str) -> int:
    """The exit code of a command."""
    environment = project.variables()
    return subprocess.run(
        project.command(*arguments), cwd=project.root, env=environment, capture_output=True
    ).returncode


def _serves(project: Project, truth: bytes) -> bool:
    """Whether resolve hands over anything that is not what was built."""
    done = subprocess.run(
        project.command("resolve", "plant"), cwd=project.root, env=project.variables(), text=True, capture_output=True
    )
    return done.returncode == 0 and (Path(done.stdout.strip()) / "model.safetensors").read_bytes() != truth


def _shard(project: Project) -> Path:
    return project.blob(file_of(shown(project), "model.safetensors")["digest"])


# The trials: the same for both.


def cache_bit_dvc(folder: Path, at: int) -> Verdict:
    dvc = Dvc.create(folder)
    flip(dvc.objects(dvc.root / ".dvc" / "cache")[0], at * 997)
    found = not dvc.is_clean("dvc", "status")
    dvc.run("dvc", "push", code=None)
    found = found or dvc.code != 0 or not dvc.is_clean("dvc", "status", "-c")
    clone = dvc.clone("clone")
    clone.run("dvc", "pull", code=None)
    return Verdict(clone.code != 0 or found, clone.code == 0 and not clone.is_right(b"first"))


def cache_bit_vpstore(folder: Path, at: int) -> Verdict:
    project = _vpstore(folder)
    shard = _shard(project)
    truth = shard.read_bytes()
    flip(shard, at * 37 % len(truth))
    found = _ends(project, "resolve", "plant") != 0 and _ends(project, "push") != 0
    clone = _clone(project, "clone")
    _ends(clone, "pull")
    return Verdict(found, _serves(project, truth) or _serves(clone, truth))


def remote_bit_dvc(folder: Path, at: int) -> Verdict:
    """With `verify = true`."""
    dvc = Dvc.create(folder, verify=True)
    dvc.run("dvc", "push")
    damaged = dvc.objects(folder / "shelf")[0]
    flip(damaged, at * 997)
    before = damaged.read_bytes()
    clone = dvc.clone("clone")
    clone.run("dvc", "pull", code=None)
    found, served = clone.code != 0, clone.code == 0 and not clone.is_right(b"first")
    dvc.run("dvc", "push", code=None)  # from where it is healthy
    return Verdict(found, served, damaged.exists() and damaged.read_bytes() != before)


def remote_bit_vpstore(folder: Path, at: int) -> Verdict:
    project = _vpstore(folder)
    truth = _shard(project).read_bytes()
    project.run("push")
    damaged = next(path for path in (folder / "shelf").rglob(_shard(project).name))
    flip(damaged, at * 37 % len(truth))
    clone = _clone(project, "clone")
    found = _ends(clone, "pull") != 0
    served = _serves(clone, truth)
    _ends(project, "repair", "--to-remote", "shelf")
    return Verdict(found, served, damaged.read_bytes() == truth)


def remote_missing_dvc(folder: Path, at: int) -> Verdict:
    """A blob is gone while the directory's listing is there."""
    dvc = Dvc.create(folder)
    dvc.run("dvc", "push")
    lost = dvc.objects(folder / "shelf")[at % 3]
    lost.unlink()
    shutil.rmtree(folder / "site", ignore_errors=True)  # as on another machine
    found = not dvc.is_clean("dvc", "status", "-c")
    dvc.run("dvc", "push", code=None)
    return Verdict(found, served=False, mended=lost.exists())


def remote_missing_vpstore(folder: Path, at: int) -> Verdict:
    project = _vpstore(folder)
    project.run("push")
    lost = next(path for path in (folder / "shelf").rglob(_shard(project).name))
    lost.unlink()
    found = _ends(project, "verify", "--remote") != 0
    project.run("push")
    return Verdict(found, served=False, mended=lost.exists())


def overwritten_dvc(folder: Path, at: int) -> Verdict:
    """Somebody writes over the output and registers it anew; who relies on it asks whether all is well."""
    dvc = Dvc.create(folder)
    path = dvc.root / "model" / "b.bin"
    path.unlink()
    path.write_bytes(b"forged%d" % at * 2000)
    dvc.run("dvc", "commit", "-q", "-f")
    found = not dvc.is_clean("dvc", "status")
    dvc.commit()
    dvc.run("dvc", "push", "-q")
    clone = dvc.clone("clone")
    clone.run("dvc", "pull", "-q", code=None)
    return Verdict(found, clone.code == 0 and not clone.is_right(b"first"))


def overwritten_vpstore(folder: Path, at: int) -> Verdict:
    """The shard is overwritten, and a manifest, key, attestation and pointer are made to fit; the lock is git's."""
    project = _vpstore(folder)
    truth = _shard(project).read_bytes()
    _reregister(project, b"forged%d" % at)
    found = _ends(project, "audit", "plant") != 0
    return Verdict(found, _ends(project, "resolve", "plant", "--locked") == 0 and _serves(project, truth))


def _reregister(project: Project, salt: bytes) -> None:
    """What a forger would do: new bytes in the store under their own digest, and everything that leads to them."""
    from vpstore.schema.canonical import canonical_bytes
    from vpstore.schema.digest import Digest

    def put(data: bytes) -> Digest:
        digest = Digest.of(data)
        path = project.blob(digest)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return digest

    document = shown(project)
    manifest = json.loads(project.blob(document["artifact"]).read_bytes())
    row = next(row for row in manifest["files"] if row["path"] == "model.safetensors")
    data = project.blob(row["digest"]).read_bytes()
    forged = data[: -len(salt)] + salt
    table = json.loads(project.blob(row["tensors"]).read_bytes())
    for tensor in table["tensors"]:
        tensor["digest"] = Digest.of(forged[slice(*tensor["span"])])
    row["digest"], row["tensors"] = put(forged), put(canonical_bytes(table))
    artifact = put(canonical_bytes(manifest))
    key = document["key"]
    (project.store / "keys" / key[7:9] / key[7:] / artifact[7:]).write_bytes(
        canonical_bytes({"format": 1, "key": key, "artifact": artifact})
    )
    statement = document["attestations"][0]
    statement["subject"][0]["digest"]["blake3"] = artifact[7:]
    folder = project.store / "attestations" / artifact[7:]
    folder.mkdir()
    (folder / f"{Digest.of(canonical_bytes(statement)).hex}.json").write_bytes(canonical_bytes(statement))
    pointer = project.pointer("plant-bloom")
    pointer.write_text(json.dumps({**json.loads(pointer.read_text()), "artifact": artifact}))


def edited_lock_dvc(folder: Path, at: int) -> Verdict:
    """The digests of another stage's output are written by hand into dvc.lock; both are in the cache."""
    dvc = Dvc.create(folder)
    for name in ("one", "two"):
        dvc.run("dvc", "stage", "add", "-q", "-n", name, "-o", f"{name}.txt", f"echo {name}{at} > {name}.txt")
    dvc.run("dvc", "repro", "-q")
    lock = dvc.root / "dvc.lock"
    lines = lock.read_text().splitlines()
    sums = [index for index, line in enumerate(lines) if "md5:" in line]
    lines[sums[1]], lines[sums[0]] = lines[sums[0]], lines[sums[1]]
    lock.write_text("\n".join(lines) + "\n")
    (dvc.root / "two.txt").unlink()
    dvc.run("dvc", "checkout", "-q", "two", code=None)
    served = dvc.code == 0 and (dvc.root / "two.txt").read_text() != f"two{at}\n"
    return Verdict(not dvc.is_clean("dvc", "status", "two"), served)


def edited_lock_vpstore(folder: Path, at: int) -> Verdict:
    """The artifact of another stage is written by hand into pointer and lock; both are in the store."""
    project = _vpstore(folder)
    truth = _shard(project).read_bytes()
    sprout, bloom = project.pointed("plant-sprout"), project.pointed("plant-bloom")
    forged = {**bloom, "artifact": sprout["artifact"], "key": sprout["key"]}
    project.pointer("plant-bloom").write_text(json.dumps(forged))
    lock = project.root / "vpstore.lock"
    document: Any = json.loads(lock.read_text())
    document["profiles"]["tiny"]["plant@bloom"] = document["profiles"]["tiny"]["plant@sprout"]
    lock.write_text(json.dumps(document))
    return Verdict(_ends(project, "resolve", "plant") != 0, _serves(project, truth))


def killed_push_dvc(folder: Path, at: int) -> Verdict:
    """Killed at the n-th rename; then pushed again. A name with other bytes on the remote is served."""
    dvc = Dvc.create(folder)
    _strace(["dvc", "push"], at, dvc.root, _variables(folder))
    dvc.run("dvc", "push", code=None)
    clone = dvc.clone("clone")
    clone.run("dvc", "pull", code=None)
    return Verdict(True, clone.code == 0 and not clone.is_right(b"first"), clone.code == 0 and clone.is_right(b"first"))


def killed_push_vpstore(folder: Path, at: int) -> Verdict:
    project = _vpstore(folder)
    truth = _shard(project).read_bytes()
    _strace(project.command("push"), at, project.root, project.variables())
    project.run("push")
    clone = _clone(project, "clone")
    is_pulled = _ends(clone, "pull") == 0 and _ends(clone, "resolve", "plant") == 0
    return Verdict(True, _serves(clone, truth), is_pulled)


def _strace(command: list[str], at: int, root: Path, variables: dict[str, str]) -> None:
    calls = "rename,renameat,renameat2"
    subprocess.run(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e",
         f"inject={calls}:signal=SIGKILL:when={at * 2 + 1}", *command],
        cwd=root, env=variables, capture_output=True, timeout=120, check=False,
    )  # fmt: skip


def made_durable(command: list[str], root: Path, variables: dict[str, str], *, place: str) -> tuple[int, int]:
    """How many of the files that a command puts under `place` were fsynced before they got their names, and how many
    there are in all."""
    trace = root.parent / "trace"
    before = set((root / place).rglob("*"))
    subprocess.run(
        ["strace", "-f", "-qq", "-y", "-s", "4096", "-o", str(trace),
         "-e", "trace=fsync,fdatasync,rename,renameat,renameat2", *command],
        cwd=root, env=variables, capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    new = {str(path) for path in set((root / place).rglob("*")) - before if path.is_file()}
    synced: set[str] = set()
    durable: set[str] = set()
    for line in trace.read_text().splitlines():
        if match := re.search(r"sync\(\d+<([^>]+)>", line):
            synced.add(match[1])
        elif (names := re.findall(r'"([^"]+)"', line)) and len(names) == 2 and names[0] in synced:
            durable.add(names[1])
    return len(new & (durable | synced)), len(new)


def count_durable(folder: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of storing three new files: `dvc add`, and a build."""
    dvc = Dvc.create(folder / "dvc")
    dvc.write(b"second")
    variables = _variables(dvc.home)
    theirs = made_durable(["dvc", "add", "model"], dvc.root, variables, place=".dvc/cache/files")
    project = _vpstore(folder / "vpstore")
    (project.root / "configs" / "plant.toml").write_text("[sprout]\nstep = 5\n[bloom]\nstep = 5\n")
    command = project.command("build", "plant@sprout")
    return theirs, made_durable(command, project.root, project.variables(), place=".vpstore/blobs")


Trial = Callable[[Path, int], Verdict]
TRIALS: dict[str, tuple[Trial, Trial]] = {
    "a flipped bit in the cache, mode kept; status, push, pull elsewhere": (cache_bit_dvc, cache_bit_vpstore),
    "a flipped bit on the remote (DVC: `verify = true`); pull, then push from a healthy clone":
        (remote_bit_dvc, remote_bit_vpstore),
    "an object missing on the remote; status, then push": (remote_missing_dvc, remote_missing_vpstore),
    "bytes overwritten and registered again; status or audit": (overwritten_dvc, overwritten_vpstore),
    "digests edited by hand in the lock": (edited_lock_dvc, edited_lock_vpstore),
    "push killed at the n-th rename, then pushed again": (killed_push_dvc, killed_push_vpstore),
}  # fmt: skip
