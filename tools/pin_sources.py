"""Write the provenance file that pins a folder of source files by SHA-256 and size.

Nothing is fetched: put the files where they are to stay first. A build then holds every file against its pin.

Use, from the root of the checkout:
    python -m tools.pin_sources synth --root data/synth --glob '*.parquet' --origin 'Hugging Face PleIAs/SYNTH' \
        --revision REVISION --license CDLA-Permissive-2.0
"""

from __future__ import annotations

import argparse
import json
from hashlib import file_digest
from pathlib import Path
from typing import Any


def provenance(root: Path, pattern: str, about: dict[str, str]) -> dict[str, Any]:
    """The document: what is known of the files, and each file below `root` that matches, by its path.

    Args:    about: name, origin, revision, license.
    """
    files = []
    for path in sorted(root.glob(pattern)):
        with path.open("rb") as data:
            digest = file_digest(data, "sha256").hexdigest()
        name = path.relative_to(root).as_posix()
        files.append({"path": name, "sha256": digest, "size_bytes": path.stat().st_size})
    return {"format": 1, **about, "root": root.as_posix(), "files": files}


def main() -> None:
    """Write configs/upcycle/provenance/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--root", type=Path, required=True, help="relative to the checkout, or absolute")
    parser.add_argument("--glob", required=True)
    for option in ("origin", "revision", "license"):
        parser.add_argument(f"--{option}", required=True)
    options = parser.parse_args()
    about = {key: getattr(options, key) for key in ("name", "origin", "revision", "license")}
    document = provenance(options.root, options.glob, about)
    if not document["files"]:
        parser.error(f"no file matches {options.root}/{options.glob}")
    out = Path("configs/upcycle/provenance") / f"{options.name}.json"
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"{out}: {len(document['files'])} files")


if __name__ == "__main__":
    main()
