"""Where an artifact comes from, as plain values: its ancestors, what they were made from, under which licences.

Place in the path: run, which reads the store -> **huggingface** -> card, export.

Invariants: a source is known by the SHA-256 of its files, so that a provenance file that was changed since names
nothing; licence texts are those that this repository carries.

Example:
    sources_of(history, provenances(root / "configs/upcycle/provenance"))
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vpstore.errors import RecipeRefused

PROVENANCES: Final = "configs/upcycle/provenance"
_APACHE, _MIT = "assets/licenses/Apache-2.0.txt", "assets/licenses/MIT-tiktoken.txt"
_CORPUS = ("assets/corpus/LICENSE-Python.txt", "assets/corpus/LICENSE-PostgreSQL.txt", "assets/corpus/NOTICE.md")
# Texts of each licence that a provenance file may name; the notice of a corpus goes with its licences.
LICENCE_TEXTS: Final[Mapping[str, tuple[str, ...]]] = {
    "Apache-2.0": (_APACHE,),
    "MIT": (_MIT,),
    "PSF-2.0 and PostgreSQL": _CORPUS,
}


@dataclass(frozen=True)
class Ancestor:
    """One artifact of a lineage, the exported one included."""

    ref: str
    artifact: str  # digest
    recipe: str = ""  # module; "" where the manifest is not in the store
    inputs: tuple[tuple[str, str], ...] = ()  # role, digest
    sources: tuple[tuple[str, str], ...] = ()  # role, SHA-256 of a file from outside
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A thing from outside, as its provenance file describes it."""

    name: str
    origin: str
    revision: str
    license: str
    files: frozenset[str]  # SHA-256


def provenances(folder: Path) -> list[Source]:
    """Every provenance file of a folder, by name.

    Raises:  RecipeRefused: one that is not of its form.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            name, origin, revision, license = (str(document[key]) for key in ("name", "origin", "revision", "license"))
            files = frozenset(str(file["sha256"]) for file in document["files"])
            found.append(Source(name, origin, revision, license, files))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeRefused(
                "a provenance file is not of its form",
                where=path.name,
                expected="name, origin, revision, license, files: [{path, sha256, size_bytes}]",
                found=f"{type(error).__name__}: {error}",
                next_step="git checkout it: a model card must name the licences of its sources",
            ) from error
    return found


def sources_of(history: Sequence[Ancestor], known: Sequence[Source]) -> list[tuple[str, str, Source]]:
    """What came from outside into a lineage: the ancestor, the role, and the source.

    Returns: in the order of the lineage; a source of several files once for each ancestor.
    Raises:  RecipeRefused: a file that no provenance file names; its licence would be missing.
    """
    found: list[tuple[str, str, Source]] = []
    for ancestor in history:
        for role, sha256 in ancestor.sources:
            source = next((one for one in known if sha256 in one.files), None)
            if source is None:
                raise RecipeRefused(
                    "a source's licence is not known",
                    where=f"{ancestor.ref}: {role}",
                    expected=f"a provenance file in {PROVENANCES} with sha256 {sha256}",
                    next_step="check out the provenance files that the artifact was built with",
                )
            row = (ancestor.ref, role.partition("/")[0], source)
            if row not in found:
                found.append(row)
    return found


def licence_files(sources: Sequence[Source], *, root: Path) -> dict[str, Path]:
    """The texts of all licences, by their place in an export: LICENSE is that of the project and its modelling file.

    Raises:  RecipeRefused: a licence whose text is not here.
    """
    files = {"LICENSE": root / "LICENSE"}
    for source in sources:
        texts = LICENCE_TEXTS.get(source.license)
        if texts is None:
            raise RecipeRefused(
                "the text of a licence is not here",
                where=f"{source.name}: {source.license}",
                expected=", ".join(sorted(LICENCE_TEXTS)),
                next_step="put the text into assets/licenses and name it in recipes/huggingface/history.py",
            )
        files.update({f"licenses/{Path(text).name}": root / text for text in texts})
    return dict(sorted(files.items()))
