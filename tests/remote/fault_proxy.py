"""An HTTP proxy on loopback that stands before an S3 server and answers as broken networks and broken remotes do."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

PATIENCE = 30  # seconds after which a stalled answer is given up, should the test not end it


@dataclass(frozen=True)
class Fault:
    """What goes wrong, with which operation, where in the body, and how many times."""

    kind: str
    operation: str = "get"
    at: float = 0.5  # of the body's length; a whole number counts bytes, a negative one from the end
    times: int | None = 1  # None: every time
    older: bytes = b""  # for a stale answer: what the key held before

    def place(self, length: int) -> int:
        """The byte at which it happens."""
        if isinstance(self.at, int):
            return max(0, min(length, self.at if self.at >= 0 else length + self.at))
        return int(length * self.at)


@dataclass
class Request:
    """What one request was, and what it carried."""

    operation: str
    path: str
    sent_bytes: int
    range_header: str = ""


@dataclass
class Answer:
    """What the server behind the proxy said."""

    status: int
    headers: dict[str, str]
    body: bytes = field(repr=False)


class FaultProxy:
    """The proxy, running in threads of its own."""

    def __init__(self, port: int) -> None:
        self.behind = port
        self.requests: list[Request] = []
        self.hits = 0
        self.over = threading.Event()  # set when a stalled answer need not wait any longer
        self._lock = threading.Lock()
        self._fault: Fault | None = None
        self._left = 0
        self._server = _Server(("127.0.0.1", 0), type("Serving", (Handler,), {"proxy": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def arm(self, fault: Fault | None) -> None:
        """From now on, this goes wrong."""
        with self._lock:
            self.over.set()
            self.over = threading.Event()
            self._fault, self.hits = fault, 0
            self._left = 1_000_000 if fault is None or fault.times is None else fault.times
            self.requests.clear()

    def fault_for(self, request: Request) -> Fault | None:
        """The fault that this request meets."""
        with self._lock:
            self.requests.append(request)
            if self._fault is None or self._fault.operation not in (request.operation, "any") or not self._left:
                return None
            self._left -= 1
            self.hits += 1
            return self._fault

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: connections are broken on purpose."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        operation = operation_of(self.command, self.path)
        request = Request(operation, self.path, length, self.headers.get("Range", ""))
        fault = self.proxy.fault_for(request)
        if fault is not None and fault.kind == "reset" and length:
            self.rfile.read(fault.place(length))
            self.reset()
            return
        body = self.rfile.read(length)
        if fault is None:
            self.send(self.forward(body))
        elif fault.kind in BEFORE:
            BEFORE[fault.kind](self, fault, body)
        else:
            answer = self.forward(body)
            AFTER[fault.kind](self, fault, answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

    def forward(self, body: bytes, *, ranged: bool = True) -> Answer:
        """Ask the server behind; like S3, refuse a body that is not what its Content-MD5 says."""
        stated = self.stated()
        if stated and stated != b64encode(md5(body).digest()).decode():
            return refusal(400, "BadDigest")
        headers = {k: v for k, v in self.headers.items() if k.lower() != "connection" and (ranged or k != "Range")}
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.behind, timeout=PATIENCE)
        try:
            connection.request(self.command, self.path, body, headers)
            found = connection.getresponse()
            data = found.read()
            kept = {k: v for k, v in found.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
            return Answer(found.status, kept, data)
        finally:
            connection.close()

    def stated(self) -> str | None:
        """The digest that the sender says the body has."""
        return self.headers.get("Content-MD5")

    def send(self, answer: Answer, *, length: int | None = None, upto: int | None = None) -> None:
        """Answer; with another length, or only the body's beginning, if so asked."""
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        stated = answer.headers.get("Content-Length") if self.command == "HEAD" else str(len(answer.body))
        self.send_header("Content-Length", str(length) if length is not None else stated or "0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:upto])
        self.wfile.flush()

    def end(self) -> None:
        """Close the connection in good order."""
        self.close_connection = True

    def reset(self) -> None:
        """Break the connection: the other end gets an RST."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def stall(self) -> None:
        """Say nothing more until the test is over."""
        self.proxy.over.wait(PATIENCE)
        self.end()

    def full(self) -> Answer:
        """The whole object, whatever range was asked for."""
        return self.forward(b"", ranged=False)


def operation_of(method: str, path: str) -> str:
    """What a request is in S3's terms."""
    query = parse_qs(urlsplit(path).query, keep_blank_values=True)
    if method == "PUT":
        return "part" if "partNumber" in query else "put"
    if method == "POST":
        return "create" if "uploads" in query else "complete"
    if method == "DELETE":
        return "abort" if "uploadId" in query else "delete"
    if method == "HEAD":
        return "head"
    if "uploads" in query:
        return "uploads"
    if "uploadId" in query:
        return "parts"
    return "list" if "list-type" in query else "get"


def refusal(status: int, code: str) -> Answer:
    """An error as S3 sends it."""
    text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>a fault on purpose</Message></Error>'
    return Answer(status, {"Content-Type": "application/xml"}, text.encode())


def _said(status: int, code: str) -> Callable[[Handler, Fault, bytes], None]:
    def act(handler: Handler, fault: Fault, body: bytes) -> None:
        handler.send(refusal(status, code))

    return act


def _page(handler: Handler, fault: Fault, body: bytes) -> None:
    """A captive portal."""
    handler.send(
        Answer(200, {"Content-Type": "text/html"}, b"<html><body>Please sign in" + b" " * 300 + b"</body></html>")
    )


def _flipped_request(handler: Handler, fault: Fault, body: bytes) -> None:
    data = bytearray(body)
    data[fault.place(len(data) - 1)] ^= 1
    handler.send(handler.forward(bytes(data)))


def _short(handler: Handler, fault: Fault, answer: Answer) -> None:
    handler.send(answer, length=len(answer.body), upto=fault.place(len(answer.body)))
    handler.end()


def _reset(handler: Handler, fault: Fault, answer: Answer) -> None:
    handler.send(answer, length=len(answer.body), upto=fault.place(len(answer.body)))
    handler.reset()


def _lost(handler: Handler, fault: Fault, answer: Answer) -> None:
    """The request was carried out, but its answer never comes."""
    handler.reset()


def _too_long(handler: Handler, fault: Fault, answer: Answer) -> None:
    handler.send(answer, length=len(answer.body) + 7)
    handler.end()


def _too_short(handler: Handler, fault: Fault, answer: Answer) -> None:
    at = fault.place(len(answer.body))
    handler.send(answer, length=at, upto=at)


def _asked_from(handler: Handler) -> int:
    match = re.match(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    return int(match.group(1)) if match else 0


def _shifted(handler: Handler, fault: Fault, answer: Answer) -> None:
    """Another range, and it says so."""
    full = handler.full().body
    start = _asked_from(handler) + 1
    answer.headers["Content-Range"] = f"bytes {start}-{len(full) - 1}/{len(full)}"
    handler.send(Answer(206, answer.headers, full[start:]))


def _shifted_silently(handler: Handler, fault: Fault, answer: Answer) -> None:
    """Another range that claims to be the one asked for."""
    full = handler.full().body
    start = _asked_from(handler)
    handler.send(Answer(answer.status, answer.headers, full[start + 1 :] + full[:1]))


def _from_the_start(handler: Handler, fault: Fault, answer: Answer) -> None:
    """The object's first bytes under the Content-Range of those asked for."""
    handler.send(Answer(answer.status, answer.headers, handler.full().body[: len(answer.body)]))


def _whole(handler: Handler, fault: Fault, answer: Answer) -> None:
    """200 for 206: the whole object."""
    handler.send(handler.full())


def _range_as_whole(handler: Handler, fault: Fault, answer: Answer) -> None:
    """200 for 206: the range's bytes as if they were everything."""
    answer.headers.pop("Content-Range", None)
    handler.send(Answer(200, answer.headers, answer.body))


def _stale(handler: Handler, fault: Fault, answer: Answer) -> None:
    """What the key held before, with all headers right for that."""
    start = _asked_from(handler)
    headers = answer.headers | {
        "ETag": f'"{md5(fault.older).hexdigest()}"',
        "Content-Range": f"bytes {start}-{len(fault.older) - 1}/{len(fault.older)}",
    }
    handler.send(Answer(206, headers, fault.older[start:]))


def _flipped(handler: Handler, fault: Fault, answer: Answer) -> None:
    data = bytearray(answer.body)
    if data:
        data[fault.place(len(data) - 1)] ^= 1
    handler.send(Answer(answer.status, answer.headers, bytes(data)))


def _empty(handler: Handler, fault: Fault, answer: Answer) -> None:
    handler.send(Answer(answer.status, answer.headers, b""))


def _chunked(handler: Handler, fault: Fault, answer: Answer) -> None:
    """No length, and an end that comes too early."""
    handler.send_response_only(answer.status)
    for name, value in answer.headers.items():
        if name.lower() != "content-length":
            handler.send_header(name, value)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    part = answer.body[: fault.place(len(answer.body))]
    handler.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(part), part))


