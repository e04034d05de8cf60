"""Remotes of every kind for one suite, each with a way to look at its bytes behind the transport's back."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, ClassVar

from vpstore.storage.remotes.base import FOLDER, Remote
from vpstore.storage.remotes.directory import DirectoryRemote
from vpstore.storage.remotes.failures import Patience
from vpstore.storage.remotes.filesystem import FilesystemRemote
from vpstore.storage.remotes.s3 import S3Remote

QUICK = Patience(attempts=3, pause_seconds=0.01)
PART = 64 << 10  # bytes; the server is told to take parts that small
_numbers = itertools.count()


class S3Server:
    """moto's server in a thread, and a client of its own kind to look into it."""

    def __init__(self) -> None:
        import moto.s3.models
        from moto.server import ThreadedMotoServer

        moto.s3.models.S3_UPLOAD_PART_MIN_SIZE = 1024  # a multipart upload of a small blob
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.port = int(self._server.get_host_and_port()[1])
        self.endpoint = f"http://127.0.0.1:{self.port}"
        import boto3
        from botocore.config import Config

        as_it_lies = Config(response_checksum_validation="when_required")  # damaged objects are to be seen, too
        self.client: Any = boto3.client("s3", endpoint_url=self.endpoint, config=as_it_lies)
        self.files = s3_files(self.endpoint)  # made once: reading the protocol's model takes a while

    def bucket(self) -> str:
        """A new bucket."""
        name = f"bucket-{os.getpid()}-{next(_numbers)}"
        self.client.create_bucket(Bucket=name)
        return name

    def contents(self, bucket: str) -> dict[str, bytes]:
        """Every object of a bucket."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [row["Key"] for page in pages for row in page.get("Contents", ())]
        return {key: self.client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}

    def pieces(self, bucket: str) -> int:
        """How many parts of unfinished uploads lie there; an upload without parts counts as one."""
        uploads = self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", ())
        return sum(
            max(
                1, len(self.client.list_parts(Bucket=bucket, Key=row["Key"], UploadId=row["UploadId"]).get("Parts", ()))
            )
            for row in uploads
        )

    def stop(self) -> None:
        self.client.close()
        self._server.stop()


def s3_files(endpoint: str, *, read_timeout: float = 20) -> Any:
    """An s3fs file system of its own, as DVC makes it."""
    import s3fs

    return s3fs.S3FileSystem(
        endpoint_url=endpoint,
        skip_instance_cache=True,
        config_kwargs={
            "read_timeout": read_timeout,
            "connect_timeout": 5,
            "retries": {"total_max_attempts": 1},
        },
    )


class Place:
    """Where one remote lies."""

    server_fixture: ClassVar[str] = ""  # which server it needs
    resumes_uploads: ClassVar[bool] = False
    outlives: ClassVar[bool] = True  # another process sees it

    def __init__(self, root: Path, server: Any) -> None:
        self.root = root
        self.remote = self.open()

    def open(self) -> Remote:
        raise NotImplementedError

    def recipe(self) -> str:
        """Python that makes the same remote in another process."""
        raise NotImplementedError

    def contents(self) -> dict[str, bytes]:
        """Everything under the remote's folder, by name, also what is no object."""
        base = self.root / FOLDER
        files = (path for path in sorted(base.rglob("*")) if path.is_file())
        return {path.relative_to(base).as_posix(): path.read_bytes() for path in files}

    def pieces(self) -> int:
        """How many pieces of unfinished uploads lie there."""
        return sum(name.startswith("tmp/") for name in self.contents())

    def close(self) -> None:
        """Nothing."""


class DirectoryPlace(Place):
    resumes_uploads = True

    def open(self) -> Remote:
        return DirectoryRemote(self.root, "shelf")

    def recipe(self) -> str:
        return (
            "from pathlib import Path; from vpstore.storage.remotes.directory import DirectoryRemote as R; "
            f"remote = R(Path({json.dumps(str(self.root))}), 'shelf')"
        )


