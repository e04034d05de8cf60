"""One byte class after another is damaged, looked at and put back; runs in a forked process in a small project.

Damage is as a bad disk does it: the file keeps its inode, its mode and its mtime. For each damage every command that
promises to find it is asked, and `resolve` is asked whether it would serve wrong bytes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disk_scenarios import files_of
from small_project import pointed

from vpstore.errors import VpstoreError
from vpstore.schema.digest import Digest
from vpstore.schema.lockfile import Lockfile
from vpstore.schema.ref import StageRef
from vpstore.storage import atomic
from vpstore.storage.pointers import Pointer, decode_known
from vpstore.storage.remotes.directory import DirectoryRemote
from vpstore.storage.stamps import cache_directory
from vpstore.workspace import Workspace

REF = "plant@bloom"
Finder = Callable[[Workspace], bool]


@dataclass(frozen=True)
class ByteClass:
    """One sort of bytes: where one lies, and which commands promise to find damage in it."""

    name: str
    path: Callable[[Workspace], Path]
    finders: tuple[str, ...]
    prepare: Callable[[Workspace], None] = lambda work: None
    span: Callable[[Workspace], tuple[int, int]] | None = None  # which of its bytes; all, if not given
    same: Callable[[bytes, bytes], bool] = lambda before, after: False  # whether damage has changed no meaning
    mends: bool = False  # resolve puts it right and says so


# How each command is asked.


def _verify(work: Workspace) -> bool:
    from vpstore.api.reading import verify

    return not verify(REF, work=work).is_ok


def _verify_all(work: Workspace) -> bool:
    from vpstore.api.reading import verify

    return not verify(everything=True, work=work).is_ok


def _verify_remote(work: Workspace) -> bool:
    from vpstore.sharing.plan import Wanted
    from vpstore.verbs.remote_check import check_remote

    wanted = [Wanted(_artifact(work), REF, ref=StageRef("plant", "bloom"))]
    return bool(check_remote(work, wanted, _remote(), workers=1))


def _resolve(work: Workspace) -> bool:
    from vpstore.api.reading import resolve

    return _refuses(lambda: resolve(REF, work=work))


def _locked(work: Workspace) -> bool:
    from vpstore.api.reading import resolve

    return _refuses(lambda: [resolve(str(ref), work=work, locked=True) for ref in work.checkout.objects.order])


def _lock_check(work: Workspace) -> bool:
    from vpstore.api.building import lock_check

    return bool(lock_check(work=work))


def _audit(work: Workspace) -> bool:
    import vpstore.verbs.audit as module
    from vpstore.api.auditing import audit
    from vpstore.stale import Answer
    from vpstore.verbs.audit import Strictness

    # What is stale is no fault here, and asking it takes a process each time.
    module.ask = lambda work, artifacts: dict.fromkeys(artifacts, Answer())

    strict = Strictness(locked=True)
    return any(not audit(str(ref), work=work, strictness=strict).is_ok for ref in work.checkout.objects.order)


def _refuses(call: Callable[[], Any]) -> bool:
    try:
        call()
    except VpstoreError:
        return True
    return False


FINDERS: dict[str, Finder] = {
    "verify": _verify, "verify --all": _verify_all, "verify --remote": _verify_remote, "resolve": _resolve,
    "resolve --locked": _locked, "lock --check": _lock_check, "audit --locked": _audit,
}  # fmt: skip


# Where each class lies.


def _artifact(work: Workspace) -> Digest:
    return Digest(pointed(Path("weights/tiny/refs/plant-bloom.json"))["artifact"])


def _blob(choose: Callable[[Any], str]) -> Callable[[Workspace], Path]:
    return lambda work: work.store.blobs.path(Digest(choose(work.store.manifest(_artifact(work)))))


def _shard_span(choose: Callable[[Any], tuple[int, int]]) -> Callable[[Workspace], tuple[int, int]]:
    def span(work: Workspace) -> tuple[int, int]:
        row = work.store.manifest(_artifact(work)).by_path["model.safetensors"]
        assert row.tensors is not None
        return choose(json.loads(work.store.blobs.read(row.tensors)))

    return span


def _file(path: str) -> Callable[[Workspace], Path]:
    return _blob(lambda manifest: manifest.by_path[path].digest)


def _key_file(work: Workspace) -> Path:
    key = work.store.manifest(_artifact(work)).build.key()
    return next(work.store.keys.folder(key).iterdir())


def _attestation(work: Workspace, suffix: str = ".json") -> Path:
    folder = work.store.attestations.folder(_artifact(work))
    return next(path for path in sorted(folder.iterdir()) if path.suffix == suffix)


def _view(work: Workspace) -> Path:
    return work.checkout.views / f"{REF}-{_artifact(work).short}"


def _remote() -> DirectoryRemote:
    return DirectoryRemote(Path("remote").absolute(), "shelf")


def _remote_object(prefix: str, choose: Callable[[Workspace], str]) -> Callable[[Workspace], Path]:
    def path(work: Workspace) -> Path:
        found = Path("remote/vpstore") / prefix / choose(work)
        return found if found.is_file() else next(found.iterdir())

    return path


def _fan(digits: str) -> str:
    return f"{digits[:2]}/{digits[2:]}"


# What has to be there first.


def _push(work: Workspace) -> None:
    from vpstore.sharing.plan import Wanted
    from vpstore.verbs.push import push

    Path("remote").mkdir()
    push(work, [Wanted(_artifact(work), REF, ref=StageRef("plant", "bloom"))], _remote(), workers=1)


def _sign(work: Workspace) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    from vpstore.api.signing import attest

    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    Path("release.pem").write_bytes(pem)
    Path("release.pem").chmod(0o600)
    Path("trusted").mkdir()
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    Path("trusted/release.pem").write_bytes(public)
    text = Path("pyproject.toml").read_text()
    Path("pyproject.toml").write_text(text + 'trusted_keys = "trusted"\n')
    attest(REF, key=Path("release.pem"), work=Workspace.find(Path.cwd()))


def _stamp(work: Workspace) -> None:
    """Have every blob read and stamped, which needs files that are at rest."""
    time.sleep(0.1)
    _verify_all(work)


def _copies(work: Workspace) -> None:
    """A view of copies, as on a file system without links."""
    from vpstore.api.reading import resolve

    def no_links(target: Path, text: str) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    shutil.rmtree(_view(work))
    real, atomic.link = atomic.link, no_links
    resolve(REF, work=work)
    atomic.link = real
    assert not (_view(work) / "model.safetensors").is_symlink()


def _same_pointer(before: bytes, after: bytes) -> bool:
    known = decode_known(Path("weights/tiny/refs/plant-bloom.artifact").read_bytes(), where="")
    return Pointer.decode(before, where="", artifacts=known) == Pointer.decode(after, where="", artifacts=known)


def _same_lock(before: bytes, after: bytes) -> bool:
    return Lockfile.decode(before, where="") == Lockfile.decode(after, where="")


BLOB = ("verify", "resolve")
SHARD = "model.safetensors"
CLASSES = (
    ByteClass("manifest", _blob(lambda manifest: manifest.digest), BLOB),
    ByteClass("tensor table", _blob(lambda manifest: manifest.by_path[SHARD].tensors), BLOB),
    ByteClass("safetensors header", _file(SHARD), BLOB, span=_shard_span(lambda table: tuple(table["header"]["span"]))),
    ByteClass("tensor data", _file(SHARD), BLOB,
              span=_shard_span(lambda table: (table["header"]["span"][1], table["size_bytes"]))),
    ByteClass("another file of an artifact", _file("reports/metrics.json"), BLOB),
    ByteClass("provenance.json", _file("provenance.json"), BLOB),
    ByteClass("intermediate", _blob(lambda manifest: manifest.intermediates[0].digest), BLOB),
    ByteClass("recipe file", _blob(lambda manifest: manifest.build.recipe_files[1].digest), BLOB),
    ByteClass("key", _key_file, ("verify", "verify --all")),
    ByteClass("attestation", _attestation, ("verify", "verify --all")),
    ByteClass("signed envelope", lambda work: _attestation(work, ".dsse"), ("verify", "verify --all"), prepare=_sign),
    ByteClass("pointer", lambda work: Path("weights/tiny/refs/plant-bloom.json"), BLOB, same=_same_pointer),
    ByteClass("lock", lambda work: Path("vpstore.lock"), ("audit --locked",), same=_same_lock),
    ByteClass("view, a copied file", lambda work: _view(work) / SHARD, ("verify",), prepare=_copies, mends=True),
    ByteClass("view, a copied manifest", lambda work: _view(work) / "artifact.json", ("verify",), prepare=_copies,
              mends=True),
    ByteClass("view, a file behind its link", lambda work: (_view(work) / SHARD).resolve(), BLOB),
    ByteClass("root of a checkout", lambda work: next((work.store.root / "roots").glob("*.json")), ("verify --all",)),
    ByteClass("format of the store", lambda work: work.store.root / "format", BLOB),
    ByteClass("stat stamps of this person", lambda work: cache_directory() / "stamps.sqlite", (), prepare=_stamp,
              same=lambda before, after: True),
    ByteClass("remote: manifest", _remote_object("blobs/blake3", lambda work: _fan(_artifact(work).hex)),
              ("verify --remote",), prepare=_push),
    ByteClass("remote: shard", _remote_object("blobs/blake3", lambda work: _fan(
        work.store.manifest(_artifact(work)).by_path[SHARD].digest.hex)), ("verify --remote",), prepare=_push),
    ByteClass("remote: key", _remote_object("keys", lambda work: "{0[0]}{0[1]}/{0}".format(
        work.store.manifest(_artifact(work)).build.key().hex)), ("verify --remote",), prepare=_push),
    ByteClass("remote: attestation", _remote_object("attestations", lambda work: _artifact(work).hex),
              ("verify --remote",), prepare=_push),
)  # fmt: skip


def positions(begin: int, end: int, count: int) -> list[int]:
    """At most `count` places, both ends among them; all of them if there are no more."""
    if end - begin <= count:
        return list(range(begin, end))
    return sorted({begin + (end - 1 - begin) * index // (count - 1) for index in range(count)})


def damages(data: bytes, span: tuple[int, int], count: int) -> Iterator[tuple[str, bytes]]:
    """Flipped bits at many places, and the file cut, emptied and grown."""
    for at in positions(*span, count):
        yield f"bit {at % 8} of byte {at}", data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
    for end in positions(0, len(data), max(2, count // 8)):
        yield f"cut to {end} bytes", data[:end]
    yield "one byte more", data + b"\0"
    yield "a line end more", data + b"\n"


def sweep(name: str, count: int, control: str = "") -> dict[str, Any]:
    """Damage one class at up to `count` places.

    Args:    control: a function of negative_controls that breaks the program first.
    Returns: tried, how many each finder found, harmless (the meaning is the same), and what was missed or served wrong.
    """
    wanted = next(row for row in CLASSES if row.name == name)
    work = Workspace.find(Path.cwd())
    wanted.prepare(work)
    work = Workspace.find(Path.cwd())
    if control:
        import negative_controls

        getattr(negative_controls, control)(None)
    path = wanted.path(work)
    data, stat = path.read_bytes(), path.stat()
    truth = files_of(_view(work))
    span = wanted.span(work) if wanted.span is not None else (0, len(data))
    result: dict[str, Any] = {"tried": 0, "harmless": 0, "found": dict.fromkeys(wanted.finders, 0), "wrong": []}
    _expect_none(wanted, result, "before")
    for what, damaged in damages(data, span, count):
        put(path, damaged, stat)
        result["tried"] += 1
        _ask(wanted, what, data, damaged, truth=truth, result=result)
        put(path, data, stat)
    _expect_none(wanted, result, "afterwards")
    return result


def _expect_none(wanted: ByteClass, result: dict[str, Any], when: str) -> None:
    fresh = Workspace.find(Path.cwd())
    if any(FINDERS[finder](fresh) for finder in wanted.finders):
        result["wrong"].append(f"the healthy file is complained about {when}")


def put(path: Path, data: bytes, stat: os.stat_result) -> None:
    """Overwrite in place; mode and mtime as before."""
    if path.exists():
        path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(stat.st_mode & 0o777)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _ask(
    wanted: ByteClass, what: str, before: bytes, after: bytes, *, truth: dict[str, str], result: dict[str, Any]
) -> None:
    found = False
    for finder in wanted.finders:
        try:
            if FINDERS[finder](Workspace.find(Path.cwd())):
                result["found"][finder] += 1
                found = True
        except VpstoreError:  # refused before anything was asked
            result["found"][finder] += 1
            found = True
        except Exception as error:
            result["wrong"].append(f"{what}: {finder} ended with {type(error).__name__}: {error}")
            return
    if not found:
        if _is_same(wanted, before, after):
            result["harmless"] += 1
        else:
            result["wrong"].append(f"{what}: not found")
    if (served := _served()) is not None and served != truth:
        result["wrong"].append(f"{what}: resolve serves wrong bytes")
    elif served is not None and wanted.mends:
        for aside in Path("weights/tiny").glob("*.changed-*"):
            shutil.rmtree(aside)


def _is_same(wanted: ByteClass, before: bytes, after: bytes) -> bool:
    try:
        return wanted.same(before, after)
    except VpstoreError:
        return False


def _served() -> dict[str, str] | None:
    """What resolve shows; None if it refuses."""
    from vpstore.api.reading import resolve

    try:
        return files_of(resolve(REF, work=Workspace.find(Path.cwd())).path)
    except VpstoreError:
        return None
