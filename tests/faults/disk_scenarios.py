"""What is done on the faulty disk, and what is looked at afterwards; everything here runs in forked processes.

A scenario is a function that is given `acknowledge`, which it calls whenever something is finished and said to be: what
was acknowledged before a fault must survive it. Scenarios are re-runnable: the retry calls the same function again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import remote_scenarios
from faulty_disk import Fault, FaultyDisk, Journal
from small_project import pointed

from vpstore.errors import NoStore, VpstoreError
from vpstore.schema.digest import Digest
from vpstore.schema.ref import StageRef
from vpstore.storage import atomic, system
from vpstore.workspace import Workspace

Acknowledge = Callable[[str, str], None]
BLOOM = StageRef("plant", "bloom")
PAYLOADS = {name: name.encode() * 500 for name in ("put_bytes", "put_copy", "take")}
LITTER = re.compile(r"\.?\d+-[0-9a-f]{16}(\.json)?")
# What EIO or a full disk may be answered with, besides success: ours, with a next step.
TEMPORARY = {"work", "locks"}


def build_chain(acknowledge: Acknowledge) -> None:
    """Publish, or a cache hit: whatever the configs call for."""
    from vpstore.api.building import build

    work = Workspace.find(Path.cwd(), create=True)
    for ref in ("plant@sprout", "plant@bloom"):
        built = build(ref, work=work)[0]
        acknowledge(ref, built.manifest.digest)


def build_seed(acknowledge: Acknowledge) -> None:
    """The first build of all: makes the store."""
    from vpstore.api.building import build

    built = build("seed", work=Workspace.find(Path.cwd(), create=True))[0]
    acknowledge("seed@main", built.manifest.digest)


def show_view(acknowledge: Acknowledge) -> None:
    """resolve of a ref whose view was changed."""
    from vpstore.api.reading import resolve

    acknowledge("plant@bloom", resolve("plant", work=Workspace.find(Path.cwd())).artifact)


def write_pointer(acknowledge: Acknowledge) -> None:
    """A pointer from one sound artifact to another."""
    from vpstore.storage.pointers import Pointer

    work = Workspace.find(Path.cwd())
    wanted = json.loads((work.checkout.root / "wanted.json").read_text())
    with atomic.disk_errors(work.checkout.views, "writing the pointer"):
        artifact, key, content = (Digest(wanted[part]) for part in ("artifact", "key", "content"))
        work.store.roots.hold(work.checkout.root, f"tiny/{BLOOM}", artifact)
        work.checkout.pointers.write(Pointer(BLOOM, artifact, key, content))
    acknowledge(str(BLOOM), artifact)


def write_lock(acknowledge: Acknowledge) -> None:
    """`vpstore lock` of everything."""
    from vpstore.api.building import lock

    work = Workspace.find(Path.cwd())
    lock(work=work)
    acknowledge("lock", work.checkout.lock().profiles["tiny"][BLOOM].artifact)


def write_claims(acknowledge: Acknowledge) -> None:
    """An attestation, then a key file, both of which had been lost."""
    work = Workspace.find(Path.cwd())
    pointer = work.checkout.pointers.read(BLOOM)
    assert pointer is not None
    saved = next((work.checkout.root / "saved").glob("*/*.json"))
    with atomic.disk_errors(work.store.root, "attesting"):
        work.store.attestations.add(work.store.attestations.read(saved))
        work.store.keys.add(pointer.key, pointer.artifact)
    acknowledge(str(BLOOM), pointer.artifact)


def replace_damaged(acknowledge: Acknowledge) -> None:
    """The three ways to store a blob, each over a damaged one."""
    work = Workspace.find(Path.cwd())
    blobs, outside = work.store.blobs, work.checkout.root / "outside"
    with atomic.disk_errors(work.store.root, "storing a blob"):
        blobs.put_bytes(PAYLOADS["put_bytes"])
        (outside / "copied").write_bytes(PAYLOADS["put_copy"])
        blobs.put_copy(outside / "copied")
        (work.store.root / "work" / "taken").write_bytes(PAYLOADS["take"])
        blobs.take(work.store.root / "work" / "taken", Digest.of(PAYLOADS["take"]))
        work.store.settle()
    for data in PAYLOADS.values():
        acknowledge("blob", Digest.of(data))


def hold_roots(acknowledge: Acknowledge) -> None:
    """What a checkout and a running process hold."""
    work = Workspace.find(Path.cwd())
    pointer = work.checkout.pointers.read(BLOOM)
    assert pointer is not None
    with atomic.disk_errors(work.store.root, "registering"):
        with work.store.roots.running(artifacts=[pointer.artifact]):
            work.store.roots.hold(work.checkout.root, "tiny/spare@one", pointer.artifact)
        work.store.roots.hold(Path("/elsewhere"), "tiny/spare@two", pointer.artifact)
        work.store.roots.forget(Path("/elsewhere"))
    acknowledge("root", pointer.artifact)


# What is run in a child: one attempt with a fault, and the look at what is left of it.


def attempt(scenario: str, kind: str | None, at: int, side: str, control: str = "") -> dict[str, Any]:
    """Run a scenario once on a faulty disk.

    Returns: the calls that were made, and the error as fields of ours; other exceptions leave as a traceback.
    """
    disk = FaultyDisk(Journal.load(Path(side) / "journal"), Fault(kind, at) if kind else None)
    _begin(control, disk)
    error = _run(scenario, Path(side) / "acknowledged")
    disk.journal.save()
    return {"calls": disk.log, "error": error}


def settle(scenario: str, side: str, control: str = "", is_fresh: bool = False) -> dict[str, Any]:
    """Look at what a fault left, retry without one, look again, cut the power, look again."""
    loose = unfounded()  # before anybody has looked: a reader registers what it meets
    found: dict[str, Any] = {"unfounded": loose, "litter": litter(), "first": resolved(), "early": verified()}
    found["remote"] = remote_scenarios.faults_of_remote(is_complete=False) if Path(".vpstore/format").exists() else []
    disk = FaultyDisk(Journal.load(Path(side) / "journal"))
    _begin(control, disk)
    found["retry"] = _run(scenario, Path(side) / "acknowledged again")
    system.disk = system.Disk()
    if is_fresh:  # which views there are depends on what a reader met before the retry
        resolved()
    found["end"] = signature()
    disk.journal.cut()
    found["last"] = resolved()
    found["faults"] = verified()
    if Path("remote").exists():
        found["faults"] += remote_scenarios.faults_of_remote(is_complete=True)
    found["acknowledged"] = survived(Path(side) / "acknowledged")
    found["acknowledged again"] = survived(Path(side) / "acknowledged again")
    return found


def observe() -> dict[str, Any]:
    """An undisturbed project: what every artifact's view holds, and the end state."""
    return {"first": resolved(), "end": signature(), "faults": verified()}


