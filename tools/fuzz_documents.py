"""Coverage-guided fuzzing of the parsers of outside bytes, with atheris (libFuzzer); not needed by anybody else.

The property is the one of tests/faults/test_fuzz_documents.py: an error of ours, or exactly the bytes that were given.
A crash is written to the working directory by libFuzzer; add it to the samples of tests/faults/parsers.py.

Example:
    python -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris --editable '.[sign]'
    /tmp/fuzz/bin/python -m tools.fuzz_documents manifest -max_total_time=300
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Fuzz one parser, named by the first argument; the rest are libFuzzer's."""
    import atheris

    sys.path[:0] = [str(ROOT / "tests" / "faults"), str(ROOT / "tests" / "store")]
    with atheris.instrument_imports(include=["vpstore"]):
        from parsers import hold, parsers

    with tempfile.TemporaryDirectory() as folder:
        by_name = {parser.name: parser for parser in parsers(Path(folder))}
        if len(sys.argv) < 2 or sys.argv[1] not in by_name:
            sys.exit(f"which parser? one of: {', '.join(by_name)}")
        parser = by_name[sys.argv[1]]
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, sample in enumerate(parser.samples):
            (corpus / f"sample-{number}").write_bytes(sample)
        atheris.Setup([sys.argv[0], *sys.argv[2:], str(corpus)], lambda data: hold(parser, data) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
