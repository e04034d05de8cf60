"""Attestations: in-toto Statement v1 with SLSA provenance v1, about one artifact.

Place in the path: publish writes one after each build; the build cache reads them back to see under which environment
an artifact was made; `attest` signs them.
Invariants: everything that may differ between two equal builds is here and only here: time, duration, commit, versions,
device. No host name, user or path of a machine.

Example:
    data = Statement.of(manifest, facts).encode()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vpstore.errors import BadManifest
from vpstore.schema.canonical import canonical_bytes, parse_canonical
from vpstore.schema.digest import Digest
from vpstore.schema.fields import Fields
from vpstore.schema.manifest import BuildRecord, Manifest

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://slsa.dev/provenance/v1"
BUILD_TYPE: Final = "urn:vpstore:build:1"
BUILDER: Final = "urn:vpstore:builder:local"


@dataclass(frozen=True)
class BuildFacts:
    """What is known about one run of a build, besides what it was given and what it gave."""

    started_on: str  # RFC 3339, UTC
    finished_on: str
    finished_unix: int
    duration_seconds: float
    environment: Mapping[str, str]  # package versions and device kind: equal ones make a cache hit
    git: Mapping[str, Any]  # {"commit": hex or null, "dirty": bool or null}
    builder_version: Mapping[str, str]  # vpstore and python
    machine: Mapping[str, str] = field(default_factory=dict)  # model of the CPU and number of cores; empty in old ones


@dataclass(frozen=True)
class Statement:
    """A parsed attestation: the fields that this project reads, and the whole document."""

    artifact: Digest
    key: Digest
    facts: BuildFacts
    document: dict[str, Any]

    def encode(self) -> bytes:
        """The canonical bytes; their digest names the file in the store."""
        return canonical_bytes(self.document, where="attestation")

    @classmethod
    def of(cls, manifest: Manifest, facts: BuildFacts) -> Statement:
        """The statement that this build gave that artifact."""
        key = manifest.build.key()
        document = {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": str(manifest.ref), "digest": {"blake3": manifest.digest.hex}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD_TYPE,
                    "externalParameters": {"object": manifest.object, "stage": manifest.stage, "build_key": key},
                    "internalParameters": _internal(facts),
                    "resolvedDependencies": _dependencies(manifest.build),
                },
                "runDetails": {
                    "builder": {"id": BUILDER, "version": dict(facts.builder_version)},
                    "metadata": {
                        "startedOn": facts.started_on,
                        "finishedOn": facts.finished_on,
                        "finishedUnix": facts.finished_unix,
                        "durationSeconds": facts.duration_seconds,
                    },
                    "byproducts": [_descriptor(part.name, part.digest) for part in manifest.intermediates],
                },
            },
        }
        return cls(manifest.digest, key, facts, document)

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> Statement:
        """Read a statement of this project's build type.

        Raises:  BadManifest: not canonical, or not such a statement.
        """
        document = parse_canonical(data, where=where)
        fields = Fields(document, where=where)
        for name, expected in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
            if (found := fields.text(name)) != expected:
                raise BadManifest(
                    "not a build attestation", where=f"{where}: {name}", expected=expected, found=found[:80]
                )
        subjects = fields.each("subject", lambda row: (row.text("name"), row.inner("digest").take("blake3", str)))
        if len(subjects) != 1:
            raise BadManifest("an attestation has not exactly one subject", where=where, found=str(len(subjects)))
        definition = fields.inner("predicate").inner("buildDefinition")
        details = Fields(document, where=where).inner("predicate").inner("runDetails")
        key = definition.inner("externalParameters").digest("build_key")
        return cls(Digest.from_hex(subjects[0][1]), key, _facts(definition, details), document)


def _internal(facts: BuildFacts) -> dict[str, Any]:
    machine = {"machine": dict(facts.machine)} if facts.machine else {}
    return {"environment": dict(facts.environment), "git": dict(facts.git), **machine}


def _facts(definition: Fields, details: Fields) -> BuildFacts:
    internal = definition.inner("internalParameters")
    metadata = details.inner("metadata")
    builder = details.inner("builder")
    duration = metadata.take("durationSeconds", object)
    if isinstance(duration, bool) or not isinstance(duration, (int, float)):
        metadata.refuse("a duration is not a number", at="durationSeconds", found=repr(duration)[:40])
    return BuildFacts(
        started_on=metadata.text("startedOn"),
        finished_on=metadata.text("finishedOn"),
        finished_unix=metadata.count("finishedUnix"),
        duration_seconds=float(duration),  # type: ignore[arg-type]  # held to be a number above
        environment=_texts(internal.take("environment", dict), internal.where),
        git=internal.take("git", dict),
        builder_version=_texts(builder.take("version", dict), builder.where),
        machine=_texts(internal.optional("machine", dict) or {}, internal.where),
    )


def _texts(value: dict[str, Any], where: str) -> dict[str, str]:
    if not all(isinstance(text, str) for text in value.values()):
        raise BadManifest("not text to text", where=where)
    return value


def _dependencies(build: BuildRecord) -> list[dict[str, Any]]:
    found = [_descriptor(f"input/{row.role}", row.artifact) for row in build.inputs]
    found += [_descriptor(f"recipe/{row.path}", row.digest) for row in build.recipe_files]
    found += [{"name": f"source/{row.role}", "digest": {"sha256": row.sha256}} for row in build.sources]
    for row in build.pins:
        name = f"tokenizer/{row.attributes['family']}" if build.format == 1 else f"pin/{row.role}"
        found.append(_descriptor(name, row.digest))
    found.append(_descriptor("config/params", build.params_digest()))
    return found


def _descriptor(name: str, digest: Digest) -> dict[str, Any]:
    return {"name": name, "digest": {"blake3": digest.hex}}
