"""How work in `mnistm_dist.data` tells of its progress: it calls a function that its caller gives; and its advice."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

AGAIN = "copy the set again, or pack it again"
"""What to do about a packed set that is damaged: the end of a `UserError`."""


def stage(progress: Progress | None, number: int, stages: int) -> Progress:
    """Progress within one of several stages that each go once through everything, told as progress of the whole."""

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress((number * total + done) // stages, total)

    return tell