class S3Place(Place):
    server_fixture = "s3_server"
    resumes_uploads = True

    def __init__(self, root: Path, server: S3Server) -> None:
        self.server = server
        self.bucket = server.bucket()
        super().__init__(root, server)

    def open(self) -> Remote:
        return S3Remote(self.server.files, f"{self.bucket}/models/", "s3", patience=QUICK, part_size=PART)

    def recipe(self) -> str:
        return (
            "import s3fs; from vpstore.storage.remotes.s3 import S3Remote as R; "
            f"remote = R(s3fs.S3FileSystem(endpoint_url={self.server.endpoint!r}), "
            f"'{self.bucket}/models', 's3', part_size={PART})"
        )

    def contents(self) -> dict[str, bytes]:
        prefix = f"models/{FOLDER}/"
        return {key[len(prefix) :]: data for key, data in self.server.contents(self.bucket).items()}

    def pieces(self) -> int:
        return self.server.pieces(self.bucket)


class HeldPlace(S3Place):
    """The general transport over files that appear on commit."""

    resumes_uploads = False

    def open(self) -> Remote:
        return FilesystemRemote(self.server.files, f"{self.bucket}/models", "held", patience=QUICK)

    def recipe(self) -> str:
        return (
            "import s3fs; from vpstore.storage.remotes.filesystem import FilesystemRemote as R; "
            f"remote = R(s3fs.S3FileSystem(endpoint_url={self.server.endpoint!r}), '{self.bucket}/models', 'held')"
        )

    def pieces(self) -> int:
        return super().pieces() + sum(name.startswith("tmp/") for name in self.contents())


class MemoryPlace(Place):
    outlives = False

    def open(self) -> Remote:
        import fsspec

        self._fs = fsspec.filesystem("memory")
        self._base = f"/remote-{next(_numbers)}"
        return FilesystemRemote(self._fs, self._base, "memory", patience=QUICK)

    def contents(self) -> dict[str, bytes]:
        base = f"{self._base}/{FOLDER}/"
        return {path[len(base) :]: self._fs.cat_file(path) for path in self._fs.find(base)}

    def close(self) -> None:
        self._fs.store.clear()
        self._fs.pseudo_dirs[:] = [""]


class FilesPlace(Place):
    def open(self) -> Remote:
        import fsspec

        return FilesystemRemote(fsspec.filesystem("file"), str(self.root), "files", patience=QUICK)

    def recipe(self) -> str:
        return (
            "import fsspec; from vpstore.storage.remotes.filesystem import FilesystemRemote as R; "
            f"remote = R(fsspec.filesystem('file'), {json.dumps(str(self.root))}, 'files')"
        )


class SftpPlace(Place):
    """The general transport over SSH, to a server in a thread."""

    def __init__(self, root: Path, server: None) -> None:
        self._connections: list[Any] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result(30)
        super().__init__(root, server)

    async def _serve(self) -> Any:
        import asyncssh

        connections = self._connections

        class Anybody(asyncssh.SSHServer):
            def connection_made(self, connection: Any) -> None:
                connections.append(connection)

            def begin_auth(self, username: str) -> bool:
                return False

        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_factory=Anybody,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            sftp_factory=asyncssh.SFTPServer,
        )

    def open(self) -> Remote:
        import sshfs

        options = {"username": "anybody", "client_keys": None, "agent_path": None, "config": None}
        fs = sshfs.SSHFileSystem("127.0.0.1", port=self._server.get_port(), skip_instance_cache=True, **options)
        return FilesystemRemote(fs, str(self.root), "sftp", patience=QUICK)

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            for connection in self._connections:
                connection.close()
                await connection.wait_closed()
            await self._server.wait_closed()
            await asyncio.sleep(0)  # the last transport says good-bye

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()


PLACES: dict[str, type[Place]] = {
    "directory": DirectoryPlace,
    "s3": S3Place,
    "held": HeldPlace,
    "memory": MemoryPlace,
    "files": FilesPlace,
    "sftp": SftpPlace,
}
