"""Keys: which artifacts a build key has given.

Place in the path: the build cache's index. One small file a pair, `keys/ab/<key>/<artifact>`; several artifacts under
one key are evidence that the build does not reproduce.
Invariants: a key file is written after the manifest and the attestation, so it never leads nowhere; it is a claim, and
whoever follows it checks the manifest's own key.

Example:
    store.keys.add(key, artifact); store.keys.artifacts(key)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpstore.errors import BadManifest, VpstoreError
from vpstore.schema.canonical import canonical_bytes, parse_canonical
from vpstore.schema.digest import Digest, is_hex
from vpstore.schema.fields import Fields
from vpstore.storage import atomic, beneath
from vpstore.storage.refusals import read_plain

FORMAT: Final = 1


@dataclass(frozen=True)
class Keys:
    """The key files under one root."""

    root: Path
    tmp: Path

    def folder(self, key: Digest) -> Path:
        """Where the claims of one key lie."""
        return self.root / key.hex[:2] / key.hex

    def add(self, key: Digest, artifact: Digest) -> None:
        """Record that `key` gave `artifact`."""
        target = self.folder(key) / artifact.hex
        data = canonical_bytes({"format": FORMAT, "key": key, "artifact": artifact})
        if target.is_symlink() or not target.is_file() or target.read_bytes() != data:
            beneath.make_plain_directory(target.parent, self.root)
            atomic.write_file(target, data, folder=self.tmp)
        atomic.fsync_up(target.parent, self.root)

    def artifacts(self, key: Digest) -> tuple[Digest, ...]:
        """The artifacts a key has given, in the order of digests; damaged claims are not among them."""
        folder = self.folder(key)
        if not folder.is_dir():
            return ()
        found = []
        for path in sorted(folder.iterdir()):
            try:
                claimed = self.read(path)
            except VpstoreError:
                continue
            found.append(claimed[1])
        return tuple(found)

    def all(self) -> Iterator[Path]:
        """Every key file, sorted by path."""
        yield from sorted(path for path in self.root.rglob("*") if path.is_file())

    def claims(self) -> Iterator[Path]:
        """Every file that has the place of a key file, sorted; the name of each is an artifact's hex digits."""
        for fan in atomic.entries(self.root):
            for folder in atomic.entries(fan) if is_hex(fan.name, 2) and not fan.is_symlink() else ():
                if not folder.is_symlink():  # what lies behind a link is another store's
                    yield from (path for path in atomic.entries(folder) if is_hex(path.name, 64))

    def read(self, path: Path) -> tuple[Digest, Digest]:
        """The key and artifact of one key file.

        Raises:  BadManifest: damaged, or its content contradicts its name.
        """
        data = read_plain(path, "reading a key file")
        fields = Fields(parse_canonical(data, where=str(path)), where=str(path))
        fields.format(FORMAT)
        key, artifact = fields.digest("key"), fields.digest("artifact")
        fields.done()
        if (path.parent.name, path.name) != (key.hex, artifact.hex):
            raise BadManifest(
                "a key file contradicts its name", where=str(path), found=f"{key.short} -> {artifact.short}"
            )
        return key, artifact
