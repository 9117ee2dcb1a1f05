"""Read W&B's files, and serve a fake W&B: wandb has neither a reader nor a server."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HEADER_SIZE = 7
BLOCK_SIZE = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> list[Any]:
    """Return the records of a ``run-ID.wandb`` file: protobuf messages in a LevelDB log after 7 bytes of W&B.

    LevelDB's format: github.com/google/leveldb, doc/log_format.md. Blocks of 32 KiB; a record has a checksum (4 bytes),
    a length (2) and a type (1); a record longer than a block is split.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, pieces, result = path.read_bytes(), HEADER_SIZE, b"", []
    while place + 7 <= len(data):
        if BLOCK_SIZE - place % BLOCK_SIZE < 7:
            place += BLOCK_SIZE - place % BLOCK_SIZE
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if kind == 0:
            break
        pieces += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(pieces)
            result.append(record)
            pieces = b""
    return result


def offline_records(run_dir: Path) -> list[Any]:
    """Return the records of the run that W&B stores in a run folder; of the offline one if there are two."""
    paths = sorted(run_dir.glob("wandb/*run-*/run-*.wandb"))
    return read_records(paths[0])


def history(records: list[Any]) -> list[dict[str, Any]]:
    """Return what was logged, one row per call."""
    rows = []
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return rows


def upsert_answer() -> dict[str, Any]:
    """Return the answer of W&B when a run is created."""
    project = {"id": "p", "name": "project", "entity": {"id": "e", "name": "entity"}}
    bucket = {"id": "b", "name": "run", "displayName": "run", "description": "", "config": "{}", "project": project}
    return {"data": {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}}


@contextmanager
def server(behaviour: str) -> Iterator[str]:
    """Start a server that pretends to be W&B, and yield its address.

    Args:
        behaviour: ``refuses`` connections, ``stalls`` and never answers, ``cuts`` its answers off, answers
            ``unauthorized``, or ``dies-later``: creates a run as W&B does, and then never answers again.
    """
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    over = threading.Event()
    made = threading.Event()

    def answer(connection: socket.socket) -> None:
        try:
            request = connection.recv(1 << 20)
            if behaviour == "cuts":
                connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"da')
            elif behaviour == "unauthorized":
                connection.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
            elif behaviour == "dies-later" and not made.is_set() and b"/graphql" in request:
                made.set()
                body = json.dumps(upsert_answer()).encode()
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                connection.sendall(head + body)
            else:
                over.wait()
        except OSError:
            pass
        finally:
            connection.close()

    def accept() -> None:
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    if behaviour != "refuses":
        listener.listen(64)
        threading.Thread(target=accept, daemon=True).start()
    try:
        yield address
    finally:
        over.set()
        listener.close()
