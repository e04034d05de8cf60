"""Put the digests of vpstore.lock into the documents, in the place of those of an earlier lock.

Run it after `vpstore lock` has changed the lock, with the lock that the documents still speak of:

    git show HEAD:vpstore.lock > old.lock && python tools/refresh_docs.py old.lock

Whatever the old lock says of an object@stage (artifact, key, code, params), in full or as its first 12 digits, becomes
what the new one says of it. Pages that begin by saying that their examples are those of one build (EXAMPLES) stay as
they are; so do sizes, times and figures, which no lock knows.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = "Digests in the examples are those of one build"
_DIGITS = re.compile(r"(?<![0-9a-f])([0-9a-f]{64}|[0-9a-f]{12})(?![0-9a-f])")


def pages(root: Path = ROOT) -> list[Path]:
    """The documents whose digests are the lock's."""
    every = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [page for page in every if EXAMPLES not in page.read_text(encoding="utf-8")]


def mapping(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Old digits -> new digits, in full and shortened."""
    found = {}
    for profile, entries in old["profiles"].items():
        for ref, entry in entries.items():
            now = new["profiles"].get(profile, {}).get(ref, {})
            for part, digest in entry.items():
                if part in now:
                    before, after = digest.removeprefix("blake3:"), now[part].removeprefix("blake3:")
                    found |= {before: after, before[:12]: after[:12]}
    return found


def refreshed(text: str, digits: dict[str, str]) -> str:
    """The text with every known digest replaced."""
    return _DIGITS.sub(lambda match: digits.get(match[1], match[1]), text)


def main() -> None:
    """Rewrite the pages that differ, and name them."""
    old, new = (json.loads(Path(path).read_text()) for path in (sys.argv[1], ROOT / "vpstore.lock"))
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = refreshed(before, mapping(old, new))
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
