from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from recipes.data.bpe import json_bytes, load_ranks, tokenizer_json
from recipes.data.encodings import O200K_HARMONY, QWEN3
from recipes.data.harmony import HarmonyTokenizer
from recipes.recipe import PlannedFile

ASSETS = Path(__file__).parents[2] / "assets"


def write_files(files: Sequence[PlannedFile], folder: Path) -> Path:
    for file in files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            file.write(out)
    return folder


@pytest.fixture(scope="session")
def write() -> Callable[[Sequence[PlannedFile], Path], Path]:
    return write_files


@pytest.fixture(scope="session")
def assets() -> Path:
    return ASSETS


@pytest.fixture(scope="session")
def harmony() -> HarmonyTokenizer:
    return HarmonyTokenizer.from_directory(ASSETS)


@pytest.fixture(scope="session")
def o200k_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("o200k") / "tokenizer.json"
    ranks = load_ranks(ASSETS / "o200k_base.tiktoken")
    path.write_bytes(
        json_bytes(tokenizer_json(ranks, pattern=O200K_HARMONY.pattern, special=O200K_HARMONY.special)),
    )
    return path


@pytest.fixture(scope="session")
def qwen_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen") / "tokenizer.json"
    document = tokenizer_json(
        load_ranks(ASSETS / "qwen.tiktoken"),
        pattern=QWEN3.pattern,
        special=QWEN3.special,
        normalizer=QWEN3.normalizer,
        plain=QWEN3.plain,
    )
    path.write_bytes(json_bytes(document, pretty=True))
    return path
