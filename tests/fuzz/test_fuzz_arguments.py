"""Command lines of every command: any words are accepted, or refused in one line with exit code 2."""

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

from mnistm_dist import cache, evaluate, export, pack, plan, predict, report, train, verify
from mnistm_dist import config as configuration
from mnistm_dist.data.packing import writer as packing
from mnistm_dist.errors import UserError

pytest_plugins = ["counting"]

FIELDS = " ".join(f"--{name.replace('_', '-')}" for name in configuration.SECTION_OF)
COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "pack": (pack.main, "--out --layout --mnist --photos --blends --split-size --num-shards --seed mnist+photos"),
    "verify": (verify.main, "set"),
    "plan": (plan.main, "--shards --step --world-size --batch-size --seed --order full windowed --json"),
    "train": (train.main, f"{FIELDS} --recipe --no-report --compile=True auto fast 32,48"),
    "evaluate": (evaluate.main, "--shards --split --checkpoint val test best"),
    "predict": (predict.main, "--json --csv --checkpoint --batch-size image.png"),
    "report": (report.main, "--out run"),
    "export": (export.main, "--to onnx torch --out --force --checkpoint"),
    "cache": (cache.main, "list clear --cache-dir --json"),
}
"""Each command, and words that it knows."""
LAST = {"train": ["--shards", "nowhere", "--resume=none", "--tracker", "none", "--threads", "1", "--no-deterministic"]}
"""What ends every command line: no training starts."""


def is_safe(word: str) -> bool:
    """Whether a word holds no NUL, as on every command line, and does not lead out of the folder."""
    return (word.isascii() or word.isprintable()) and not any(part in word for part in ("\0", "..", "/"))


@pytest.mark.parametrize("name", COMMANDS)
def test_any_words_are_accepted_or_refused_in_one_line(fuzz: Fuzz, name: str) -> None:
    main, known = COMMANDS[name]
    packing.pack(tiny_source(9, 3, size=(8, 8)), Path("set"), num_shards=2)
    Path("run").mkdir()
    resolved = {"reader": "resident", "order": "full", "shuffle_streams": 1, "micro_batch": 2, "threads": 1}
    Path("run/config.yaml").write_text(configuration.dump(configuration.replace(configuration.Config(), **resolved)))
    Path("image.png").write_bytes(b"none")
    words = known.split()
    word = st.sampled_from([*words, *words, *filter(is_safe, WORDS), "set", "set", "run", "1", "2", "3"])

    def attempt(argv: list[str]) -> None:
        at_door(main, *argv, *LAST.get(name, ()), codes=(0, 1) if name == "predict" else (0,))

    for argv in ([], ["run"]):
        with contextlib.suppress(UserError):
            attempt(argv)  # memory for modules that are loaded at the first call does not count for an input
    fuzz.search(f"words, {name}", 0.0079, st.lists(word | st.text(max_size=6).filter(is_safe), max_size=8), attempt)
