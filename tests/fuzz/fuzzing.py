"""Try damaged and forged files, and require that each is read or refused in one line.

The `fuzz` fixture tries `FAST` inputs, the same ones in every run; ``pytest -m soak tests/fuzz`` tries `SOAK`, other
ones in every run. No input may raise another exception than `UserError`, start a program, write outside the test's
folder, or allocate memory because a header says so.
"""

from __future__ import annotations

import copy
import os
import re
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mnistm_dist.errors import UserError

FAST, SOAK = 50, 1_000
"""Inputs per test."""
CANARY = "canary"
"""The file that hostile inputs would create in the working folder if their code ran."""
ADDRESS_BYTES = 4 << 30
"""Address space that one input may allocate."""

Attempt = Callable[[Any], object]
Fuzz = Callable[[st.SearchStrategy[Any], Attempt], None]


@pytest.fixture(params=["fast", pytest.param("soak", marks=[pytest.mark.soak, pytest.mark.timeout(7200)])])
def fuzz(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fuzz:
    """``fuzz(inputs, attempt)`` calls ``attempt`` with each input, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MNISTM_DIST_CACHE", str(tmp_path / "cache"))
    soak = request.param == "soak"

    def search(inputs: st.SearchStrategy[Any], attempt: Attempt) -> None:
        @settings(
            max_examples=SOAK if soak else FAST,
            derandomize=not soak,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @given(inputs)
        def check(value: Any) -> None:
            with watched(tmp_path):
                accept_or_refuse(lambda: attempt(value))
            assert not (tmp_path / CANARY).exists(), "code of the input was run"

        check()

    return search


def accept_or_refuse(work: Callable[[], object]) -> None:
    """Run ``work``; it may raise a `UserError` of one line that does not hide a `MemoryError`."""
    try:
        work()
    except UserError as error:
        message = str(error)
        assert message.strip()
        assert "\n" not in message
        assert len(message) < 20_000
        cause: BaseException | None = error
        while cause is not None:
            assert not isinstance(cause, MemoryError), f"memory was allocated because a header says so: {message}"
            cause = cause.__cause__ or cause.__context__


_allowed: Path | None = None
_forbidden: list[str] = []
_STARTS = ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen")
_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_HARMLESS = re.compile(r"^/(dev|proc)/|__pycache__")
# Python finds shared libraries and the system's name with these when a module is first imported.
_LOOKUP = re.compile(r"/(ldconfig|gcc|ld|uname)'")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _allowed is None:
        return
    if event in _STARTS and not _LOOKUP.search(repr(arguments[0])):
        _forbidden.append(f"{event} {arguments!r:.200}")
    elif (event == "open" and arguments[2] and arguments[2] & _WRITES) or event in _CHANGES:
        for place in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
            if isinstance(place, str | bytes | os.PathLike):
                path = os.path.realpath(os.fsdecode(place))
                if not Path(path).is_relative_to(_allowed) and not _HARMLESS.search(path):
                    _forbidden.append(f"{event} {path}")


sys.addaudithook(_audit)


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fail if the block starts a program or writes outside ``folder``, and limit its memory."""
    global _allowed
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESS_BYTES, limits[1]))
    _forbidden.clear()
    _allowed = folder.resolve()
    try:
        yield
    finally:
        _allowed = None
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not _forbidden, _forbidden


SIZES = tuple(
    size.to_bytes(width, order)
    for size in (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
    for width in (1, 2, 4, 8)
    for order in ("little", "big")
    if size < 256**width
)
"""Sizes, counts and offsets that are likely to break a reader."""


@st.composite
def damaged(draw: st.DrawFn, *valid: bytes) -> bytes:
    """Bytes of one of the valid files, with up to six of them changed, inserted, removed or cut off."""
    data = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 6))):
        # Sizes stand in headers, at the start or the end of a file.
        limit = len(data) if draw(st.booleans()) else min(len(data), 512)
        at = draw(st.integers(0, limit))
        at = at if draw(st.booleans()) else len(data) - at
        new = draw(st.sampled_from(SIZES) | st.binary(min_size=1, max_size=8))
        match draw(st.sampled_from(["overwrite", "overwrite", "insert", "delete", "truncate"])):
            case "overwrite":
                data[at : at + len(new)] = new
            case "insert":
                data[at:at] = new
            case "delete":
                del data[at : at + draw(st.integers(1, 64))]
            case "truncate":
                del data[at:]
    return bytes(data)


TEXTS = (
    *(
        "",
        " ",
        ".",
        "..",
        "/",
        "../../evil",
        f"../{CANARY}",
        "a/b",
        "a\\b",
        "C:x",
        "\0",
        "\n",
        "\x1b[2J",
        "é",
        "\ud800",
    ),
    *("nan", "inf", "-1", "0", "1e309", "null", "x" * 5000, "<script>alert(1)</script>", "$(touch canary)", "--help"),
)
"""Texts that could be taken for something else."""
SCALARS = (
    st.sampled_from([None, True, 0, 1, -1, 0.5, 2**31, 2**53, 2**63, 2**64, float("nan"), float("inf")])
    | st.sampled_from(TEXTS)
    | st.text(max_size=8)
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(TEXTS), inner), max_leaves=4
)
"""A JSON document."""


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> Any:
    """A valid JSON document with up to three of its values replaced, removed or nested."""
    document = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        value, parent, key = document, None, None
        while isinstance(value, dict | list) and value and (parent is None or draw(st.integers(0, 3))):
            parent, key = value, draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
            value = parent[key]
        if parent is None:
            return draw(ANYTHING)
        match draw(st.sampled_from(["replace", "replace", "remove", "nest"])):
            case "replace":
                parent[key] = draw(ANYTHING)
            case "remove":
                del parent[key]
            case "nest":
                parent[key] = [parent[key]]
    return document
