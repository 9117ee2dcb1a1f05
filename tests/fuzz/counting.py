"""A plugin of these tests: the fixture that they try inputs with, and the counts at the end of a run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from search import Fuzz, tried


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The inputs per target, and how they ended."""
    if not tried:
        return
    terminalreporter.section("inputs tried")
    for target in dict.fromkeys(target for target, _ in tried):
        ends = {end: count for (name, end), count in tried.items() if name == target}
        told = ", ".join(f"{count:,} {end}" for end, count in ends.items())
        terminalreporter.write_line(f"{target}: {sum(ends.values()):,} ({told})")
    terminalreporter.write_line(f"all targets: {sum(tried.values()):,}")


@pytest.fixture(params=["usual", pytest.param("soak", marks=[pytest.mark.soak, pytest.mark.timeout(7200)])])
def fuzz(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fuzz:
    """Tries inputs in an empty folder, where temporary files and the cache lie too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MNISTM_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return Fuzz(tmp_path, soak=request.param == "soak")