def _begin(control: str, disk: FaultyDisk) -> None:
    system.disk = disk
    if control:
        import negative_controls

        getattr(negative_controls, control)(disk)


def _run(scenario: str, log: Path) -> dict[str, str] | None:
    def acknowledge(name: str, digest: str) -> None:
        with log.open("a") as out:
            out.write(f"{name} {digest}\n")

    try:
        getattr(remote_scenarios, scenario, globals().get(scenario))(acknowledge)
    except VpstoreError as error:
        return {"kind": type(error).__name__, "what": error.what, "next": error.next_step, "where": error.where}
    return None


def resolved() -> dict[str, Any]:
    """Every ref as a reader meets it: the artifact and a digest of each file that its view shows, or the error."""
    from vpstore.api.reading import resolve

    try:
        work = Workspace.find(Path.cwd())
    except VpstoreError as error:
        return {"store": type(error).__name__}
    found: dict[str, Any] = {}
    for ref in work.checkout.objects.order:
        try:
            row = resolve(str(ref), work=work, full=True)
        except VpstoreError as error:
            found[str(ref)] = {"error": type(error).__name__, "next": error.next_step}
        else:
            found[str(ref)] = {"artifact": row.artifact, "files": files_of(row.path)}
    return found


def files_of(view: Path) -> dict[str, str]:
    """What a view shows, digested by other means than the project's."""
    return {
        path.relative_to(view).as_posix(): hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        for path in sorted(view.rglob("*"))
        if path.is_file()
    }


def verified() -> list[str]:
    from vpstore.api.reading import verify

    try:
        return [
            f"{fault.where}: {fault.found}" for fault in verify(everything=True, work=Workspace.find(Path.cwd())).faults
        ]
    except VpstoreError as error:
        return [f"{type(error).__name__}: {error.what}"]


