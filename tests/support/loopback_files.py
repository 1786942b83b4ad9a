"""A server of one file on loopback that does what servers and networks do to downloads."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Mapping
from types import TracebackType


class FileServer:
    """Runs while the `with` block does; `url` is the file's.

    Each of `plan` is what happens to one request, in turn:

    cut:N       the connection ends after N bytes of the body, although more were announced
    whole       a `Range` is not heeded
    change:TEXT the file becomes this one before it is sent
    status:N    this answer
    stall       none, until the server is stopped
    part:N      a part from N on is sent, whatever was asked for
    """

    def __init__(self, content: bytes, *plan: str, headers: Mapping[str, str] | None = None) -> None:
        self.content, self.plan, self.headers = content, list(plan), dict(headers or {})
        self.version = 1
        self.asked: list[tuple[str | None, str | None]] = []
        """`Range` and `If-Range` of each request."""
        self.bytes_sent = 0
        self._stopped = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/weights/ckpt.pth"

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        wanted, unchanged = request.headers.get("Range"), request.headers.get("If-Range")
        self.asked.append((wanted, unchanged))
        what, _, value = (self.plan.pop(0) if self.plan else "").partition(":")
        if what == "stall":
            self._stopped.wait()
            return
        if what == "status":
            request.send_error(int(value))
            return
        if what == "change":
            self.content, self.version = value.encode(), self.version + 1
        etag = self.headers.get("ETag", f'"v{self.version}"')
        part = wanted is not None and what != "whole" and unchanged == etag
        begin = int(str(wanted).removeprefix("bytes=").rstrip("-")) if part else 0
        begin = int(value) if what == "part" and part else begin
        body = self.content[begin:]
        request.send_response(206 if part else 200)
        if part:
            request.send_header("Content-Range", f"bytes {begin}-{len(self.content) - 1}/{len(self.content)}")
        for key, text in ({"Content-Length": str(len(body)), "ETag": etag} | self.headers).items():
            if text:
                request.send_header(key, text)
        request.end_headers()
        body = body[: int(value)] if what == "cut" else body
        self.bytes_sent += len(body)
        request.wfile.write(body)

    def __enter__(self) -> FileServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
