"""The command line: parse, call one function of `vpstore.api`, print."""

from vpstore.cli import auditing, building, keeping, reading, reproducing, sharing, signing  # they declare the commands
from vpstore.cli.group import main

__all__ = ["auditing", "building", "keeping", "main", "reading", "reproducing", "sharing", "signing"]
