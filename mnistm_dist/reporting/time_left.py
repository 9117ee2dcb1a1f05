"""The time that a training still takes, estimated from what its steps and evaluations have taken."""

from collections.abc import Mapping
from typing import Literal

# Seconds grow with the side of an image to this power: of `fast` on two CPU cores, a step at 48 and at 64 px took 1.93
# and 3.20 times as long as at 32 px. Less than the number of pixels, since the optimizer does not depend on the size.
SIZE_EXPONENT = 1.7
# An evaluation per image, as a share of training, until one was measured: a forward pass without a backward pass.
EVALUATION_SHARE = 1 / 3
Work = Literal["train", "evaluate"]
NEWEST_WEIGHT = 0.2  # of the newest measurement, in the moving average


class TimeLeft:
    """Seconds per image at each image size, measured where they can be and scaled elsewhere."""

    def __init__(self) -> None:
        self._measured: dict[Work, dict[int, float]] = {"train": {}, "evaluate": {}}

    def add(self, work: Work, size: int, seconds: float) -> None:
        """Record the seconds per image of training steps, or of an evaluation, at ``size`` pixels."""
        known = self._measured[work]
        known[size] = seconds if size not in known else (1 - NEWEST_WEIGHT) * known[size] + NEWEST_WEIGHT * seconds

    def seconds(self, train: Mapping[int, int], evaluate: Mapping[int, int]) -> float | None:
        """Return the seconds for these numbers of images by image size in pixels; None before the first step."""
        trained, evaluated = self._measured.values()
        if not trained:
            return None
        share, known = (1.0, evaluated) if evaluated else (EVALUATION_SHARE, trained)
        training = sum(images * _at(trained, size) for size, images in train.items())
        return training + share * sum(images * _at(known, size) for size, images in evaluate.items())


def _at(measured: Mapping[int, float], size: int) -> float:
    nearest = min(measured, key=lambda known: abs(known - size))
    return measured[nearest] * (size / nearest) ** SIZE_EXPONENT
