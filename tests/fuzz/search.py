"""Tries inputs by the thousand, and counts how they ended.

The usual suite tries `USUAL` inputs, the same ones in every run; ``pytest -m soak tests/fuzz`` tries `SOAK`, others in
every run, and prints how many per target (counting.py).
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bounds import TooLong, ending, watched
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

USUAL, SOAK = 1_000, 20_000
"""Inputs of the usual suite and of the soak run, over all targets: a target gets its share of them."""
CANARY = "canary"
"""What hostile inputs would make in the working folder if anything in them ran."""

tried: Counter[tuple[str, str]] = Counter()
"""How many inputs of a target ended how."""


class Fuzz:
    """Tries a target's share of the inputs."""

    def __init__(self, folder: Path, *, soak: bool) -> None:
        self.folder, self.soak = folder, soak

    def search(self, target: str, share: float, inputs: st.SearchStrategy[Any], attempt: Callable[[Any], Any]) -> None:
        """Calls ``attempt`` with each of the inputs; ``share`` of `USUAL` (of `SOAK`) are this target's."""

        failures: dict[str, str] = {}

        def judged(value: Any) -> None:
            try:
                with watched(self.folder):
                    end = ending(lambda: attempt(value))
                assert not (self.folder / CANARY).exists(), "something in the input was run"
            except (Exception, TooLong) as error:  # noqa: BLE001  # gathered, so that one run tells of every kind
                end = "failed"
                frames = traceback.extract_tb(error.__traceback__)
                ours = [
                    f"{Path(f.filename).name}:{f.lineno}" for f in frames if "mnistm_dist" in Path(f.filename).parts
                ]
                kind = f"{type(error).__name__} at {' < '.join(reversed(ours[-4:]))} from {frames[-1].name}"
                failures.setdefault(kind, f"{kind}: {error!s:.300} | input {value!r:.600}")
            tried[target, end] += 1

        chosen = settings(
            max_examples=max(1, round(share * (SOAK if self.soak else USUAL))),
            derandomize=not self.soak,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),
        )
        chosen(given(inputs)(judged))()
        assert not failures, "\n".join([f"{len(failures)} kinds of failure", *failures.values()])
