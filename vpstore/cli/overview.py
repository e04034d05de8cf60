"""`vpstore --help`: the commands in the groups in which the README has them, each with one complete line.

Place in the path: the root command of the command line. A command that is in no group is a fault; a test finds it.

Example:
    GROUPS["compare"]["diff"]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import click

from vpstore.errors import OutputClosed

# The lines are at most 65 letters long, so that each fits a terminal of 80 columns beside the longest name.
GROUPS: Final[Mapping[str, Mapping[str, str]]] = {
    "build and use": {
        "build": "Build stages, or take them from the build cache.",
        "resolve": "Verify an artifact and print its directory.",
        "ls": "List what is built, and how it stands to vpstore.lock.",
        "show": "Show files, inputs, tensors and attestations of an artifact.",
        "lock": "Accept what is built as what was agreed.",
        "import": "Take a donor over from a folder, against its pinned SHA-256.",
        "export": "Copy an artifact into a plain directory of real files.",
    },
    "share": {
        "push": "Send what a DVC remote lacks.",
        "pull": "Fetch what vpstore.lock names from a DVC remote.",
    },
    "believe": {
        "verify": "Read everything again and list all damage.",
        "audit": "Hold an artifact and its ancestors against all that is known.",
        "reproduce": "Build an artifact again and compare tensor by tensor.",
        "attest": "Sign an artifact.",
    },
    "compare": {
        "why": "Say which input makes two artifacts different.",
        "diff": "Compare two artifacts tensor by tensor.",
        "graph": "Show what an artifact was made from.",
    },
    "keep": {
        "repair": "Replace damaged or missing blobs by healthy copies.",
        "gc": "Delete what no checkout and no running process needs.",
        "doctor": "Check that everything is here, and say what to do if not.",
        "pipeline": "Print or write the dvc.yaml that the configuration calls for.",
        "completion": "Print the script that completes commands and refs.",
    },
}


class Root(click.Group):
    """The root command, whose help shows the groups."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; click would turn a closed pipe into exit code 1 before anybody else hears of it.

        Raises:  OutputClosed.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise OutputClosed("nobody reads the output any more") from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the order of the groups; one that was forgotten there comes last."""
        order = [name for group in GROUPS.values() for name in group]
        return sorted(super().list_commands(ctx), key=lambda name: order.index(name) if name in order else len(order))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section a group."""
        for title, group in GROUPS.items():
            with formatter.section(title.capitalize()):
                formatter.write_dl(list(group.items()))
