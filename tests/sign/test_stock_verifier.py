"""Model Signing bundles against the real `model_signing` command, which knows nothing of this project."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from damage_tools import flip
from signing_tools import Keys, payload_of, stock, stock_command, with_payload
from small_project import Project

from vpstore.schema.model_signing import signing_statement

pytest.importorskip("model_signing")
LINKS = "--allow_symlinks"
BAD_SIGNATURE = "Verification failed with error:"  # and nothing more: so the verifier says that the signature is wrong


@dataclass(frozen=True)
class Place:
    """A directory with its bundle, and what the verifier needs to look at it."""

    directory: Path
    bundle: Path
    public: Path
    flags: tuple[str, ...]

    def verify(self, **other: Path) -> subprocess.CompletedProcess[str]:
        return stock(self.directory, self.bundle, other.get("public", self.public), *self.flags)


def signed(project: Project, keys: Keys, kind: str = "p256", *, exported: bool) -> Place:
    """An artifact signed, shown as a view or exported."""
    bundle = project.root.parent / "plant.sig"
    project.run("attest", "plant", "--key", str(keys.private(kind)), "-o", str(bundle))
    if exported:
        folder = project.root.parent / "handed-out"
        project.run("export", "plant", str(folder))
        return Place(folder, bundle, keys.public(kind), ())
    view = Path(project.run("resolve", "plant").stdout.strip())
    is_linked = (view / "model.safetensors").is_symlink()
    return Place(view, bundle, keys.public(kind), (LINKS,) if is_linked else ())


def edit_payload(place: Place, change: Callable[[Any], None]) -> None:
    document = json.loads(place.bundle.read_text())
    payload = payload_of(document["dsseEnvelope"])
    change(payload)
    place.bundle.write_text(json.dumps({**document, "dsseEnvelope": with_payload(document["dsseEnvelope"], payload)}))


def flipped_shard(place: Place) -> None:
    flip(place.directory / "model.safetensors", -1)


def flipped_manifest(place: Place) -> None:
    flip(place.directory / "artifact.json", 20)


def missing_file(place: Place) -> None:
    (place.directory / "reports/metrics.json").unlink()


def extra_file(place: Place) -> None:
    (place.directory / "reports/more.txt").write_text("x")


def other_digest(place: Place) -> None:
    edit_payload(place, lambda payload: payload["predicate"]["resources"][0].update(digest="00" * 32))


def other_lineage(place: Place) -> None:
    edit_payload(place, lambda payload: payload["predicate"]["vpstore"].update(inputs=[]))


DAMAGE: dict[str, tuple[Callable[[Place], None], str]] = {
    "flipped shard": (flipped_shard, "Hash mismatch for 'model.safetensors'"),
    "flipped manifest": (flipped_manifest, "Hash mismatch for 'artifact.json'"),
    "missing file": (missing_file, "Missing files in model"),
    "extra file": (extra_file, "Extra files found in model"),
    "other digest in the bundle": (other_digest, BAD_SIGNATURE),
    "other lineage in the bundle": (other_lineage, BAD_SIGNATURE),
}


@pytest.mark.parametrize(
    ("kind", "exported"),
    [
        ("p256", False),
        ("p256", True),
        pytest.param("p384", False, marks=pytest.mark.slow),
        pytest.param("p521", True, marks=pytest.mark.slow),
    ],
)
def test_the_stock_verifier_accepts(built: Project, keys: Keys, kind: str, exported: bool) -> None:
    place = signed(built, keys, kind, exported=exported)
    done = stock_command(place.directory, place.bundle, place.public, *place.flags)
    assert (done.returncode, done.stdout.strip()) == (0, "Verification succeeded"), done.stderr


@pytest.mark.parametrize(
    ("name", "exported"),
    [
        *[pytest.param(name, False, marks=pytest.mark.slow) for name in sorted(DAMAGE) if "bundle" not in name],
        *[(name, True) for name in sorted(DAMAGE)],
    ],
)
def test_the_stock_verifier_refuses(built: Project, keys: Keys, name: str, exported: bool) -> None:
    damage, expected = DAMAGE[name]
    place = signed(built, keys, exported=exported)
    damage(place)
    done = place.verify()
    assert done.returncode == 1
    said = done.stderr.replace("\\", "").strip()
    assert said.endswith(expected) if expected == BAD_SIGNATURE else expected in said


def test_another_key_is_refused(built: Project, keys: Keys) -> None:
    place = signed(built, keys, exported=True)
    done = place.verify(public=keys.public("p256", "other"))
    assert done.returncode == 1
    assert "Key mismatch" in done.stderr


def test_links_want_a_flag_and_an_export_does_not(built: Project, keys: Keys) -> None:
    place = signed(built, keys, exported=False)
    if not place.flags:
        pytest.skip("this file system makes views without links")
    done = stock(place.directory, place.bundle, place.public)
    assert done.returncode == 1
    assert "allow_symlinks" in done.stderr


def test_one_bundle_serves_view_and_export_whatever_the_directory_is_called(built: Project, keys: Keys) -> None:
    view = signed(built, keys, exported=False)
    before = view.bundle.read_bytes()
    exported = signed(built, keys, exported=True)
    assert exported.bundle.read_bytes() == before  # signed twice, written once
    assert exported.directory.name != view.directory.name
    assert exported.verify().returncode == 0


def test_no_connection_is_made(built: Project, keys: Keys) -> None:
    """The verifier is asked to work on files: it opens no socket to anywhere, as the kernel tells it."""
    if shutil.which("strace") is None:
        pytest.skip("no strace here")
    place = signed(built, keys, exported=True)
    trace = built.cache / "trace"
    command = [str(Path(sys.executable).with_name("model_signing")), "verify", "key", str(place.directory)]
    command += ["--signature", str(place.bundle), "--public_key", str(place.public)]
    strace = ["strace", "-f", "-e", "trace=connect,sendto,execve", "-o", str(trace)]
    done = subprocess.run([*strace, *command], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    calls = trace.read_text()
    assert "execve" in calls  # the trace is of something
    assert "AF_INET" not in calls


def test_what_is_signed_is_what_the_stock_signer_signs(built: Project, keys: Keys) -> None:
    """The same files in the same order under the same digest; only the name and our own block differ."""
    place = signed(built, keys, exported=True)
    theirs = built.root.parent / "theirs.sig"
    command = [str(Path(sys.executable).with_name("model_signing")), "sign", "key", str(place.directory)]
    command += ["--signature", str(theirs), "--private_key", str(keys.private("p256"))]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    our_bundle, their_bundle = (json.loads(path.read_text()) for path in (place.bundle, theirs))
    ours, other = (payload_of(bundle["dsseEnvelope"]) for bundle in (our_bundle, their_bundle))
    assert ours["predicate"]["resources"] == other["predicate"]["resources"]
    assert ours["subject"][0]["digest"] == other["subject"][0]["digest"]
    assert (ours["_type"], ours["predicateType"]) == (other["_type"], other["predicateType"])
    assert our_bundle["mediaType"] == their_bundle["mediaType"]
    hints = {bundle["verificationMaterial"]["publicKey"]["hint"] for bundle in (our_bundle, their_bundle)}
    assert len(hints) == 1


def test_the_order_of_files_is_the_stock_signers(keys: Keys, tmp_path: Path) -> None:
    """Parts of paths are compared, not letters: `a/b` comes before `a-b`, although `-` comes before `/`."""
    folder, bundle = tmp_path / "order", tmp_path / "order.sig"
    for path in ("a/b", "a-b", "a.b", "Z", "a/b-c/d", "a/b.c", "\u00e9", "z/\U0001f600"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        # A file and a folder cannot share a name here, so each file gets one of its own.
        (folder / f"{path}.txt").write_text(path)
    files = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.txt")
    }
    command = [str(Path(sys.executable).with_name("model_signing")), "sign", "key", str(folder)]
    command += ["--signature", str(bundle), "--private_key", str(keys.private("p256"))]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    theirs = payload_of(json.loads(bundle.read_text())["dsseEnvelope"])
    ours = json.loads(signing_statement("order", files, is_linked=False, lineage={}))
    assert ours["predicate"]["resources"] == theirs["predicate"]["resources"]
    assert ours["subject"] == theirs["subject"]


def test_the_bundle_parses_and_tells_where_the_artifact_comes_from(built: Project, keys: Keys) -> None:
    models = pytest.importorskip("sigstore_models.bundle.v1")
    place = signed(built, keys, exported=False)
    parsed = models.Bundle.from_json(place.bundle.read_text())
    assert len(parsed.dsse_envelope.signatures) == 1
    payload = json.loads(parsed.dsse_envelope.payload)
    shown = built.json("show", "plant")
    assert payload["subject"][0]["name"] == place.directory.name
    block = payload["predicate"]["vpstore"]
    assert (block["artifact"], block["build_key"]) == (shown["artifact"], shown["key"])
    assert (block["object"], block["stage"]) == ("plant", "bloom")
    parents = [(row["role"], row["artifact"]) for row in shown["inputs"]]
    assert [(row["role"], row["artifact"]) for row in block["inputs"]] == parents
    assert parents


def test_files_that_the_verifier_passes_over_are_named_as_such(project_with_git_files: Project, keys: Keys) -> None:
    """Donors come with a .gitattributes; the stock verifier ignores it unless told otherwise, so the bundle says so."""
    project, bundle = project_with_git_files, project_with_git_files.root.parent / "seed.sig"
    project.run("attest", "seed", "--key", str(keys.private("p256")), "-o", str(bundle))
    folder = project.root.parent / "seed"
    project.run("export", "seed", str(folder))
    assert (folder / ".gitattributes").is_file()
    payload = payload_of(json.loads(bundle.read_text())["dsseEnvelope"])
    assert payload["predicate"]["serialization"]["ignore_paths"] == [".gitattributes"]
    for flag in ("--ignore-git-paths", "--no-ignore-git-paths"):
        done = stock(folder, bundle, keys.public("p256"), flag)
        assert done.returncode == 0, done.stderr
    # What the signature leaves out, the signed manifest still covers.
    flip(folder / "artifact.json", 20)
    assert stock(folder, bundle, keys.public("p256")).returncode == 1


@pytest.fixture
def project_with_git_files(built: Project) -> Project:
    """A project whose donor has a file that git put there."""
    donor = built.root / "assets/donor"
    (donor / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    document = json.loads((built.root / "configs/donor.json").read_text())
    data = (donor / ".gitattributes").read_bytes()
    row = {"path": ".gitattributes", "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    document["files"].append(row)
    (built.root / "configs/donor.json").write_text(json.dumps(document))
    built.run("build", "seed")
    return built


def test_the_real_command_is_there() -> None:
    """The tests above mean nothing without it."""
    assert os.access(Path(sys.executable).with_name("model_signing"), os.X_OK)
