"""A web server with byte ranges that misbehaves as often as it is told to."""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("reset", "busy", "short")


class BadServer(ThreadingHTTPServer):
    """Serves a folder; a share of the requests ends in a reset, a 503 or half a body."""

    daemon_threads = True

    def __init__(self, folder: Path, faults: tuple[str, ...], share: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.faults, self.share = folder, faults, share
        self.draw, self.lock = random.Random(0), threading.Lock()
        self.count: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, path: str) -> str | None:
        with self.lock:
            fault = self.draw.choice(self.faults) if self.draw.random() < self.share else None
            self.count.update([f"any {path}", fault or "served"])
        return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no error of the server's."""


class _Handler(BaseHTTPRequestHandler):
    server: BadServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        fault = self.server.next_fault(self.path)
        if "Authorization" in self.headers:
            self.server.count.update(["with a password"])
        if fault == "reset":
            return self.reset()
        if fault == "busy":
            return self.reply(503, b"", 0)
        path = self.server.folder / self.path.split("?")[0].lstrip("/")
        if not path.is_file():
            return self.reply(404, b"", 0)
        data, status = path.read_bytes(), 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            data, status = data[int(wanted[1]) : int(wanted[2]) + 1], 206
        body = data if with_body else b""
        if fault in ("endless", "long", "whole", "slow"):
            return self.lie(fault, path.read_bytes(), data, with_body=with_body)
        return self.reply(status, body[: len(body) // 2] if fault == "short" else body, len(data))

    def reply(self, status: int, body: bytes, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = len(body) < length

    def lie(self, fault: str, whole: bytes, part: bytes, *, with_body: bool) -> None:
        """An answer whose length is not that of what was asked for, or that never ends."""
        said = {"endless": 2**40, "long": 100 * len(whole), "whole": len(whole), "slow": len(part)}
        self.reply(206, b"", said[fault])
        try:
            if with_body and fault == "endless":
                while True:
                    self.wfile.write(bytes(2**20))
            elif with_body and fault == "slow":
                for byte in part:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.1)
            elif with_body:
                self.wfile.write(whole if fault == "whole" else part)
        except OSError:
            pass  # whoever asked has gone
        self.close_connection = True

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve(
    folder: Path, *, faults: tuple[str, ...] = FAULTS, share: float = 0.0
) -> Iterator[BadServer]:
    server = BadServer(folder, faults, share)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
