"""An HTTP server on this machine that can misbehave."""

from __future__ import annotations

import contextlib
import gzip
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class LocalServer:
    """An HTTP server of one folder on this machine, with ways to misbehave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges = True
        self.cut_once: dict[str, int] = {}
        """File -> bytes after which its first answer breaks off."""
        self.lies: dict[str, bytes] = {}
        """File -> what is sent in its place."""
        self.statuses: dict[str, list[int]] = {}
        """File -> status codes of its first answers."""
        self.retry_after: str | None = None
        """Header of these answers."""
        self.encoded: dict[str, bool] = {}
        """File -> whether it is compressed as its Content-Encoding, gzip, says."""
        self.length = True
        """Whether Content-Length is sent."""
        self.requests: list[tuple[str, str | None]] = []
        """(file, Range) of every request."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):  # the client may have closed the connection
                    server.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/sets/tiny"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if not self._thread.is_alive():
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name, wanted = request.path.rsplit("/", 1)[1], request.headers.get("Range")
        self.requests.append((name, wanted))
        if self.statuses.get(name):
            request.send_response(self.statuses[name].pop(0))
            if self.retry_after is not None:
                request.send_header("Retry-After", self.retry_after)
            request.end_headers()
            return
        path = self.folder / name
        if not path.exists():
            request.send_error(404)
            return
        data, start = self.lies.get(name, path.read_bytes()), 0
        if self.encoded.get(name):
            data = gzip.compress(data, mtime=0)
        if self.ranges and wanted:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(data):
                request.send_error(416)
                return
        request.send_response(206 if start else 200)
        if name in self.encoded:
            request.send_header("Content-Encoding", "gzip")
        if self.length:
            request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        body = data[start:]
        if name in self.cut_once:
            request.wfile.write(body[: self.cut_once.pop(name)])
            request.wfile.flush()
            time.sleep(0.2)  # let the client read what was sent: unread data is dropped when a connection breaks
        else:
            request.wfile.write(body)
        request.close_connection = True