def _slow(handler: Handler, fault: Fault, answer: Answer) -> None:
    handler.send(answer, length=len(answer.body), upto=fault.place(len(answer.body)))
    handler.stall()


BEFORE: dict[str, Callable[[Handler, Fault, bytes], None]] = {
    "500": _said(500, "InternalError"),
    "503": _said(503, "SlowDown"),
    "403": _said(403, "AccessDenied"),
    "404": _said(404, "NoSuchUpload"),
    "page": _page,
    "silence": lambda handler, fault, body: handler.stall(),
    "hang-up": lambda handler, fault, body: handler.reset(),
    "flipped-request": _flipped_request,
}
AFTER: dict[str, Callable[[Handler, Fault, Answer], None]] = {
    "reset": _reset,
    "short": _short,
    "lost": _lost,
    "too-long": _too_long,
    "too-short": _too_short,
    "shifted": _shifted,
    "shifted-silently": _shifted_silently,
    "from-the-start": _from_the_start,
    "200-whole": _whole,
    "200-range": _range_as_whole,
    "stale": _stale,
    "flipped": _flipped,
    "empty": _empty,
    "chunked": _chunked,
    "slow": _slow,
    "500-after": lambda handler, fault, answer: handler.send(refusal(500, "InternalError")),
    "404-after": lambda handler, fault, answer: handler.send(refusal(404, "NoSuchUpload")),
}
