"""The Python API: one function a command, of the same name.

`import` is `import_donor` here, as Python keeps that word for itself; `completion` is a matter of the shell alone.

Place in the path: composes verbs into what a person calls; the command line is a skin over this package.
Invariants: every function finds its workspace around the working directory unless one is given; nothing is printed; a
function's module is loaded when the function is first named, so that a command pays for what it uses.

Example:
    found = vpstore.resolve("vpDense"); found.path
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

# Which module has which function, and the classes that say what is wanted of one. The one list for programs.
FUNCTIONS: Final = {
    "build": "building", "build_all": "building", "import_donor": "building", "lock": "building",
    "lock_check": "building", "pipeline": "building", "plan": "building", "plan_import": "building",
    "Strictness": "auditing", "audit": "auditing", "diff": "auditing", "graph": "auditing", "why": "auditing",
    "attest": "signing", "export": "signing", "export_check": "signing",
    "Wish": "reproducing", "rebuild": "reproducing", "reproduce": "reproducing", "reproduction_plan": "reproducing",
    "pull": "sharing", "push": "sharing", "repair": "sharing",
    "Terms": "keeping", "duration": "keeping", "gc": "keeping",
    "doctor": "reading", "ls": "reading", "open": "reading", "resolve": "reading", "show": "reading",
    "verify": "reading",
}  # fmt: skip
__all__ = sorted(FUNCTIONS)  # noqa: PLE0605


def __dir__() -> list[str]:
    """Every function, whether its module was loaded yet or not."""
    return sorted({*globals(), *FUNCTIONS})


def __getattr__(name: str) -> Any:
    """Load a function's module when it is first named."""
    if name not in FUNCTIONS:
        raise AttributeError(f"module 'vpstore.api' has no attribute {name!r}")
    return getattr(import_module(f"vpstore.api.{FUNCTIONS[name]}"), name)
