"""The callback by which long work reports its progress."""

from collections.abc import Callable

Progress = Callable[[int, int], None]  # called with (done, total)


def stage(progress: Progress | None, number: int, stages: int) -> Progress:
    """Return a callback for stage ``number`` of ``stages`` over the same items, which reports overall progress."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress((number * total + done) // stages, total)

    return report
