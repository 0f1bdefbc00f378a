"""The least of Google's and Azure's object stores: objects in memory, over HTTP, on this machine.

What is here is what their documentation says of single objects: conditions, versions, ranges.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, tuple[bytes, int]]]
    lock: ClassVar[threading.Lock]

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        with self.lock:
            old = self.objects.get(self._key)
            generation = self.headers.get("x-goog-if-generation-match")
            exists, expected = old is not None, str(old[1]) if old else "0"
            if generation is not None and generation != expected:
                return self._answer(412)
            if self.headers.get("if-none-match") == "*" and exists:
                return self._answer(409)  # Azure: BlobAlreadyExists
            if (tag := self.headers.get("if-match")) and tag != _tag(old):
                return self._answer(412)
            number = old[1] + 1 if old else 1
            self.objects[self._key] = (data, number)
            return self._answer(201)

    def do_GET(self) -> None:
        with self.lock:
            found = self.objects.get(self._key)
        if found is None:
            return self._answer(404)
        data, span = found[0], self.headers.get("range")
        if span is None:
            return self._answer(200, data)
        start, _, end = span.removeprefix("bytes=").partition("-")
        if not start and "x-ms-version" in self.headers:
            return self._answer(400)  # Azure has no ranges from the end
        first = int(start) if start else max(0, len(data) - int(end))
        part = data[first : int(end) + 1] if start else data[first:]
        return self._answer(206, part, f"bytes {first}-{first + len(part) - 1}/{len(data)}")

    do_HEAD = do_GET

    @property
    def _key(self) -> str:
        return self.path.partition("?")[0]

    def _answer(self, status: int, data: bytes = b"", span: str = "") -> None:
        with self.lock if status in (200, 206) else threading.Lock():
            found = self.objects.get(self._key)
        self.send_response(status)
        if found is not None:
            self.send_header("etag", _tag(found))
            self.send_header("x-goog-generation", str(found[1]))
        self.send_header("last-modified", "Wed, 25 Nov 2026 00:00:00 GMT")
        self.send_header("x-ms-version", "2023-11-03")
        if span:
            self.send_header("content-range", span)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def _tag(found: tuple[bytes, int] | None) -> str:
    if found is None:
        return ""
    return f'"{hashlib.sha256(found[0] + bytes([found[1] % 256])).hexdigest()}"'


@contextmanager
def cloud() -> Iterator[str]:
    """Yield the URL of a server."""
    handler = type("Handler", (_Handler,), {"objects": {}, "lock": threading.Lock()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
