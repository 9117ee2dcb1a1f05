"""Every test that the table of faults in README.md names exists, and every test of this folder is in the table."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

HERE = Path(__file__).parent
TEXT = (HERE / "README.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(test_\w+)`", TEXT)))


def named_tests(path: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_every_test_that_the_table_names_is_there(file, name):
    assert name in named_tests(ROOT / "tests" / file)


def test_every_test_of_a_fault_is_in_the_table():
    here = {(f"faults/{path.name}", name) for path in HERE.glob("test_*.py") for name in named_tests(path)}
    assert {(file, name) for file, name in here if file != "faults/test_table.py"} <= set(NAMED)
