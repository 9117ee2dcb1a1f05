"""The list of messages, docs/messages.md: each is still said, in one line, with nothing of this machine in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT
from listing import messages, working_in
from mistakes import ALL
from places import make

LISTED = ROOT / "docs" / "messages.md"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the mistakes are made."""
    folder = tmp_path_factory.mktemp("messages")
    with working_in(folder):
        make(folder)
    return folder


def without_what_differs(line: str) -> str:
    """A message without numbers and what stands in brackets: what a library says, and how many bytes it writes; and
    without the names that are known, which grow by every recipe, field, optimizer and layout that is added."""
    names = r"(; known(?: recipes)?(?: are|:)) .*?(; or |$)|(; use )(?:auto or )?\w+(?:, \w+)+$"
    line = re.sub(names, r"\1\3 NAMES\2", line)
    return re.sub(r"\d[\d,]*", "N", re.sub(r"\([^()]*\)", "(...)", line))


@pytest.mark.parametrize("title", ALL)
def test_each_mistake_is_told_in_the_line_that_is_listed(template: Path, title: str) -> None:
    listed = {without_what_differs(line.removeprefix("> ")) for line in LISTED.read_text().splitlines()}
    for command, code, told in messages(ALL[title], template):
        assert code == 2, command
        assert told.startswith("error: "), command
        assert told.isprintable(), command
        assert str(template) not in told, command
        assert without_what_differs(told) in listed, f"{command}: {told}\nmake the list anew: see docs/messages.md"
