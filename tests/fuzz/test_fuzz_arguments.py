"""Command lines of every door but train's (test_fuzz_recipes.py): any words are taken or refused in a line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from bounds import at_door
from hypothesis import strategies as st
from inputs import WORDS
from packed_sets import tiny_source
from search import Fuzz

from mnistm_dist import cache, evaluate, export, pack, plan, predict, report, verify
from mnistm_dist.data.packing import writer as packing
from mnistm_dist.errors import UserError

pytest_plugins = ["counting"]


DOORS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "pack": (
        pack.main,
        "--out --layout --mnist --photos --blends --split-size --num-shards --seed --cache-dir mnist+photos",
    ),
    "verify": (verify.main, "set"),
    "plan": (plan.main, "--run --shards --step --world-size --batch-size --seed --order full windowed --json"),
    "evaluate": (evaluate.main, "--shards --split --checkpoint val test best"),
    "predict": (predict.main, "--json --csv --checkpoint --batch-size picture.png"),
    "report": (report.main, "--out run"),
    "export": (export.main, "--to onnx torch --out --force --checkpoint"),
    "cache": (cache.main, "list clear --cache-dir --json"),
}
"""Each door, and words that mean something there."""


def may_be_said(word: str) -> bool:
    """No command line holds a NUL; and no word leads out of the folder, since `pack` makes one and `cache` clears."""
    return (word.isascii() or word.isprintable()) and not any(found in word for found in ("\0", "..", "/"))


@pytest.mark.parametrize("door", DOORS)
def test_any_words_are_taken_or_refused_in_a_line(fuzz: Fuzz, door: str) -> None:
    main, known = DOORS[door]
    words = known.split()
    packing.pack(tiny_source(9, 3, size=(8, 8)), Path("set"), num_shards=2)
    Path("run").mkdir()
    Path("run/config.yaml").write_text("recipe: fast\n")
    Path("picture.png").write_bytes(b"none")
    told = [*words, *words, *filter(may_be_said, WORDS), "set", "set", "run", "1", "2", "3"]
    word = st.sampled_from(told) | st.text(max_size=6).filter(may_be_said)

    def attempt(argv: list[str]) -> None:
        at_door(main, *argv, codes=(0, 1) if door == "predict" else (0,))

    with contextlib.suppress(UserError):
        attempt(["run"])  # what is loaded at the first call is not an input's
    fuzz.search(f"words, {door}", 0.0079, st.lists(word, max_size=8), attempt)
