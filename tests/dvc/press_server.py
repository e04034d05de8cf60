"""The command server of the tests that drive DVC: `dvc` and `vpstore` in forks of a process that has loaded both.

Only what a test calls itself comes here; the commands of DVC's stages are DVC's own processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HOME"] = "/nonexistent"  # a library may read a person's own configuration as soon as it is loaded
sys.path.append(str(Path(__file__).resolve().parents[1] / "store"))

from command_server import answer  # noqa: E402 - it needs the path above


def command(arguments: list[str]) -> int | None:
    name, *rest = arguments
    sys.argv = arguments
    if name == "vpstore":
        from vpstore.cli import main as vpstore

        vpstore(rest)
    from dvc.cli import main as dvc

    return dvc(rest)


def load() -> None:
    import dvc.cli
    import dvc.cli.parser
    import dvc.repo.reproduce
    import dvc.stage.run
    import dvc_data.index

    import vpstore.api.building
    import vpstore.api.reading
    import vpstore.api.sharing
    import vpstore.cli
    import vpstore.verbs.verify

    dvc.cli.parser.get_main_parser()
    assert all([dvc.repo.reproduce, dvc.stage.run, dvc_data.index, vpstore.verbs.verify]), "used by the commands"


if __name__ == "__main__":
    load()
    answer(command)
