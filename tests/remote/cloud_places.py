"""The general transport over Google Cloud Storage's and Azure's file systems, as places of the suite."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from cloud_servers import AzureServer, CloudServer, GsServer
from remote_places import QUICK, Place

from vpstore.storage.remotes.base import FOLDER, Remote
from vpstore.storage.remotes.filesystem import FilesystemRemote


class CloudPlace(Place):
    """A folder of a bucket."""

    server_kind: ClassVar[type[CloudServer]]

    def __init__(self, root: Path, server: CloudServer) -> None:
        self.server = server
        self.folder = f"{server.bucket()}/models"
        super().__init__(root, server)

    def open(self) -> Remote:
        return FilesystemRemote(self.server.files, self.folder, self.server.scheme, patience=QUICK)

    def recipe(self) -> str:
        transport = "from vpstore.storage.remotes.filesystem import FilesystemRemote as R"
        return f"{self.server.recipe()}; {transport}; remote = R(fs, {self.folder!r}, 'cloud')"

    def contents(self) -> dict[str, bytes]:
        return self.server.contents(f"{self.folder}/{FOLDER}")


class GsPlace(CloudPlace):
    server_fixture = "gs_server"
    server_kind = GsServer


class AzurePlace(CloudPlace):
    server_fixture = "azure_server"
    server_kind = AzureServer


CLOUD_PLACES: dict[str, type[CloudPlace]] = {"gs": GsPlace, "azure": AzurePlace}

# adlfs hands what is written at once to its HTTP client as it is, and that has an opinion about it.
LARGE_BODIES = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")


def cloud_marks(name: str) -> list[pytest.MarkDecorator]:
    """Skipped where its server or its plugin is not installed."""
    lacking = CLOUD_PLACES[name].server_kind.lacking()
    return [pytest.mark.skipif(bool(lacking), reason=lacking), LARGE_BODIES]
