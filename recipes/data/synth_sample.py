"""The embedded sample in SYNTH's schema: small exercises with a correct reasoning and answer, written by this project.

Place in the path: **synth_sample** -> assets/synth_sample.jsonl -> the source `synth` of the data recipes. Run as a
module it writes the asset and its provenance file; a test holds the asset against what this module gives.

Invariants: row n is a function of n alone; every equation in a reasoning is true; `query_seed_text` states the
exercise and its result in a form that a program can check: `<kind>(<arguments>) = <result>`.

Example:
    python -m recipes.data.synth_sample --rows 500
"""

from __future__ import annotations

import argparse
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from recipes.data.synth_exercises import KINDS, Draws
from recipes.data.synth_templates import LANGUAGES, TEMPLATES

LICENSE = "Apache-2.0"


def sample_row(number: int) -> dict[str, Any]:
    """Row `number` of the sample: the kinds take turns, every second row is English."""
    kind = tuple(KINDS)[number % len(KINDS)]
    draws = Draws(f"synth-sample/{number}")
    language = "en" if draws.between(0, 1) else draws.pick(LANGUAGES[1:])
    exercise = KINDS[kind](draws, language)
    template = TEMPLATES[kind][language]
    answer = template.answer.format(**exercise.slots)
    return {
        "synth_id": f"vpstore-sample-{number:05d}",
        "language": language,
        "exercise": kind,
        "model": "synth_sample",
        "query": draws.pick(template.questions).format(**exercise.slots),
        "query_seed_url": "",
        "query_seed_text": exercise.statement,
        "additional_seed_url": "",
        "seed_license": LICENSE,
        "constraints": "",
        "script": "",
        "synthetic_reasoning": exercise.reasoning,
        "synthetic_answer": answer,
        "words": len(exercise.reasoning.split()) + len(answer.split()),
    }


def sample_bytes(rows: int) -> bytes:
    """The sample as JSON lines."""
    lines = (json.dumps(sample_row(number), ensure_ascii=False) for number in range(rows))
    return "".join(f"{line}\n" for line in lines).encode()


def provenance(data: bytes) -> dict[str, Any]:
    """The provenance document that pins the sample."""
    return {
        "format": 1,
        "name": "synth_sample",
        "origin": "python -m recipes.data.synth_sample",
        "revision": "1",
        "license": LICENSE,
        "root": "assets",
        "files": [{"path": "synth_sample.jsonl", "sha256": sha256(data).hexdigest(), "size_bytes": len(data)}],
    }


def main() -> None:
    """Write the asset and its provenance into a checkout."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--checkout", type=Path, default=Path())
    options = parser.parse_args()
    data = sample_bytes(options.rows)
    (options.checkout / "assets/synth_sample.jsonl").write_bytes(data)
    text = json.dumps(provenance(data), indent=2) + "\n"
    (options.checkout / "configs/upcycle/provenance/synth_sample.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
