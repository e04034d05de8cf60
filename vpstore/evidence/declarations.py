"""Declarations: whether an artifact was built from what the checkout declares for its object and stage.

Place in the path: evidence that needs objects.toml and the provenance files that pin sources; no code of the project is
loaded for it.
Invariants: parents are held against the role that they were recorded in; of a parent whose manifest is unknown nothing
is said here, as it has a dossier of its own.

Example:
    check_declarations(dossier, manifest, parents, work.checkout)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from vpstore.checkout import Checkout
from vpstore.errors import NoSuchRef, VpstoreError
from vpstore.evidence.dossier import Dossier
from vpstore.schema.canonical import parse_strict
from vpstore.schema.digest import Digest, parse_sha256
from vpstore.schema.fields import Fields
from vpstore.schema.manifest import Manifest
from vpstore.schema.manifest import Pin as PinRecord
from vpstore.schema.objects import StageDeclaration
from vpstore.schema.record import TOKENIZER

TOKENIZER_ROLE: Final = "tokenizer"
Parents = Mapping[Digest, Dossier]
Pin = tuple[str, int | None]  # SHA-256 and size in bytes


def check_declarations(dossier: Dossier, manifest: Manifest, parents: Parents, checkout: Checkout) -> None:
    """Hold parents, sources and tokenizer against the declaration of the artifact's stage."""
    try:
        declared = checkout.objects.stage(manifest.ref)
    except NoSuchRef as error:
        dossier.fault("declaration", checkout.config.objects, expected=error.expected, found=str(manifest.ref))
        return
    _check_roles(dossier, manifest, parents, declared)
    _check_sources(dossier, manifest, checkout, declared)
    _check_tokenizer(dossier, manifest, checkout, declared)
    _check_rank_file(dossier, manifest, parents)


def _check_roles(dossier: Dossier, manifest: Manifest, parents: Parents, declared: StageDeclaration) -> None:
    recorded: dict[str, Digest] = {row.role: row.artifact for row in manifest.build.inputs}
    for role in sorted(declared.inputs.keys() | recorded.keys()):
        if role not in recorded:
            dossier.fault("input", f"input {role}", expected=str(declared.inputs[role]), found="no such input")
            continue
        parent = parents[recorded[role]].manifest
        found = str(parent.ref) if parent is not None else None
        if role not in declared.inputs:
            dossier.fault("input", f"input {role}", expected="no such input", found=found or recorded[role])
        elif found is not None and found != str(declared.inputs[role]):
            expected = str(declared.inputs[role])
            dossier.fault("input", f"input {role}", expected=expected, found=f"{found} {recorded[role].short}")


def _check_sources(dossier: Dossier, manifest: Manifest, checkout: Checkout, declared: StageDeclaration) -> None:
    recorded: dict[str, Pin] = {row.role: (row.sha256, row.size_bytes) for row in manifest.build.sources}
    pinned: dict[str, Pin] = {}
    for role, path in sorted(declared.sources.items()):
        try:
            pinned |= {f"{role}/{name}": pin for name, pin in _pins(checkout, path).items()}
        except (VpstoreError, OSError) as error:
            found = error.what if isinstance(error, VpstoreError) else str(error.strerror)
            dossier.fault("source", path, expected="files: [{path, sha256, size_bytes}]", found=found)
            recorded = {name: pin for name, pin in recorded.items() if not name.startswith(f"{role}/")}
    for name in sorted(pinned.keys() | recorded.keys()):
        if pinned.get(name) != recorded.get(name):
            dossier.fault(
                "source", f"source {name}", expected=_pin_text(pinned.get(name)), found=_pin_text(recorded.get(name))
            )


def _pins(checkout: Checkout, path: str) -> dict[str, Pin]:
    """What a provenance file pins; whatever else it says is for people."""
    document = parse_strict((checkout.root / path).read_bytes(), where=path)
    found: dict[str, Pin] = {}
    for row in Fields(document, where=path).take("files", list):
        fields = Fields(row, where=path)
        sha256 = parse_sha256(fields.text("sha256"), where=path)
        found[fields.text("path")] = (sha256, fields.optional("size_bytes", int))
    return found


def _pin_text(pin: Pin | None) -> str:
    if pin is None:
        return "no such source"
    return f"sha256 {pin[0]}" + ("" if pin[1] is None else f", {pin[1]} bytes")


def _check_tokenizer(dossier: Dossier, manifest: Manifest, checkout: Checkout, declared: StageDeclaration) -> None:
    record, name = manifest.build.pin(TOKENIZER), declared.tokenizer
    if name is None or record is None or _family(record) != name:
        if name != (_family(record) if record else None):
            dossier.fault(
                "tokenizer", "tokenizer", expected=name or "none", found=_family(record) if record else "none"
            )
        return
    table = checkout.objects.tokenizers[name]  # opaque to vpstore, apart from these two names where they are used
    for field, found in (("digest", str(record.digest)), ("padded_vocab", record.attributes.get("padded_vocab"))):
        if isinstance(table, Mapping) and field in table and table[field] != found:
            dossier.fault("tokenizer", f"tokenizer {name}: {field}", expected=str(table[field]), found=str(found))


def _check_rank_file(dossier: Dossier, manifest: Manifest, parents: Parents) -> None:
    """A parent that is this very tokenizer must hold the rank file that the record names."""
    record = manifest.build.pin(TOKENIZER)
    holder = next((parents[row.artifact].manifest for row in manifest.build.inputs if row.role == TOKENIZER_ROLE), None)
    held = holder.build.pin(TOKENIZER) if holder is not None else None
    if record is None or holder is None or held is None:
        return
    if _family(held) == _family(record) and record.digest not in {row.digest for row in holder.files}:
        dossier.fault(
            "tokenizer",
            f"tokenizer {_family(record)}",
            expected=f"{record.digest} among the files of {holder.ref}",
            found="no such file",
        )


def check_families(dossiers: Iterable[Dossier]) -> None:
    """One family of tokenizers means one rank file and one vocabulary along a whole chain; the oldest word counts."""
    seen: dict[str, tuple[str, PinRecord]] = {}
    for dossier in dossiers:
        record = dossier.manifest.build.pin(TOKENIZER) if dossier.manifest is not None else None
        if record is None:
            continue
        label, first = seen.setdefault(_family(record), (dossier.label, record))
        if first != record:
            dossier.fault(
                "tokenizer",
                f"tokenizer {_family(record)}",
                expected=f"{first.digest}, {first.attributes.get('padded_vocab')} ids, as in {label}",
                found=f"{record.digest}, {record.attributes.get('padded_vocab')} ids",
            )


def _family(pin: PinRecord) -> str:
    return str(pin.attributes.get("family"))
