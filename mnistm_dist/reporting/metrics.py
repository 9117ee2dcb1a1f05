"""Metrics of a set of predictions: confusion matrix, accuracy, per-class scores, log loss, calibration.

1. `measure` turns labels and probabilities into `Metrics`. Integers are summed first and divided last.
2. `Metrics.to_json` gives the fields of a split in ``summary.json``; pydantic reads `Metrics` back from them.
3. `mnistm_dist.reporting.describe` summarises them in sentences.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import NonNegativeInt

CALIBRATION_BINS = 15  # of equal width, as in Guo et al. 2017
# Lower bound of a probability in the log loss: half of the sixth decimal, the last one that is written.
SMALLEST_PROBABILITY = 5e-7
# 97.5 % point of the standard normal distribution, for two-sided 95 % intervals.
NORMAL_QUANTILE_975 = 1.959963984540054
WORST_CONFUSIONS = 10  # cells off the diagonal that ``summary.json`` lists, the largest first

# Metrics of the user's own, by name: functions of probabilities, float (N, C), and labels, int64 (N,).
CustomMetrics = Mapping[str, Callable[[np.ndarray, np.ndarray], float]]


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """Scores of one class. A ratio with divisor 0 (never predicted, no images) is None."""

    name: str
    support: int
    """Images of this class."""
    predicted: int
    """Images predicted as this class."""
    correct: int
    precision: float | None
    """correct / predicted."""
    recall: float | None
    """correct / support."""
    f1: float | None
    """2 correct / (support + predicted), the harmonic mean of precision and recall."""


@dataclass(frozen=True, kw_only=True)
class ConfusionCell:
    """One cell off the diagonal of the confusion matrix."""

    true: str
    predicted: str
    count: int
    share_of_true: float
    """Share of the images of the true class, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics of a set of predictions; everything that counts alone determine is a property."""

    classes: tuple[str, ...]
    confusion_matrix: tuple[tuple[NonNegativeInt, ...], ...]
    """Counts; rows are the true class, columns the predicted one."""
    log_loss: float
    """Mean of -ln p(true class), in nats."""
    calibration_error: float
    """Expected calibration error, 0 to 1."""
    custom: Mapping[str, float | None] = field(default_factory=dict)
    """Metrics of the user's own; None: not finite."""

    def __post_init__(self) -> None:
        """Raise `ValueError` if the confusion matrix does not fit the classes or counts no image."""
        width = len(self.classes)
        if [len(row) for row in self.confusion_matrix] != [width] * width or self.total == 0:
            raise ValueError(f"the confusion matrix does not fit {width} classes")

    @property
    def total(self) -> int:
        """Images."""
        return sum(map(sum, self.confusion_matrix))

    @property
    def correct(self) -> int:
        """Images on the diagonal."""
        return sum(row[i] for i, row in enumerate(self.confusion_matrix))

    @property
    def accuracy(self) -> float:
        """correct / total, 0 to 1."""
        return self.correct / self.total

    @property
    def interval95(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson_interval(self.correct, self.total)

    @cached_property
    def per_class(self) -> tuple[ClassScores, ...]:
        """Scores of each class, in the order of the classes."""
        columns = [sum(column) for column in zip(*self.confusion_matrix, strict=True)]
        return tuple(
            ClassScores(
                name=name,
                support=sum(row),
                predicted=columns[i],
                correct=row[i],
                precision=row[i] / columns[i] if columns[i] else None,
                recall=row[i] / sum(row) if sum(row) else None,
                f1=2 * row[i] / (sum(row) + columns[i]) if sum(row) + columns[i] else None,
            )
            for i, (name, row) in enumerate(zip(self.classes, self.confusion_matrix, strict=True))
        )

    @cached_property
    def confusions(self) -> tuple[ConfusionCell, ...]:
        """The nonzero cells off the diagonal, the largest first, equal ones in the order of the classes."""
        cells = [
            ConfusionCell(true=true, predicted=predicted, count=count, share_of_true=count / sum(row))
            for true, row in zip(self.classes, self.confusion_matrix, strict=True)
            for predicted, count in zip(self.classes, row, strict=True)
            if count and predicted != true
        ]
        return tuple(sorted(cells, key=lambda cell: -cell.count))

    def to_json(self) -> dict[str, Any]:
        """Return the fields of a split in ``summary.json``. ``worst_cell`` is None if there are no errors."""
        cells = [asdict(cell) for cell in self.confusions[:WORST_CONFUSIONS]]
        return {
            "classes": list(self.classes),
            "total": self.total,
            "correct": self.correct,
            "accuracy": self.accuracy,
            "interval95": list(self.interval95),
            "confusion_matrix": [list(row) for row in self.confusion_matrix],
            "per_class": [{"class": row.pop("name"), **row} for row in map(asdict, self.per_class)],
            "worst_confusions": cells,
            "log_loss": self.log_loss,
            "calibration_error": self.calibration_error,
            "worst_cell": cells[0] if cells else None,
            **({"custom": dict(self.custom)} if self.custom else {}),
        }


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """The images whose confidence (largest probability) lies in one bin."""

    lower: float
    """Lower edge of the bin, 0 to 1."""
    count: int
    confidence: float
    """Mean confidence; 0 if the bin is empty."""
    accuracy: float
    """Share of correct images; 0 if the bin is empty."""


def measure(
    labels: np.ndarray, probabilities: np.ndarray, classes: tuple[str, ...], predicted: np.ndarray | None = None
) -> Metrics:
    """Measure predictions against labels.

    Args:
        labels: int64 (N,), the true classes, N > 0.
        probabilities: float (N, C), one row per image.
        classes: names of the C classes.
        predicted: int64 (N,); by default the first largest probability of each row.
    """
    count, width = len(labels), len(classes)
    assert probabilities.shape == (count, width)
    if predicted is None:
        predicted = probabilities.argmax(axis=1)
    matrix = np.bincount(labels * width + predicted, minlength=width * width).reshape(width, width)
    of_true = np.maximum(probabilities[np.arange(count), labels].astype(np.float64), SMALLEST_PROBABILITY)
    bins = calibration_bins(labels, probabilities, predicted)
    return Metrics(
        classes=classes,
        confusion_matrix=tuple(tuple(row) for row in matrix.tolist()),
        log_loss=float(-np.log(of_true).mean()),
        calibration_error=sum(row.count * abs(row.accuracy - row.confidence) for row in bins) / count,
    )


def measure_custom(metrics: CustomMetrics, probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """Return the value of each function; None for one that is not finite, which JSON does not have."""
    return {
        name: value if math.isfinite(value := float(function(probabilities, labels))) else None
        for name, function in metrics.items()
    }


def calibration_bins(
    labels: np.ndarray, probabilities: np.ndarray, predicted: np.ndarray, bins: int = CALIBRATION_BINS
) -> tuple[CalibrationBin, ...]:
    """Sort the images into bins (lower, upper] of equal width by their confidence.

    The expected calibration error is the mean of |accuracy - confidence| over the bins, weighted by their counts:
    Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, equation 3.

    Args:
        labels: int64 (N,).
        probabilities: float (N, C).
        predicted: int64 (N,).
        bins: number of bins.
    """
    confidence = probabilities.max(axis=1)
    index = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    divisor = np.maximum(counts, 1)
    accuracy = np.bincount(index, weights=predicted == labels, minlength=bins) / divisor
    mean_confidence = np.bincount(index, weights=confidence, minlength=bins) / divisor
    return tuple(
        CalibrationBin(
            lower=i / bins, count=int(counts[i]), confidence=float(mean_confidence[i]), accuracy=float(accuracy[i])
        )
        for i in range(bins)
    )


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's score method, which stays within [0, 1].

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927) 209-212.
    """
    share = correct / total
    z2 = NORMAL_QUANTILE_975**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = NORMAL_QUANTILE_975 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # The bounds are exactly 0 and 1 at the ends, which rounding would miss.
    return (0.0 if correct == 0 else middle - half, 1.0 if correct == total else middle + half)
