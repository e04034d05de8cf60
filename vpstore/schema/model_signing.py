"""OpenSSF Model Signing documents: a directory's files by SHA-256, and the bundle with the signature over them.

Place in the path: `attest -o FILE` writes a bundle, and the stock `model_signing verify key` reads it beside a
directory that `resolve` or `export` made; nothing here is stored.
Invariants: resources are sorted by the parts of their paths and the one subject's digest is the SHA-256 over their raw
digests in this order, both as the stock signer has it; the bytes depend on nothing but what they describe.

Example:
    payload = signing_statement("vpMoE@smoke-0123456789ab", {"config.json": sha256}, is_linked=True, lineage={})
    data = bundle(key.seal(payload))

Source:  model-signing 1.1, predicate https://model_signing/signature/v1.0; sigstore bundle 0.3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from vpstore.schema.attestation import STATEMENT_TYPE
from vpstore.schema.canonical import canonical_bytes, readable_bytes
from vpstore.schema.dsse import Envelope
from vpstore.schema.manifest import Manifest

PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"
BUNDLE_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
# At the top of a directory the stock verifier passes over these unless it is told otherwise.
_GIT: Final = (".git", ".gitattributes", ".github", ".gitignore")


def signing_statement(name: str, files: Mapping[str, str], *, is_linked: bool, lineage: Mapping[str, Any]) -> bytes:
    """The statement that a directory has these files.

    Args:    name: the directory's, for people only: the verifier compares files, not names;
             files: path -> SHA-256 in hex, of every file;
             is_linked: whether the directory shows its files by symbolic links;
             lineage: what this project adds; the stock verifier passes over it.
    Returns: canonical bytes, to be signed.
    """
    ignored = sorted({path.split("/")[0] for path in files if path.split("/")[0] in _GIT})
    resources = [
        {"name": path, "algorithm": "sha256", "digest": files[path]}
        for path in sorted(files, key=lambda path: path.split("/"))
        if path.split("/")[0] not in ignored
    ]
    root = hashlib.sha256(b"".join(bytes.fromhex(row["digest"]) for row in resources)).hexdigest()
    serialization: dict[str, Any] = {"method": "files", "hash_type": "sha256", "allow_symlinks": is_linked}
    if ignored:
        serialization["ignore_paths"] = ignored
    document = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": root}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"serialization": serialization, "resources": resources, "vpstore": dict(lineage)},
    }
    return canonical_bytes(document, where="model signing statement")


def lineage_block(manifest: Manifest) -> dict[str, Any]:
    """What a bundle says besides the files: which artifact they are, and from which artifacts it was built."""
    return {
        "artifact": manifest.digest,
        "object": manifest.object,
        "stage": manifest.stage,
        "build_key": manifest.build.key(),
        "inputs": [row._asdict() for row in manifest.build.inputs],
    }


def bundle(envelope: Envelope) -> bytes:
    """The sigstore bundle around an envelope with one signature, whose key id is the hint."""
    (signature,) = envelope.signatures
    document = {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": signature.keyid}, "tlogEntries": []},
        "dsseEnvelope": envelope.to_json(),
    }
    return readable_bytes(document)


def is_bundle(document: Any) -> bool:
    """Whether a parsed JSON document is some sigstore bundle, which a new one may replace."""
    return isinstance(document, dict) and str(document.get("mediaType", "")).startswith("application/vnd.dev.sigstore.")
