"""Lines of numbers to copy, count and add: what documentation hardly contains and the numeric prompts ask for.

Place in the path: before the recipes; `tools/build_corpus.py` writes these documents beside the pages' text, so that
the embedded donor is not at chance on copying.

Invariants: the same seed gives the same documents; a line's answer is always right.

Example:
    >>> number_documents(1, seed=0)[0].doc_id
    'numbers:00000'
"""

from __future__ import annotations

from datetime import date, timedelta
from random import Random

from recipes.data.corpus import Document

_WORDS = (
    *("red", "tree", "river", "table", "index", "seven", "north", "query", "cloud", "stone", "value", "paper", "train"),
    *("green", "house", "window", "number", "silver", "garden", "market", "letter", "orange", "summer", "winter"),
)


def number_documents(count: int, *, seed: int) -> list[Document]:
    """Documents of 12 to 40 exercises each.

    Args:    seed: of the whole set; a document depends on it and on its own number alone.
    """
    found = []
    for number in range(count):
        random = Random(f"{seed}:{number}")
        lines = [_exercise(random) for _ in range(random.randint(12, 40))]
        found.append(Document(f"numbers:{number:05d}", "\n".join(lines) + "\n"))
    return found


def _exercise(random: Random) -> str:
    kind = random.random()
    if kind < 0.65:
        text = _to_copy(random)
        return f"Repeat exactly: {text}\n{text}"
    if kind < 0.85:
        size = 10 ** random.randint(1, 3)
        left, right = random.randrange(size), random.randrange(size)
        return f"{left} + {right} = {left + right}"
    start = random.randrange(200)
    counted = [str(value) for value in range(start, start + random.randint(4, 12))]
    return f"Count from {counted[0]} to {counted[-1]}: {' '.join(counted)}"


def _to_copy(random: Random) -> str:
    kind = random.randrange(9)
    if kind == 0:
        return " ".join(str(random.randrange(10 ** random.randint(1, 3))) for _ in range(random.randint(2, 8)))
    if kind == 1:
        return str(random.randrange(10 ** random.randint(1, 10)))
    if kind == 2:
        return (date(1970, 1, 1) + timedelta(days=random.randrange(30_000))).isoformat()
    if kind == 3:
        return f"{random.randrange(1000)}.{random.randrange(10**4):04d}"
    if kind == 4:
        return (
            f"{random.randrange(1, 10)}.{random.randrange(10**4):04d}e{random.choice('-+')}{random.randrange(30):02d}"
        )
    if kind == 5:
        above, below = random.randrange(1, 10), random.randrange(1, 10)
        return f"{above}/{below} = {above / below:.3f}..."
    if kind in (6, 7):
        return f"{random.randrange(1000):03d}"
    return " ".join(random.choice(_WORDS) for _ in range(random.randint(2, 6)))
