"""Which trainers of a run live, whoever launched them."""

from __future__ import annotations

import time
from pathlib import Path


def alive(run: Path) -> list[int]:
    """Trainers of a run that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "mnistm_dist.train" in command and str(run) in command:
            found.append(int(path.parent.name))
    return found


def wait_until_gone(run: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while alive(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(run)
