"""The lower bounds of pyproject.toml are those of tests/lowest.txt, with which they are tested (CONTRIBUTING.md)."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
UNBOUND = {"types-pyyaml"}
"""Stubs for the type checker; any version will do."""


def requirements() -> list[Requirement]:
    """Return all requirements of pyproject.toml, of every extra, except this package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [asked for asked in map(Requirement, lines) if asked.name != project["name"]]


def test_every_lower_bound_is_the_lowest_version_that_is_tested():
    bounds = {
        asked.name.lower(): Version(part.version)
        for asked in requirements()
        for part in asked.specifier
        if part.operator == ">="
    }
    pins = {}
    for line in (ROOT / "tests" / "lowest.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (exact,) = pin.specifier
            assert exact.operator == "==", line
            pins[pin.name.lower()] = Version(exact.version)
    assert pins == bounds


def test_every_requirement_has_a_bound():
    assert {asked.name.lower() for asked in requirements() if not asked.specifier} == UNBOUND
