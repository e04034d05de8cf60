"""What this folder exports for; torch-free, so that a list of it costs nothing.

Place in the path: **huggingface**; run offers it to `vpstore export --to`.

Example:
    >>> list(TARGETS)
    ['hf']
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

TARGET: Final = "hf"
TARGETS: Final[Mapping[str, str]] = {
    TARGET: "a folder that transformers 5 opens: modelling file, generation config, chat template, model card"
}
