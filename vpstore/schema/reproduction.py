"""Reproductions: in-toto Statement v1 with test result v0.1: an artifact was built again, and this is what came out.

Place in the path: `reproduce` writes one after each attempt; `show` and `audit` read them. A reproduction is evidence
about an artifact and never a claim that somebody built it, so the build cache does not look at it.
Invariants: as for the attestation of a build, no host name, user or path of a machine; PASSED means that everything
that was held against the artifact is identical, WARNED that it is within the epsilon that was asked for.

Example:
    data = Reproduction.of(artifact, name, key, outcome, facts).encode()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, cast, get_args

from vpstore.errors import BadManifest
from vpstore.schema.attestation import STATEMENT_TYPE, BuildFacts
from vpstore.schema.canonical import canonical_bytes, parse_canonical
from vpstore.schema.digest import Digest
from vpstore.schema.fields import Fields

PREDICATE_TYPE: Final = "https://in-toto.io/attestation/test-result/v0.1"
MAX_NAMES: Final = 1000  # of tests a list; the counts are complete

Result = Literal["PASSED", "WARNED", "FAILED"]


class Subject(NamedTuple):
    """What was built again."""

    name: str  # object@stage
    artifact: Digest
    key: Digest


@dataclass(frozen=True)
class Outcome:
    """What came out, and how much of the artifact it speaks for."""

    result: Result
    method: Literal["whole", "sample"]
    tensors: int  # held against the artifact
    tensors_total: int
    proved_bytes: int  # of tensors that came out identical
    total_bytes: int  # of all tensors of the artifact
    rebuilt: Digest | None = None  # the artifact that came out; None for a sample
    given_intermediates: tuple[str, ...] = ()  # taken from the artifact instead of computed again
    seed: int | None = None  # of the sample
    epsilon: float | None = None
    tests: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # "passed", "warned", "failed" -> names


@dataclass(frozen=True)
class Reproduction:
    """A parsed reproduction: the fields that this project reads, and the whole document."""

    subject: Subject
    outcome: Outcome
    facts: BuildFacts  # of the run that built it again
    document: dict[str, Any]

    @property
    def artifact(self) -> Digest:
        """What was built again."""
        return self.subject.artifact

    @property
    def key(self) -> Digest:
        """Its build key."""
        return self.subject.key

    def encode(self) -> bytes:
        """The canonical bytes; their digest names the file in the store."""
        return canonical_bytes(self.document, where="reproduction")

    @classmethod
    def of(cls, subject: Subject, outcome: Outcome, facts: BuildFacts) -> Reproduction:
        """The statement that building `subject` again gave `outcome`."""
        tests = {f"{name}Tests": list(outcome.tests.get(name, ())[:MAX_NAMES]) for name in _LISTS}
        predicate = {
            "result": outcome.result,
            "configuration": [
                {"name": "build-key", "digest": {"blake3": subject.key.hex}},
                {"name": "artifact", "digest": {"blake3": subject.artifact.hex}},
            ],
            **tests,
            "reproduction": {**_outcome_fields(outcome), **_facts_fields(facts)},
        }
        document = {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": subject.name, "digest": {"blake3": subject.artifact.hex}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": predicate,
        }
        return cls.decode(canonical_bytes(document, where="reproduction"), where="reproduction")

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> Reproduction:
        """Read a reproduction.

        Raises:  BadManifest: not canonical, not of this predicate type, or it contradicts itself.
        """
        document = parse_canonical(data, where=where)
        fields = Fields(document, where=where)
        for name, expected in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
            if (found := fields.text(name)) != expected:
                raise BadManifest("not a reproduction", where=f"{where}: {name}", expected=expected, found=found[:80])
        subjects = fields.each("subject", lambda row: (row.text("name"), _blake3(row)))
        predicate = fields.inner("predicate")
        configuration = dict(predicate.each("configuration", lambda row: (row.text("name"), _blake3(row))))
        if len(subjects) != 1 or configuration.get("artifact") != subjects[0][1] or "build-key" not in configuration:
            raise BadManifest("a reproduction is not about one artifact and its key", where=where)
        subject = Subject(subjects[0][0], subjects[0][1], configuration["build-key"])
        tests = {name: _names(predicate, f"{name}Tests") for name in _LISTS}
        result = _word(predicate, "result", get_args(Result))
        details = predicate.inner("reproduction")
        return cls(subject, _outcome(cast(Result, result), tests, details), _facts(details), document)


_LISTS: Final = ("passed", "warned", "failed")


def _outcome_fields(outcome: Outcome) -> dict[str, Any]:
    return {
        "method": outcome.method,
        "tensors": {"compared": outcome.tensors, "total": outcome.tensors_total},
        "bytes": {"proved": outcome.proved_bytes, "total": outcome.total_bytes},
        "rebuilt": outcome.rebuilt,
        "givenIntermediates": list(outcome.given_intermediates),
        "seed": outcome.seed,
        "epsilon": outcome.epsilon,
    }


def _facts_fields(facts: BuildFacts) -> dict[str, Any]:
    return {
        "startedOn": facts.started_on,
        "finishedOn": facts.finished_on,
        "finishedUnix": facts.finished_unix,
        "durationSeconds": facts.duration_seconds,
        "environment": dict(facts.environment),
        "git": dict(facts.git),
        "builder": dict(facts.builder_version),
        "machine": dict(facts.machine),
    }


def _outcome(result: Result, tests: Mapping[str, tuple[str, ...]], details: Fields) -> Outcome:
    method = _word(details, "method", ("whole", "sample"))
    tensors, sizes = details.inner("tensors"), details.inner("bytes")
    epsilon = details.optional("epsilon", object)
    return Outcome(
        result=result,
        method=cast(Literal["whole", "sample"], method),
        tensors=tensors.count("compared"),
        tensors_total=tensors.count("total"),
        proved_bytes=sizes.count("proved"),
        total_bytes=sizes.count("total"),
        rebuilt=details.optional_digest("rebuilt"),
        given_intermediates=_names(details, "givenIntermediates"),
        seed=details.optional("seed", int),
        epsilon=None if epsilon is None else _number(details, "epsilon", epsilon),
        tests={name: names for name, names in tests.items() if names},
    )


def _facts(details: Fields) -> BuildFacts:
    return BuildFacts(
        started_on=details.text("startedOn"),
        finished_on=details.text("finishedOn"),
        finished_unix=details.count("finishedUnix"),
        duration_seconds=_number(details, "durationSeconds", details.take("durationSeconds", object)),
        environment=_texts(details, "environment"),
        git=details.take("git", dict),
        builder_version=_texts(details, "builder"),
        machine=_texts(details, "machine"),
    )


def _blake3(row: Fields) -> Digest:
    return Digest.from_hex(row.inner("digest").take("blake3", str))


def _word(fields: Fields, name: str, known: tuple[str, ...]) -> str:
    found = fields.text(name)
    if found not in known:
        fields.refuse("an unknown word", at=name, expected=", ".join(known), found=found[:40])
    return found


def _names(fields: Fields, name: str) -> tuple[str, ...]:
    found = fields.take(name, list)
    if not all(isinstance(text, str) for text in found):
        fields.refuse("not a list of names", at=name)
    return tuple(found)


def _texts(fields: Fields, name: str) -> dict[str, str]:
    found = fields.take(name, dict)
    if not all(isinstance(text, str) for text in found.values()):
        fields.refuse("not text to text", at=name)
    return found


def _number(fields: Fields, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fields.refuse("not a number", at=name, found=repr(value)[:40])
    return float(cast(float, value))
