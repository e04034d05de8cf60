r"""The text of an HTML page: headings, paragraphs, list items and code, without what only leads to other pages.

Place in the path: a page -> **page_text** -> corpus.

Invariants: text is NFC, has no trailing blanks, and ends with one newline; what stands in an element that navigates,
decorates or computes is dropped with all below it.

Example:
    >>> join_blocks(page_blocks("<body><nav>Home</nav><h1>Joins</h1><p>Queries  can<br>join.</p></body>"))
    'Joins\n\nQueries can join.\n'
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VOID = _words("area base br col embed hr img input link meta source track wbr")
_DROPPED_TAGS = _words("aside button footer form head math nav noscript script select style svg")
_DROPPED_CLASSES = _words(
    """
    headerlink sphinxsidebar related navheader navfooter toc toctree-wrapper contents lof lot breadcrumbs
    indextable linenos lineno footer viewcode-link versionadded-link nosearch fancy_toc spirit-nav prev-next-area
    toplang bottomlang quickview top up index indexterm genindextable modindextable nav-wrapper buttons menu-bar
    footnote-backref copyright-footer
    """
)
_DROPPED_IDS = _words("page-header path footer quickview toplang bottomlang searchbox leftnav topbar sidebar")
_DROPPED_ROLES = _words("navigation search banner contentinfo")
_BLOCKS = _words(
    """
    address article blockquote body caption dd details div dl dt figcaption figure h1 h2 h3 h4 h5 h6 hr li main ol
    p pre section summary table tr ul
    """
)
# A start tag ends what is still open of these: old pages leave the end tags out.
_CLOSES = {"li": {"li"}, "dt": {"dt", "dd"}, "dd": {"dt", "dd"}, "tr": {"tr"}, "td": {"td", "th"}, "th": {"td", "th"}}


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
