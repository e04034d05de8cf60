"""The command server of the stock verifier: its own command line, in forks of a process that has loaded it."""

from __future__ import annotations

from command_server import answer
from model_signing import _cli


def command(arguments: list[str]) -> None:
    _cli.main(arguments, prog_name="model_signing")


if __name__ == "__main__":
    answer(command)
