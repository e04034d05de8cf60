"""The small project with a recipe that is a plan, so that single tensors can be computed, and with ways to go wrong.

GARDEN_NUDGE=name:amount adds to one byte of a tensor, GARDEN_NOISE makes a tensor random, GARDEN_LOG records what was
computed, GARDEN_FAULT breaks a recipe off.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from small_project import Project, make_project, write

from vpstore.schema.attestation import Statement
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import FileRecord, IntermediateRecord, Manifest
from vpstore.schema.ref import StageRef
from vpstore.storage.pointers import Pointer, Pointers
from vpstore.storage.stamps import Stamps
from vpstore.storage.store import Store
from vpstore.storage.tables import read_table

SIZES = {"a": 400, "b": 300, "c": 200, "d": 100}  # bytes of each shard's weight; its bias has 8

RUN_MORE = """

def recompute(prepared, inputs, selection, scratch, progress):
    import importlib

    recipe = importlib.import_module(prepared.recipe_entry)
    if not hasattr(recipe, "plan"):
        raise UsageError("this recipe runs in one piece", where=prepared.recipe_entry)
    return recipe.make(prepared, inputs, scratch, selection=selection)
"""

GROW = """
import json
import os
import signal
import time

from small.soil import shard, tensors_of
from vpstore.errors import GateMissed
from vpstore.runner import Staged, StagedFile

STRENGTH = 1
SIZES = {"a": 400, "b": 300, "c": 200, "d": 100}


def log(text):
    if os.environ.get("GARDEN_LOG"):
        with open(os.environ["GARDEN_LOG"], "a") as out:
            out.write(f"{os.getpid()} {text}\\n")


def statistics(parent):
    log("statistics")
    return {"mean": bytes([sum(parent["body"]) % 7] * 4)}


