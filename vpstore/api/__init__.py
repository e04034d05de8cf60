"""The Python API: one function a command.

Place in the path: composes verbs into what a person calls; the command line is a skin over this package.
Invariants: every function finds its workspace around the working directory unless one is given; nothing is printed; a
function's module is loaded when the function is first named, so that a command pays for what it uses.

Example:
    found = vpstore.resolve("vpDense"); found.path
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

# Which module has which function. The one list of what programs may call.
FUNCTIONS: Final = {
    "build": "building", "build_all": "building", "import_donor": "building", "lock": "building",
    "lock_check": "building", "plan": "building",
    "audit": "auditing", "diff": "auditing", "graph": "auditing", "why": "auditing",
    "attest": "signing", "export": "signing",
    "rebuild": "reproducing", "reproduce": "reproducing", "reproduction_plan": "reproducing",
    "pull": "sharing", "push": "sharing", "repair": "sharing",
    "gc": "keeping",
    "doctor": "reading", "ls": "reading", "open": "reading", "resolve": "reading", "show": "reading",
    "verify": "reading",
}  # fmt: skip
__all__ = sorted(FUNCTIONS)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Load a function's module when it is first named."""
    if name not in FUNCTIONS:
        raise AttributeError(f"module 'vpstore.api' has no attribute {name!r}")
    return getattr(import_module(f"vpstore.api.{FUNCTIONS[name]}"), name)
