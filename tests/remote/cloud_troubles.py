"""What goes wrong between a client and a cloud, on loopback: a connection that breaks, and a server that says no."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler


class Cutter:
    """Stands before a server, whatever it speaks, and cuts some connections off once so much has come back."""

    def __init__(self, port: int, *, after: int, times: int) -> None:
        self._behind, self._after, self.times = port, after, times
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Cutter:
        self._threads[0].start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._close(self._listening)
        self._threads[0].join(30)  # after it nobody adds to either list
        for one in self._sockets:
            self._close(one)
        for thread in self._threads[1:]:
            thread.join(30)

    def _accept(self) -> None:
        while True:
            try:
                near = self._listening.accept()[0]
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._behind))
            self._sockets += [near, far]
            for source, target, is_answer in ((near, far, False), (far, near, True)):
                self._threads.append(threading.Thread(target=self._pass_on, args=(source, target, is_answer)))
                self._threads[-1].start()

    def _pass_on(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
                passed += len(data)
                if is_answer and passed > self._after and self.times:
                    self.times -= 1
                    break
        self._close(source)
        self._close(target)

    @staticmethod
    def _close(one: socket.socket) -> None:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()


class Refusing(BaseHTTPRequestHandler):
    """What Google says to strangers; no emulator of it asks for credentials."""

    status = 403

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        message = "Anonymous caller does not have storage.objects.list access to the Google Cloud Storage bucket."
        body = json.dumps({"error": {"code": self.status, "message": message}}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_DELETE = do_GET  # noqa: N815 - the names that http.server wants

    def log_message(self, *arguments: object) -> None:
        pass
