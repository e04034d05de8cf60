"""vpstore.lock: what was agreed, per profile and object@stage.

Place in the path: resolve and build compare with it, `vpstore lock` alone writes it. An artifact is the same as the
agreed one if it has its key and its content, whatever its history.
Invariants: sorted, two spaces, one newline at the end: the same agreement always has the same bytes, so that git shows
only what changed.

Example:
    lock = Lockfile.decode(path.read_bytes(), where="vpstore.lock"); entry = lock.entry("tiny", ref)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from vpstore.errors import BadManifest
from vpstore.schema.canonical import parse_strict, readable_bytes
from vpstore.schema.digest import Digest
from vpstore.schema.fields import Fields
from vpstore.schema.manifest import Manifest
from vpstore.schema.ref import StageRef, parse_ref

FORMAT: Final = 2


class LockEntry(NamedTuple):
    """What one object@stage should be, and of which key, code and params."""

    artifact: Digest
    key: Digest
    code: Digest
    params: Digest
    content: Digest | None = None  # None: an entry of format 1

    @classmethod
    def of(cls, manifest: Manifest) -> LockEntry:
        """The entry that accepts this artifact."""
        build = manifest.build
        return cls(manifest.digest, build.key(), build.code_digest(), build.params_digest(), manifest.content)

    def is_kept_by(self, other: LockEntry) -> bool:
        """Whether another artifact is what was agreed: this one, or equal content under the same key."""
        if self.artifact == other.artifact:
            return True
        return self.content is not None and (self.content, self.key) == (other.content, other.key)

    def to_json(self) -> dict[str, Digest]:
        """The entry as the file has it."""
        return {name: value for name, value in self._asdict().items() if value is not None}


Profile = Mapping[StageRef, LockEntry]


@dataclass(frozen=True)
class Lockfile:
    """All entries, by profile."""

    profiles: Mapping[str, Profile] = field(default_factory=lambda: MappingProxyType({}))

    def entry(self, profile: str, ref: StageRef) -> LockEntry | None:
        """What was agreed for `ref`, or None."""
        return self.profiles.get(profile, {}).get(ref)

    def with_profile(self, profile: str, entries: Profile) -> Lockfile:
        """The lock with one profile's entries replaced; the other profiles stay."""
        return Lockfile({**self.profiles, profile: dict(entries)})

    def encode(self) -> bytes:
        """The bytes of the file."""
        profiles = {
            name: {str(ref): entry.to_json() for ref, entry in entries.items()}
            for name, entries in self.profiles.items()
        }
        return readable_bytes({"format": FORMAT, "profiles": profiles})

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> Lockfile:
        """Read the file.

        Raises:  BadManifest: not strict JSON, an unknown field, a ref that is not object@stage.
        """
        fields = Fields(parse_strict(data, where=where), where=where)
        version = fields.format_of((1, FORMAT))
        profiles = fields.take("profiles", dict)
        fields.done()
        return cls({name: _profile(entries, f"{where}: {name}", version) for name, entries in profiles.items()})


def _profile(value: Any, where: str, version: int) -> dict[StageRef, LockEntry]:
    if not isinstance(value, dict):
        raise BadManifest("a profile of the lock is not an object", where=where)
    return {
        _stage_ref(name, where): _entry(entry, f"{where}: {name}", version) for name, entry in sorted(value.items())
    }


def _stage_ref(text: str, where: str) -> StageRef:
    ref = parse_ref(text, where=where, error=BadManifest)
    if ref.stage is None or ref.mode is not None:
        raise BadManifest("the lock names object@stage only", where=where, found=text[:120])
    return StageRef(ref.object, ref.stage)


def _entry(value: Any, where: str, version: int) -> LockEntry:
    fields = Fields(value, where=where)
    content = None if version == 1 else fields.optional_digest("content")
    artifact, key, code, params = (fields.digest(name) for name in ("artifact", "key", "code", "params"))
    entry = LockEntry(artifact, key, code, params, content)
    fields.done()
    return entry
