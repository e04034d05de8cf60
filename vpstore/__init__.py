"""vpstore: names for model checkpoints that can be proved, shared, audited and rebuilt.

Place in the path: the door. Importing the package is cheap and loads nothing else; `vpstore.errors` stays importable on
its own. The three calls that programs use are fetched from `vpstore.api` when they are first named.

Example:
    path = vpstore.resolve("vpDense"); weight = vpstore.open("vpDense")["lm_head.weight"].torch()
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "build", "open", "resolve"]


def __getattr__(name: str) -> Any:
    """Load the Python API on first use, so that `import vpstore.errors` costs nothing."""
    if name in ("build", "open", "resolve"):
        from vpstore import api

        return getattr(api, name)
    raise AttributeError(f"module 'vpstore' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What the package offers, whether it was loaded yet or not, and none of what it is made with."""
    return sorted(__all__)
