"""The command line: parse, call one function of `vpstore.api`, print."""

from vpstore.cli import building, reading  # they declare the commands
from vpstore.cli.group import main

__all__ = ["building", "main", "reading"]