def unfounded() -> list[str]:
    """What names something that is not here, or that no root keeps: it was written, or the other removed, too early."""
    try:
        work = Workspace.find(Path.cwd())
        held = {artifact for record in work.store.roots.checkouts() for artifact in record.artifacts.values()}
        found = [
            f"a key leads to what is not here: {path.name[:12]}"
            for path in work.store.keys.claims()
            if not work.store.blobs.has(Digest.from_hex(path.name))
        ]
        for ref in work.checkout.objects.order:
            if (pointer := work.checkout.pointers.read(ref)) is not None:
                found += [
                    f"a pointer leads to what is not here: {ref}: {what}" for what in _absent(work, pointer.artifact)
                ]
                found += [f"no root keeps what a pointer names: {ref}"] if pointer.artifact not in held else []
    except NoStore:
        return []
    except VpstoreError as error:
        return [f"{type(error).__name__}: {error.what}"]
    return found


def _absent(work: Workspace, artifact: Digest) -> list[str]:
    if not work.store.blobs.is_whole(artifact):
        return ["manifest"]
    blobs = work.store.manifest(artifact).blobs()
    return [what for digest, what in blobs.items() if not work.store.blobs.is_whole(digest)]


def survived(log: Path) -> list[str]:
    """What was acknowledged and is not here as it was said to be."""
    if not log.exists():
        return []
    try:
        return _lost(log, Workspace.find(Path.cwd()))
    except VpstoreError as error:
        return [f"{type(error).__name__}, {error.what}"]


def _lost(log: Path, work: Workspace) -> list[str]:
    lost = []
    last: dict[str, str] = {}
    for line in log.read_text().splitlines():
        name, digest = line.split(" ")
        last[name] = digest
        if name not in ("root", "remote", "gc") and not work.store.blobs.is_whole(Digest(digest), full=True):
            lost.append(f"blob of {name}")
    for name, digest in last.items():
        if "@" in name and _pointer(work, name) != digest:
            lost.append(f"pointer of {name}")
    if "lock" in last and not work.checkout.lock_path.exists():
        lost.append("lock")
    if "root" in last and "tiny/spare@one" not in {n for r in work.store.roots.checkouts() for n in r.artifacts}:
        lost.append("root")
    return lost


def _pointer(work: Workspace, name: str) -> str | None:
    pointer = work.checkout.pointers.read(StageRef(*name.split("@")))
    return None if pointer is None else pointer.artifact


def litter() -> list[str]:
    """Files under temporary names."""
    found = []
    for folder, folders, files in os.walk("."):
        folders[:] = [name for name in folders if name not in TEMPORARY]
        found += [f"{folder}/{name}" for name in (*folders, *files) if LITTER.fullmatch(name)]
    return sorted(found)


def signature() -> dict[str, str]:
    """The end state: every file that is not temporary, without what differs between two equal runs."""
    pointers = [pointed(path) for path in Path("weights/tiny/refs").glob("*.json")]
    shown = {pointer["artifact"][7:19] for pointer in pointers}
    found: dict[str, str] = {}
    for top in (".vpstore", "weights", "reports", "vpstore.lock", "remote"):
        for folder, folders, files in os.walk(top):
            # Only views that a pointer leads to: which others are there depends on who has looked.
            folders[:] = [name for name in folders if "@" not in name or name.rpartition("-")[2] in shown]
            for name in files:
                _sign(Path(folder) / name, found)
        if Path(top).is_file():
            _sign(Path(top), found)
    return found


def _sign(path: Path, found: dict[str, str]) -> None:
    parts = path.parts
    if {"work", "locks", "tmp", "running", "quarantine"} & set(parts) or path.name.endswith(".intoto.jsonl"):
        return
    if path.name == ".checkout-id" or any(LITTER.fullmatch(part) or ".changed-" in part for part in parts):
        return
    if "attestations" in parts:  # they name times
        found["/".join(parts[:-1])] = "attested"
    elif parts[:2] == (".vpstore", "roots"):  # they name the checkout's own path
        text = path.read_text()
        found["roots"] = json.dumps(sorted(json.loads(text)["artifacts"].items())) if text else "empty"
    elif path.is_symlink():
        found[path.as_posix()] = os.readlink(path)
    else:
        found[path.as_posix()] = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def copy_project(source: str, target: str) -> None:
    """A checkout with everything in it, elsewhere."""
    shutil.copytree(source, target, symlinks=True)


def build_everything() -> None:
    """For the templates."""
    from vpstore.api.building import build_all

    build_all(work=Workspace.find(Path.cwd(), create=True))


def lock_everything() -> None:
    """For the templates."""
    from vpstore.api.building import lock

    lock(work=Workspace.find(Path.cwd()))


def share_everything() -> None:
    """For the templates."""
    from vpstore.api.building import lock

    lock(work=Workspace.find(Path.cwd()))
    remote_scenarios.push_all(lambda name, digest: None)