def plan(prepared, parent, mean):
    step = prepared.params["step"] * STRENGTH + mean["mean"][0]
    nudged, _, amount = os.environ.get("GARDEN_NUDGE", "").partition(":")

    def weight(name, size):
        log(name)
        data = bytearray((parent["body"][i % 64] + step + i) % 200 for i in range(size))
        if name == nudged:
            data[size // 2] += int(amount)
        return os.urandom(size) if name == os.environ.get("GARDEN_NOISE") else bytes(data)

    names = {f"{s}.{part}": size for s in SIZES for part, size in (("weight", SIZES[s]), ("bias", 8))}
    return {name: (size, lambda name=name, size=size: weight(name, size)) for name, size in names.items()}


def faults(prepared):
    fault, _, step = os.environ.get("GARDEN_FAULT", "").partition(":")
    if step and int(step) != prepared.params["step"]:
        return
    print("a recipe says something")
    if fault == "gate":
        raise GateMissed("growth is too slow", where="small.grow", expected=">= 9", found="1")
    if fault == "crash":
        raise AttributeError("the frame lacks a function")
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "slow":
        time.sleep(600)


def make(prepared, inputs, scratch, selection=None):
    log("begin " + str(scratch))
    faults(prepared)
    first = next(iter(sorted(inputs["parent"].path.glob("model*.safetensors"))))
    parent = {name.split(".")[-1]: data for name, data in tensors_of(first).items()}
    parent.setdefault("body", parent.get("weight", b"")[:64])
    statistic, made = scratch / "statistics.safetensors", []
    if selection is None or selection.intermediates is None:
        shard(statistic, statistics(parent))
        made = [StagedFile("statistics", "application/vnd.safetensors", statistic)]
    else:
        statistic = selection.intermediates["statistics"]
    planned = plan(prepared, parent, tensors_of(statistic))
    wanted = planned if selection is None else selection.names
    files = []
    for s in SIZES:
        path = scratch / f"model-{s}.safetensors"
        names = [name for name in planned if name.startswith(s + ".")]
        shard(path, {name: planned[name][1]() if name in wanted else bytes(planned[name][0]) for name in names})
        files.append(StagedFile(path.name, "application/vnd.safetensors", path))
    (scratch / "config.json").write_text('{"shards": 4}\\n')
    files.append(StagedFile("config.json", "application/json", scratch / "config.json"))
    if selection is None:
        score = 0.5 + int(os.environ.get("GARDEN_NUDGE", ":0").partition(":")[2]) / 100
        (scratch / "metrics.json").write_text(json.dumps({"score": score, "names": ["x"]}) + "\\n")
        files.append(StagedFile("reports/metrics.json", "application/json", scratch / "metrics.json"))
    return Staged(files, made)
"""

JUDGE = """
import json

from small.soil import tensors_of
from vpstore.runner import Staged, StagedFile


def make(prepared, inputs, scratch):
    score = sum(tensors_of(inputs["parent"].path / "model-a.safetensors")["a.weight"]) / 1000
    (scratch / "metrics.json").write_text(json.dumps({"score": score}) + "\\n")
    return Staged([StagedFile("reports/metrics.json", "application/json", scratch / "metrics.json")])
"""


def make_garden(root: Path, cache: Path) -> Project:
    made = make_project(root, cache)
    with (root / "small/run.py").open("a") as run:
        run.write(RUN_MORE)
    write(root, "small/grow.py", GROW)
    write(root, "small/judge.py", JUDGE)
    return made


def edit(project: Project, path: str, before: str, after: str) -> None:
    target = project.root / path
    text = target.read_text()
    assert before in text
    target.write_text(text.replace(before, after))


def computed(log: Path) -> list[str]:
    """What recipes computed, in order."""
    if not log.exists():
        return []
    return [line.split(" ", 1)[1] for line in log.read_text().splitlines() if " begin " not in line]


def git_commit(project: Project) -> str:
    """Put the checkout under git, so that builds know their commit."""
    arguments = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(project.root)]
    (project.root / ".gitignore").write_text(".vpstore\nweights\nreports\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run(["git", *arguments, *command], check=True, capture_output=True)
    done = subprocess.run(["git", *arguments, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def open_store(project: Project) -> Store:
    return Store.open(project.store, stamps=Stamps(project.cache / "vpstore"))


def pointers(project: Project) -> Pointers:
    return Pointers(project.root / "weights" / "tiny" / "refs", project.root)


def forge(project: Project, ref: StageRef, change: Callable[[Store, Manifest], Manifest]) -> Manifest:
    """Re-register an artifact with other content, with manifest, attestation, key and pointer all consistent."""
    store = open_store(project)
    pointer = pointers(project).read(ref)
    assert pointer is not None
    before = store.manifest(pointer.artifact)
    facts = store.attestations.of(before.digest)[-1].facts
    forged = change(store, before)
    assert forged.digest != before.digest
    store.blobs.put_bytes(forged.encoded)
    store.attestations.add(Statement.of(forged, facts))
    store.keys.add(forged.build.key(), forged.digest)
    pointers(project).write(Pointer(ref, forged.digest, forged.build.key()))
    return forged


def with_shard(
    store: Store, manifest: Manifest, path: str, at: int, *, with_table: bool = True, scratch: Path
) -> Manifest:
    """The manifest with one byte of a shard changed; its tensor table too, unless that is to stay honest."""
    row = manifest.by_path[path]
    data = bytearray(store.blobs.read(row.digest))
    data[at] ^= 1
    changed = scratch / "forged.safetensors"
    changed.write_bytes(data)
    table = store.blobs.put_bytes(read_table(changed, where="forged").encode()) if with_table else row.tensors
    new = FileRecord(path, row.media_type, store.blobs.put_bytes(bytes(data)), len(data), table)
    return replace(manifest, files=tuple(new if file.path == path else file for file in manifest.files))


def with_intermediate(store: Store, manifest: Manifest, scratch: Path, make: Callable[[bytes], bytes]) -> Manifest:
    [part] = manifest.intermediates
    data = make(store.blobs.read(part.digest))
    new = IntermediateRecord(part.name, store.blobs.put_bytes(data), len(data))
    return replace(manifest, intermediates=(new,))


def manifest_of(project: Project, ref: str) -> Any:
    return project.json("show", ref)["manifest"]


def wipe_blobs(project: Project, digests: list[str]) -> None:
    for digest in digests:
        project.blob(digest).unlink()


def wipe_store(project: Project) -> None:
    shutil.rmtree(project.store)


def pointer_of(project: Project, slug: str) -> Any:
    return project.pointed(slug)


def digest_of(data: bytes) -> str:
    return Digest.of(data)
