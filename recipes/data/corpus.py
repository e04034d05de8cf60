r"""Clean text out of documentation pages.

Place in the path: before the recipes; `tools/build_corpus.py` calls this to make the corpora that they read.

Invariants: the same pages give the same documents in the same order, whatever the file system's order; a document is
one page, named `package:path`; text is NFC, has no trailing blanks, and ends with one newline; a block that many pages
share is boilerplate and is dropped from all of them.

Example:
    >>> page_text("<body><nav>Home</nav><h1>Joins</h1><p>Queries  can<br>join.</p></body>")
    'Joins\n\nQueries can join.\n'
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_DROPPED_TAGS = {
    "aside",
    "button",
    "footer",
    "form",
    "head",
    "math",
    "nav",
    "noscript",
    "script",
    "select",
    "style",
    "svg",
}
_DROPPED_CLASSES = {
    *(
        "headerlink",
        "sphinxsidebar",
        "related",
        "navheader",
        "navfooter",
        "toc",
        "toctree-wrapper",
        "contents",
        "lof",
        "lot",
    ),
    *("breadcrumbs", "indextable", "linenos", "lineno", "footer", "viewcode-link", "versionadded-link", "nosearch"),
    *(
        "fancy_toc",
        "spirit-nav",
        "prev-next-area",
        "toplang",
        "bottomlang",
        "quickview",
        "top",
        "up",
        "index",
        "indexterm",
    ),
    *("genindextable", "modindextable", "nav-wrapper", "buttons", "menu-bar", "footnote-backref", "copyright-footer"),
}
_DROPPED_IDS = {
    "page-header",
    "path",
    "footer",
    "quickview",
    "toplang",
    "bottomlang",
    "searchbox",
    "leftnav",
    "topbar",
    "sidebar",
}
_DROPPED_ROLES = {"navigation", "search", "banner", "contentinfo"}
_BLOCKS = {
    *(
        "address",
        "article",
        "blockquote",
        "body",
        "caption",
        "dd",
        "details",
        "div",
        "dl",
        "dt",
        "figcaption",
        "figure",
    ),
    *(
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "hr",
        "li",
        "main",
        "ol",
        "p",
        "pre",
        "section",
        "summary",
        "table",
        "tr",
        "ul",
    ),
}
# A start tag ends what is still open of these: old pages leave the end tags out.
_CLOSES = {"li": {"li"}, "dt": {"dt", "dd"}, "dd": {"dt", "dd"}, "tr": {"tr"}, "td": {"td", "th"}, "th": {"td", "th"}}
_SHARED_MIN_CHARS = 30
_SHARED_MIN_PAGES = 6


@dataclass(frozen=True)
class Document:
    """One page of text under a name that never changes."""

    doc_id: str
    text: str


@dataclass
class _Open:
    tag: str
    dropped: bool  # the element and all below it
    main: bool  # inside the element that says it is the page's content


class _PageParser(HTMLParser):
    """Collects blocks of text; a block is what stands between two block-level tags."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.everything: list[str] = []
        self.main: list[str] = []
        self._stack: list[_Open] = [_Open("", dropped=False, main=False)]
        self._pieces: list[str] = []
        self._prefix = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element; block-level ones end the running block."""
        if tag in _BLOCKS or tag in ("td", "th"):
            self._close_implied(tag)
        if tag in _BLOCKS:
            self._flush()
        elif tag in ("td", "th") and "".join(self._pieces).strip():
            self._pieces.append(" | ")
        elif tag == "br":
            self._pieces.append("\n" if self._in_pre() else " ")
        if tag not in _VOID:
            parent, values = self._stack[-1], dict(attrs)
            main = parent.main or tag == "main" or values.get("role") == "main"
            self._stack.append(_Open(tag, parent.dropped or _is_dropped(tag, values), main))
        if tag == "li":
            self._prefix = "" if self._stack[-1].dropped else "- "

    def handle_endtag(self, tag: str) -> None:
        """Close an element, and what was left open inside it."""
        if tag in _BLOCKS:
            self._flush()
        if tag == "li":
            self._prefix = ""
        for depth in range(len(self._stack) - 1, 0, -1):
            if self._stack[depth].tag == tag:
                del self._stack[depth:]
                return

    def handle_data(self, data: str) -> None:
        """Take text that is not inside a dropped element."""
        if not self._stack[-1].dropped:
            self._pieces.append(data if self._in_pre() else re.sub(r"\s+", " ", data))

    def close(self) -> None:
        """End of the page."""
        super().close()
        self._flush()

    def _in_pre(self) -> bool:
        return any(element.tag == "pre" for element in self._stack)

    def _close_implied(self, tag: str) -> None:
        closing = _CLOSES.get(tag, set()) | ({"p"} if tag != "td" else set())
        top = self._stack[-1].tag
        if top in closing:
            self._flush()
            self._stack.pop()
            self._close_implied(tag)

    def _flush(self) -> None:
        raw, self._pieces = "".join(self._pieces), []
        if self._in_pre():
            text = "\n".join(line.rstrip() for line in raw.expandtabs(4).split("\n")).strip("\n")
        else:
            text = re.sub(r"[ \n]+", " ", raw).strip(" |")
        if not text.strip():
            return
        text, self._prefix = self._prefix + text, ""
        self.everything.append(text)
        if self._stack[-1].main:
            self.main.append(text)


def _is_dropped(tag: str, values: dict[str, str | None]) -> bool:
    classes = set((values.get("class") or "").split())
    hidden = "display:none" in (values.get("style") or "").replace(" ", "")
    return (
        hidden
        or tag in _DROPPED_TAGS
        or bool(classes & _DROPPED_CLASSES)
        or (values.get("id") or "") in _DROPPED_IDS
        or (values.get("role") or "") in _DROPPED_ROLES
    )


def _clean(block: str) -> str:
    text = unicodedata.normalize("NFC", block).replace("\u00a0", " ").replace("\u200b", "").replace("¶", "")
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))


def page_blocks(html: str) -> list[str]:
    """The blocks of a page in order: headings, paragraphs, list items, code.

    Args:    html: a whole page. If an element is marked as main content, only what is inside it counts.
    Returns: cleaned blocks, none empty.
    """
    parser = _PageParser()
    parser.feed(html)
    parser.close()
    cleaned = (_clean(block).rstrip() for block in parser.main or parser.everything)
    return [block for block in cleaned if block.strip()]


def join_blocks(blocks: Sequence[str]) -> str:
    """One text: an empty line between blocks, none between the items of a list; ends with one newline."""
    text = ""
    for before, block in zip(["", *blocks], blocks, strict=False):
        both_items = before.startswith("- ") and block.startswith("- ")
        text += ("" if not text else "\n" if both_items else "\n\n") + block
    return re.sub(r"\n{3,}", "\n\n", text) + "\n"


def page_text(html: str) -> str:
    """The text of one page."""
    return join_blocks(page_blocks(html))


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
