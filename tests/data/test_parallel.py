"""A map over processes: in order, bounded, and ended with its parent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mnistm_dist.data.parallel import available_cores, cpu_quota, ordered_map
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


def cgroups(folder: Path, memberships: str, files: dict[str, str]) -> dict[str, Path]:
    """Write a file of memberships and a tree of cgroups; return the arguments of `cpu_quota`."""
    for name, content in {"own": memberships, **{f"root/{name}": content for name, content in files.items()}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return {"own": folder / "own", "root": folder / "root"}


@pytest.mark.parametrize(
    ("memberships", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, float("inf")),
        # The smallest of the cgroups from the own one up.
        ("0::/job/step\n", {"job/step/cpu.max": "max 100000\n", "job/cpu.max": "400000 100000\n"}, 4),
        ("0::/job/step\n", {"job/step/cpu.max": "200000 100000\n", "job/cpu.max": "400000 100000\n"}, 2),
        # In a container, the path is that of the host.
        ("0::/docker/123\n", {"cpu.max": "300000 100000\n"}, 3),
        (
            "4:memory:/\n3:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("3:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        ("4:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
    ],
)
def test_the_cpu_quota_is_that_of_the_cgroups(tmp_path, memberships, files, cores):
    assert cpu_quota(**cgroups(tmp_path, memberships, files)) == cores


def test_without_cgroups_there_is_no_quota(tmp_path):
    assert cpu_quota(tmp_path / "own", tmp_path) == float("inf")


@pytest.mark.parametrize(("quota", "cores"), [(1.9, 1), (0.5, 1), (float("inf"), 3), (8.0, 3)])
def test_the_cores_are_those_of_the_affinity_mask_and_at_most_the_quota(monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5})
    monkeypatch.setattr("mnistm_dist.data.parallel.cpu_quota", lambda: quota)
    assert available_cores() == cores
