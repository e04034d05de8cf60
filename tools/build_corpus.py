"""Make corpora out of Debian's documentation packages.

    python -m tools.build_corpus --debs DIR --out DIR          one <package>.jsonl a package, and numbers.jsonl
    python -m tools.build_corpus --debs DIR --prose FILE       the sample that ships as the healing corpus

The .deb files come from `apt-get download PACKAGE`; each is unpacked with `dpkg -x` into a temporary folder. Only
packages under permissive licences are named below.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from recipes.data.corpus import Document, PageSet, documents, sample_by_name
from recipes.data.number_text import number_documents

MIN_BYTES, MAX_BYTES = 600, 400_000
NUMBER_DOCUMENTS, NUMBER_SEED = 2_000, 1
PROSE_PACKAGES = ("postgresql-doc-15", "python3.11-doc")
PROSE_MIN_BYTES, PROSE_MAX_BYTES, PROSE_TOTAL_BYTES = 1_000, 20_000, 2_500_000

_NOISE = (
    *("*genindex*", "*search.html", "*py-modindex*", "*copyright*", "*licen[sc]e*", "*changelog*", "*changes*"),
    *("_sources/*", "_modules/*", "*_static/*", "*contributors*", "*AUTHORS*", "*contents.html", "*print.html"),
)
_POSTGRES = (
    "release*",
    "legalnotice*",
    "bookindex*",
    "contrib-prog*",
    "features-sql-standard*",
    "acronyms*",
    "biblio*",
)
_RUST = ("book/ch*", "book/app*", "reference/*", "nomicon/*", "cargo/*", "rust-by-example/*", "rustc/*", "rustdoc/*")


def _doc(package: str, root: str, include: tuple[str, ...] = ("*",), exclude: tuple[str, ...] = ()) -> PageSet:
    return PageSet(package, f"usr/share/doc/{root}", include, _NOISE + exclude)


PAGE_SETS = (
    _doc("postgresql-doc-15", "postgresql-doc-15/html", exclude=_POSTGRES),
    _doc("python3.11-doc", "python3.11/html", exclude=("whatsnew/changelog.html", "download.html", "bugs.html")),
    _doc("apache2-doc", "apache2-doc/manual/en"),
    _doc("cmake-doc", "cmake-data/html", exclude=("release/*",)),
    _doc("erlang-doc", "erlang-doc/doc"),
    _doc("libboost1.74-doc", "libboost1.74-doc/doc/html"),
    _doc("llvm-15-doc", "llvm-15-doc/html"),
    _doc("python-aiohttp-doc", "python-aiohttp-doc/html"),
    _doc("python-astropy-doc", "python-astropy-doc/html", exclude=("api/*", "whatsnew/*")),
    _doc("python-attr-doc", "python-attr-doc/html"),
    _doc("python-click-doc", "python-click-doc/html"),
    _doc("python-cryptography-doc", "python-cryptography-doc/html"),
    _doc("python-dask-doc", "python-dask-doc/html", exclude=("generated/*",)),
    _doc("python-django-doc", "python-django-doc/html", exclude=("releases/*",)),
    _doc("python-flask-doc", "python-flask-doc/html"),
    _doc("python-h5py-doc", "python-h5py-doc/html"),
    _doc("python-jinja2-doc", "python-jinja2-doc/html"),
    _doc("python-pandas-doc", "python-pandas-doc/html", exclude=("reference/api/*",)),
    _doc("python-pytest-doc", "python-pytest-doc/html", exclude=("announce/*",)),
    _doc("python-requests-doc", "python-requests-doc/html"),
    _doc("python-scipy-doc", "python-scipy-doc/html", exclude=("release*",)),
    _doc("python-sqlalchemy-doc", "python-sqlalchemy-doc/html"),
    _doc("python-tornado-doc", "python-tornado-doc/html", exclude=("releases/*",)),
    _doc("python-werkzeug-doc", "python-werkzeug-doc/html"),
    _doc("python-xarray-doc", "python-xarray-doc/html"),
    _doc("rust-doc", "rust-doc/html", include=_RUST),
    _doc("sphinx-doc", "sphinx-doc/html"),
    _doc("sqlite3-doc", "sqlite3", exclude=("releaselog/*", "session/*")),
)


def unpack(debs: Path, package: str, into: Path) -> None:
    """Unpack the one .deb of `package` below `debs`."""
    found = sorted(debs.glob(f"{package}_*.deb"))
    if len(found) != 1:
        sys.exit(f"error: {debs} holds {len(found)} files {package}_*.deb; one is needed: apt-get download {package}")
    subprocess.run(["dpkg", "-x", str(found[0]), str(into)], check=True)


def package_documents(debs: Path, pages: PageSet, *, min_bytes: int, max_bytes: int) -> list[Document]:
    """Documents of one package, unpacked into a folder that goes away again."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(debs, pages.package, Path(folder))
        return documents(pages, Path(folder), min_bytes=min_bytes, max_bytes=max_bytes)


def write_jsonl(path: Path, found: Iterable[Document]) -> int:
    """Write one object a line and return the number of bytes."""
    rows = (json.dumps({"doc_id": each.doc_id, "text": each.text}, ensure_ascii=False) + "\n" for each in found)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.write_bytes("".join(rows).encode())


def build_prose(debs: Path, path: Path) -> None:
    """The shipped sample: pages of ordinary length from the two packages whose licences lie beside it."""
    found: list[Document] = []
    for pages in PAGE_SETS:
        if pages.package in PROSE_PACKAGES:
            found += package_documents(debs, pages, min_bytes=PROSE_MIN_BYTES, max_bytes=PROSE_MAX_BYTES)
    drawn = sample_by_name(found, PROSE_TOTAL_BYTES)
    print(f"{path}: {len(drawn)} of {len(found)} documents, {write_jsonl(path, drawn)} bytes", file=sys.stderr)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debs", type=Path, required=True, help="folder with the .deb files")
    parser.add_argument("--out", type=Path, help="folder for one file a package")
    parser.add_argument("--prose", type=Path, help="file for the shipped sample")
    parser.add_argument("--package", action="append", help="only these packages")
    options = parser.parse_args()
    if options.prose:
        build_prose(options.debs, options.prose)
    if options.out:
        for pages in PAGE_SETS:
            if options.package is None or pages.package in options.package:
                found = package_documents(options.debs, pages, min_bytes=MIN_BYTES, max_bytes=MAX_BYTES)
                size_bytes = write_jsonl(options.out / f"{pages.package}.jsonl", found)
                print(f"{pages.package}: {len(found)} documents, {size_bytes} bytes", file=sys.stderr)
        write_jsonl(options.out / "numbers.jsonl", number_documents(NUMBER_DOCUMENTS, seed=NUMBER_SEED))


if __name__ == "__main__":
    main()
