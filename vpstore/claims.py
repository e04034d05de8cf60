"""Claims: what a manifest says of its recipe's code and of its parents' content, recomputed.

Place in the path: under the build cache, verify, audit and pull. A key covers `code` and `content`, and a manifest
carries both beside the digests that they come from; somebody could write others there to be found under a key that is
not theirs.
Invariants: reads only; what is not here contradicts nothing, and is another check's business.

Example:
    for one in contradictions(store, manifest): print(one.what, one.expected, one.found)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from vpstore.errors import BadManifest, RecipeRefused, VpstoreError
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Manifest, RecipeFile
from vpstore.schema.normal_form import normal_form


class Source(Protocol):
    """Where blobs and manifests come from."""

    def manifest(self, artifact: Digest) -> Manifest:
        """A manifest, verified.

        Raises:  VpstoreError, OSError: it cannot be had.
        """

    def read(self, digest: Digest) -> bytes:
        """A blob, verified.

        Raises:  VpstoreError, OSError: it cannot be had.
        """


class Contradiction(NamedTuple):
    """One claim that is not true."""

    what: str
    expected: str  # what was recomputed
    found: str  # what the manifest says
    blob: Digest  # that it was recomputed from


def contradictions(
    source: Source, manifest: Manifest, *, known: Mapping[Digest, Digest] | None = None
) -> Iterator[Contradiction]:
    """Recompute what a manifest claims.

    Args:    known: digests of files whose normal form is known to have that digest, so that they are not read.
    """
    if manifest.build.format == 1:
        return
    for row in manifest.build.recipe_files:
        code = (known or {}).get(row.digest) or _code(source, row)
        if code is not None and code != row.code:
            yield Contradiction(f"code of recipe file {row.path}", code, str(row.code), row.digest)
    for parent in manifest.build.inputs:
        try:
            content = source.manifest(parent.artifact).content
        except (VpstoreError, OSError):
            continue
        if content != parent.content:
            yield Contradiction(f"content of input {parent.role}", content, str(parent.content), parent.artifact)


def refuse_contradictions(
    source: Source, manifest: Manifest, *, known: Mapping[Digest, Digest] | None = None, next_step: str
) -> None:
    """Refuse a manifest that claims what is not true.

    Raises:  BadManifest: the first such claim.
    """
    for one in contradictions(source, manifest, known=known):
        raise BadManifest(
            "a manifest contradicts what it names",
            where=f"{manifest.ref}, {manifest.digest.short}: {one.what}",
            expected=one.expected,
            found=one.found,
            next_step=next_step,
        )


def _code(source: Source, row: RecipeFile) -> str | None:
    """The code of a recipe file by its blob; None if the blob cannot be had."""
    try:
        data = source.read(row.digest)
    except (VpstoreError, OSError):
        return None
    try:
        return Digest.of(normal_form(data, where=row.path).data)
    except RecipeRefused as error:
        return f"none: {error.what}"
