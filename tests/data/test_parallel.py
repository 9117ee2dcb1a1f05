"""A map over processes: in order, bounded, and ended with its parent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mnistm_dist.data.parallel import ordered_map
from mnistm_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def _square(number: int) -> int:
    if number == 13:
        raise UserError("thirteen")
    return number * number


@pytest.mark.parametrize("workers", [0, 2])
def test_a_parallel_map_keeps_the_order_holds_few_items_and_passes_errors_on(workers: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    results = ordered_map(_square, items(), workers=workers)
    assert [next(results) for _ in range(4)] == [0, 1, 4, 9]
    assert len(taken) <= 4 + 3 * max(workers, 1)
    with pytest.raises(UserError, match="thirteen"):
        list(results)


WORK = """
import os, time

def work(number):
    time.sleep(0 if number == 0 else 600)
    return os.getpid()
"""
ORPHANS = """
from mnistm_dist.data.parallel import ordered_map
from work import work

results = ordered_map(work, range(100), workers=2)
print(next(results), flush=True)
next(results)
"""


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(ORPHANS)
    (tmp_path / "work.py").write_text(WORK)
    process = subprocess.Popen(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        if "zombie" in Path(f"/proc/{worker}/status").read_text():
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{worker}").exists()
