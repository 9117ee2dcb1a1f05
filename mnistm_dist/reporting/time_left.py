"""The time that a training still takes, estimated from what its steps and evaluations have taken."""

from collections.abc import Mapping

# Seconds grow with the side of an image to this power: of `fast` on two CPU cores, a step at 48 and at 64 px took 1.93
# and 3.20 times as long as at 32 px. Less than the number of pixels, since the optimizer does not depend on the size.
SIZE_EXPONENT = 1.7
# An evaluation per image, as a share of training, until one was measured: a forward pass without a backward pass.
EVALUATION_SHARE = 1 / 3
NEWEST_WEIGHT = 0.2  # of the newest measurement, in the moving average


class TimeLeft:
    """Seconds per image at each image size, measured where they can be and scaled elsewhere."""

    def __init__(self) -> None:
        self._train: dict[int, float] = {}
        self._evaluate: dict[int, float] = {}

    def trained(self, size: int, seconds_per_image: float) -> None:
        """Record training steps at ``size`` pixels."""
        _average(self._train, size, seconds_per_image)

    def evaluated(self, size: int, seconds_per_image: float) -> None:
        """Record an evaluation at ``size`` pixels."""
        _average(self._evaluate, size, seconds_per_image)

    def seconds(self, train: Mapping[int, int], evaluate: Mapping[int, int]) -> float | None:
        """Return the seconds for these numbers of images by image size in pixels; None before the first step."""
        if not self._train:
            return None
        share, known = (1.0, self._evaluate) if self._evaluate else (EVALUATION_SHARE, self._train)
        training = sum(images * _at(self._train, size) for size, images in train.items())
        return training + share * sum(images * _at(known, size) for size, images in evaluate.items())


def _average(measured: dict[int, float], size: int, seconds: float) -> None:
    measured[size] = seconds if size not in measured else (1 - NEWEST_WEIGHT) * measured[size] + NEWEST_WEIGHT * seconds


def _at(measured: Mapping[int, float], size: int) -> float:
    nearest = min(measured, key=lambda known: abs(known - size))
    return measured[nearest] * (size / nearest) ** SIZE_EXPONENT
