"""Keys for tests, trust in them, the stock verifier, and documents that never change."""

from __future__ import annotations

import atexit
import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from command_server import CommandServer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from small_project import REPOSITORY, Project

from vpstore.schema.attestation import BuildFacts, Statement
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import BuildRecord, FileRecord, InputRecord, Manifest, RecipeFile
from vpstore.workspace import Workspace

HERE = Path(__file__).parent
KINDS: dict[str, Callable[[], Any]] = {
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "k256": lambda: ec.generate_private_key(ec.SECP256K1()),
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "x25519": x25519.X25519PrivateKey.generate,
}


@dataclass(frozen=True)
class Keys:
    """A folder of key pairs."""

    folder: Path

    def private(self, kind: str, name: str = "", *, password: bytes | None = None) -> Path:
        """The path of a private key; made, with its public half beside it, if it is not there."""
        path = self.folder / f"{name or kind}.pem"
        if not path.exists():
            key = KINDS[kind]()
            form, layout = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
            lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
            path.touch(mode=0o600)
            path.write_bytes(key.private_bytes(form, layout, lock))
            public = key.public_key().public_bytes(form, serialization.PublicFormat.SubjectPublicKeyInfo)
            path.with_suffix(".pub").write_bytes(public)
        return path

    def public(self, kind: str, name: str = "") -> Path:
        """The path of the public half."""
        return self.private(kind, name).with_suffix(".pub")


def trust(project: Project, name: str, public: Path) -> Path:
    """Make a project trust a key."""
    pyproject = project.root / "pyproject.toml"
    if "trusted_keys" not in pyproject.read_text():
        pyproject.write_text(pyproject.read_text().rstrip() + '\ntrusted_keys = "configs/trusted-keys"\n')
    target = project.root / "configs/trusted-keys" / f"{name}.pem"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(public.read_bytes())
    return target


def envelopes(project: Project) -> list[Path]:
    return sorted((project.store / "attestations").glob("*/*.dsse"))


def workspace(project: Project, monkeypatch: Any) -> Workspace:
    """The workspace of a project in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(project.cache))
    return Workspace.find(project.root)


@cache
def stock_server() -> CommandServer:
    started = CommandServer(REPOSITORY, str(HERE / "stock_server.py"))
    atexit.register(started.close)
    return started


def stock(directory: Path, bundle: Path, public: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The real verifier, in a process of its own that is forked from one that has loaded it."""
    arguments = ["verify", "key", str(directory), "--signature", str(bundle), "--public_key", str(public), *flags]
    with tempfile.TemporaryDirectory(prefix="vpstore-stock-") as folder:
        done = stock_server().run(arguments, cwd=Path.cwd(), environment=dict(os.environ), folder=Path(folder))
    return subprocess.CompletedProcess(arguments, *done)


def stock_command(directory: Path, bundle: Path, public: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The same by the command that pip installed."""
    command = [str(Path(sys.executable).with_name("model_signing")), "verify", "key", str(directory)]
    command += ["--signature", str(bundle), "--public_key", str(public), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def payload_of(document: dict[str, Any]) -> Any:
    """The statement inside an envelope."""
    return json.loads(base64.b64decode(document["payload"]))


def with_payload(document: dict[str, Any], payload: Any) -> dict[str, Any]:
    """The envelope with another statement and the old signatures."""
    return {**document, "payload": base64.b64encode(json.dumps(payload).encode()).decode()}


def fixed_manifest() -> Manifest:
    """A manifest that never changes, for goldens."""
    build = BuildRecord(
        "recipes.grow",
        (RecipeFile("recipes/grow.py", Digest.of(b"recipe")),),
        {"step": 2},
        inputs=(InputRecord("parent", Digest.of(b"parent")),),
        format=1,
    )
    files = (FileRecord("model.safetensors", "application/vnd.safetensors", Digest.of(b"shard"), 5),)
    return Manifest("plant", "bloom", build, files)


def fixed_statement() -> Statement:
    """The statement of a build that never happened."""
    facts = BuildFacts(
        started_on="2026-01-02T03:04:05Z",
        finished_on="2026-01-02T03:04:06Z",
        finished_unix=1767323046,
        duration_seconds=1.5,
        environment={"device": "cpu"},
        git={"commit": None, "dirty": None},
        builder_version={"vpstore": "0.1.0", "python": "3.11.0"},
    )
    return Statement.of(fixed_manifest(), facts)
