"""The operations of the S3 protocol on one bucket, tried again where that may help.

Place in the path: under `s3` and `s3_upload`. The client is the s3fs file system of the DVC remote: one event loop in a
thread of its own, and every caller waits for its own answers.
Invariants: what is not there is a FileNotFoundError; everything else that fails is a RemoteFailure; an answer that is
not the protocol's (200 and a page for people) is a failure, never an empty listing or a finished upload.

Example:
    calls = S3Calls(fs, "bucket/models", link)
    calls("head_object", "keys/ab/...", "looking", Key=calls.key("keys/ab/..."))
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from vpstore.storage.remotes.base import FOLDER
from vpstore.storage.remotes.failures import Broken, Link, check_name

_Result = TypeVar("_Result")
_NEEDED: Final = {
    "list_objects_v2": ("IsTruncated",),
    "head_object": ("ETag", "ContentLength"),
    "get_object": ("ETag", "ContentLength", "Body"),
    "put_object": ("ETag",),
    "create_multipart_upload": ("UploadId",),
    "upload_part": ("ETag",),
    "complete_multipart_upload": ("ETag",),
    "list_multipart_uploads": ("IsTruncated",),
    "list_parts": ("IsTruncated",),
}


class S3Calls:
    """One prefix of one bucket."""

    def __init__(self, fs: Any, root: str, link: Link) -> None:
        """Use an s3fs file system; `root` is bucket and prefix, without our own folder."""
        fs.retries = 1  # trying again is done here, where it is known what was reached
        self.fs, self.link = fs, link
        self.bucket, self.prefix, _ = fs.split_path(f"{root.strip('/')}/{FOLDER}")

    def key(self, name: str) -> str:
        """The key of an object."""
        return f"{self.prefix}/{check_name(name)}"

    def name(self, key: str) -> str:
        """The object's name, from its key."""
        return key[len(self.prefix) + 1 :]

    def once(self, method: str, **arguments: Any) -> Any:
        """One operation, tried once.

        Raises:  Broken: an answer without what every answer to this has, such as the page of a proxy that wants a
                 login; what s3fs raises: OSError and its kinds for answers of the server, the client's own for the
                 rest.
        """
        answer = self.fs.call_s3(method, Bucket=self.bucket, **arguments)
        missing = [field for field in _NEEDED.get(method, ()) if answer.get(field) is None]
        if missing:
            raise Broken(f"the answer to {method} is not S3's", expected=", ".join(missing), found="none")
        return answer

    def __call__(self, method: str, name: str, doing: str, **arguments: Any) -> Any:
        """One operation, tried again if that may help.

        Args:    name: the object's, and doing: the purpose, for the error.
        Raises:  FileNotFoundError: the object, the upload or the bucket is not there; RemoteFailure.
        """
        return self.link.attempt(name, doing, lambda: self.once(method, **arguments))

    def wait(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run a coroutine in the client's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.fs.loop).result()


def error_code(error: BaseException) -> str:
    """The code in the server's answer, such as NoSuchBucket or 404; empty if there was no answer."""
    answer = getattr(error.__cause__ or error, "response", None)
    return str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""
