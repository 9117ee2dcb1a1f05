"""Run folders whose files are cut off or have changed bytes, as `mnistm_dist.report` reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import write_run

from mnistm_dist.reporting.html import write_report

FILES = (
    "state.json",
    "summary.json",
    "environment.json",
    "architecture.json",
    "config.yaml",
    "log.jsonl",
    "predictions_val.csv",
)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run."""
    folder = tmp_path_factory.mktemp("valid") / "run"
    return write_run(folder, val_size=30, epochs=2, steps_per_epoch=3, resume_at=2, test_split=False)


@pytest.mark.parametrize("name", FILES)
def test_the_report_of_a_run_with_a_damaged_file_is_written(valid: Path, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(valid, tmp_path / "run"))
    # Without the other files that figures are drawn from: drawing takes most of the time.
    for drawn in {"log.jsonl", "predictions_val.csv", "summary.json"} - {name}:
        (run / drawn).unlink()
    content = (valid / name).read_bytes()
    places = st.integers(0, len(content) - 1)

    @given(cut=places, changes=st.lists(st.tuples(places, st.integers(0, 255)), max_size=3))
    @settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def search(cut: int, changes: list[tuple[int, int]]) -> None:
        data = bytearray(content)
        for place, value in changes:
            data[place] = value
        (run / name).write_bytes(data if changes else data[:cut])
        write_report([run], tmp_path / "report.html")

    search()
