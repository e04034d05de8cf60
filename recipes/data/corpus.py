"""Corpora out of documentation packages: which pages are text, and what is left once their boilerplate is gone.

Place in the path: before the recipes; `tools/build_corpus.py` calls this to make the corpora that they read.

Invariants: the same pages give the same documents in the same order, whatever the file system's order; a document is
one page, named `package:path`; a block that many pages share is boilerplate and is dropped from all of them.

Example:
    >>> documents(PageSet("sqlite3-doc", "usr/share/doc/sqlite3"), unpacked, min_bytes=200, max_bytes=100_000)[0].doc_id
    'sqlite3-doc:about.html'
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path

from recipes.data.page_text import join_blocks, page_blocks

_SHARED_MIN_CHARS = 30
_SHARED_MIN_PAGES = 6


@dataclass(frozen=True)
class Document:
    """One page of text under a name that never changes."""

    doc_id: str
    text: str


@dataclass(frozen=True)
class PageSet:
    """Which pages of a package are text: patterns over the path below `root`, as fnmatch reads them."""

    package: str
    root: str
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()


def read_pages(pages: PageSet, unpacked: Path) -> dict[str, list[str]]:
    """Blocks of every page of a package.

    Args:    unpacked: the folder the package's files lie in.
    Returns: doc_id -> blocks, ordered by doc_id.
    """
    root, found = unpacked / pages.root, {}
    for path in sorted(root.rglob("*.html")):
        name = path.relative_to(root).as_posix()
        wanted = any(fnmatchcase(name, pattern) for pattern in pages.include)
        if wanted and path.is_file() and not any(fnmatchcase(name, pattern) for pattern in pages.exclude):
            html = path.read_bytes().decode("utf-8", errors="replace")
            found[f"{pages.package}:{name}"] = page_blocks(html)
    return dict(sorted(found.items()))


def without_boilerplate(pages: dict[str, list[str]]) -> dict[str, list[str]]:
    """Drop blocks that many pages share: at least 30 characters, on at least 6 pages and 1% of them."""
    seen = Counter(block for blocks in pages.values() for block in set(blocks) if len(block) >= _SHARED_MIN_CHARS)
    limit = max(_SHARED_MIN_PAGES, len(pages) // 100)
    return {name: [block for block in blocks if seen[block] < limit] for name, blocks in pages.items()}


def is_prose(text: str) -> bool:
    """Whether a text reads as language: mostly ASCII letters and spaces, and few of its lines repeat."""
    letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in text)
    lines = [line for line in text.split("\n") if line.strip()]
    return letters >= 0.7 * len(text) and len(set(lines)) >= 0.6 * len(lines)


def documents(pages: PageSet, unpacked: Path, *, min_bytes: int, max_bytes: int) -> list[Document]:
    """The documents of a package, by doc_id; of equal texts the first is kept.

    Args:    min_bytes, max_bytes: bounds of a document's UTF-8 length, both inclusive.
    """
    kept: dict[str, Document] = {}
    for name, blocks in without_boilerplate(read_pages(pages, unpacked)).items():
        text = join_blocks(blocks)
        if min_bytes <= len(text.encode()) <= max_bytes and is_prose(text):
            kept.setdefault(text, Document(name, text))
    return sorted(kept.values(), key=lambda document: document.doc_id)


def sample_by_name(found: Iterable[Document], total_bytes: int) -> list[Document]:
    """As many documents as fit into `total_bytes`, drawn by the digest of their names; ordered by doc_id."""
    drawn, used = [], 0
    for document in sorted(found, key=lambda each: sha256(b"sample:" + each.doc_id.encode()).digest()):
        size_bytes = len(document.text.encode())
        if used + size_bytes <= total_bytes:
            drawn.append(document)
            used += size_bytes
    return sorted(drawn, key=lambda document: document.doc_id)
