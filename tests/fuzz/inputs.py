"""Strategies: a valid file with some bytes changed, a valid document with some values changed, and hostile words."""

from __future__ import annotations

import copy
import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from search import CANARY

SIZES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
"""Numbers at which a size, a count or an offset is likely to go wrong."""
NUMBERS = tuple(
    struct.pack(order + form, size & (1 << 8 * struct.calcsize(form)) - 1)
    for size in SIZES
    for order in "<>"
    for form in "BHIQ"
)
EDITS = ("flip", "set", "overwrite", "insert", "delete", "truncate", "repeat", "splice")

_edits = st.lists(
    st.tuples(
        st.sampled_from(EDITS),
        st.integers(0, 2**24 - 1),
        st.integers(0, 2**24 - 1),
        st.sampled_from(NUMBERS) | st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=6,
)


def damaged(*valid: bytes) -> st.SearchStrategy[bytes]:
    """Bytes of one of the valid files, changed in up to six places; one in ten is no more than random bytes."""
    changed = st.tuples(st.integers(0, len(valid) - 1), _edits).map(lambda drawn: _edit(valid, *drawn))
    return st.integers(0, 9).flatmap(lambda number: changed if number else st.binary(max_size=300))


def _edit(valid: Sequence[bytes], which: int, edits: list[tuple[str, int, int, bytes]]) -> bytes:
    data = bytearray(valid[which])
    for kind, first, second, new in edits:
        at = first % (len(data) + 1)
        # Headers are where sizes stand: half of the changes go to the first and the last kilobyte.
        if first % 4 == 0:
            at = min(at % 512, len(data))
        elif first % 4 == 1:
            at = max(0, len(data) - at % 512)
        length = 1 + second % 64 if second % 2 else 1 + second % (len(data) + 1)
        match kind:
            case "flip" if at < len(data):
                data[at] ^= 1 << second % 8
            case "set" if at < len(data):
                data[at] = new[0]
            case "overwrite":
                data[at : at + len(new)] = new
            case "insert":
                data[at:at] = new
            case "delete":
                del data[at : at + length]
            case "truncate" if second % 4 == 0:
                del data[at:]
            case "repeat":
                data[at:at] = data[at : at + length][:4096]
            case "splice":
                other = valid[second % len(valid)]
                start = second % (len(other) + 1)
                data[at : at + length] = other[start : start + length]
    return bytes(data)


WORDS = (
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
    *("nan", "inf", "-1", "0", "1e309", "9" * 5000, "0x10", "١٢", "true", "null", "none", "auto", "~", "x" * 5000),
    *("<script>alert(1)</script>", "%s%n{0}", "$(touch canary)", "-h", "--", "--help", "best", "last", "train", "val"),
)
"""Texts that are taken for something else, somewhere."""
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 2**53, 2**63, 2**64, 10**400])
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5), inner),
    max_leaves=4,
)
"""What JSON and YAML can say."""


@st.composite
def changed(draw: st.DrawFn, valid: Any, times: int = 3) -> Any:
    """A valid document with up to ``times`` values replaced, removed, doubled or moved."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, times))):
        place, key = value, None
        while isinstance(place, dict | list) and place:
            parent, key = place, draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
            place = parent[key]
            if draw(st.integers(0, 3)) == 0:
                break
        if key is None:
            return draw(anything)
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "nest"])):
            case "replace":
                parent[key] = draw(anything)
            case "remove":
                del parent[key]
            case "add" if isinstance(parent, list):
                parent.insert(key, draw(anything))
            case "add":
                parent[draw(st.sampled_from(WORDS) | st.text(max_size=5))] = draw(anything)
            case "nest":
                parent[key] = [parent[key]]
    return value
