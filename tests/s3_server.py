"""A server on this machine that answers what s3fs asks to read objects: HEAD, GET with ranges, and lists."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NO_OBJECTS = b"<ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"


@contextmanager
def serve_s3(folder: Path, requests: list[Mapping[str, str]] | None = None) -> Iterator[str]:
    """Serve the files of ``folder`` as objects: the folders in it are buckets. Yield the URL of the endpoint.

    ``requests`` receives the headers of every request.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            if requests is not None:
                requests.append(dict(self.headers))
            if "list-type=2" in query:
                self.answer(200, NO_OBJECTS)
            elif not (file := folder / path.lstrip("/")).is_file():
                self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            elif wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                data, start = file.read_bytes(), int(wanted[1])
                part = data[start : int(wanted[2]) + 1 if wanted[2] else None]
                self.answer(206, part, {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"})
            else:
                self.answer(200, file.read_bytes())

        do_HEAD = do_GET

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "ETag": '"1"', **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
