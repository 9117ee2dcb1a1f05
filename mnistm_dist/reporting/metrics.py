"""Every number that a set of predictions gives: matrix, accuracy, per class, log loss, calibration.

1. `measure` turns labels and probabilities into `Metrics`; integers are counted first and divided last.
2. `Metrics.to_json` gives the fields of a split in ``summary.json``; `Metrics.from_json` reads them back.
3. `describe` of words.py says what the matrix shows, as the source report does.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mnistm_dist.errors import UserError, escape_control

CALIBRATION_BINS = 15
"""Bins of the calibration error, of equal width (Guo et al. 2017)."""
SMALLEST_PROBABILITY = 5e-7
"""What a probability that six decimals show as 0 counts as in the log loss: half of the last decimal."""
NORMAL_QUANTILE_975 = 1.959963984540054
"""The 97.5 % point of the standard normal distribution, for two-sided 95 % intervals."""
WORST_CONFUSIONS = 10
"""Cells off the diagonal that are listed by name, at most."""


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """How one class fared; a ratio whose divisor is 0 (never predicted, no image) is None."""

    name: str
    support: int
    """Images of this class."""
    predicted: int
    """Images read as this class."""
    correct: int
    precision: float | None
    """correct / predicted."""
    recall: float | None
    """correct / support."""
    f1: float | None
    """2 correct / (support + predicted), the harmonic mean of precision and recall."""


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """One cell off the diagonal."""

    true: str
    predicted: str
    count: int
    share_of_true: float
    """Of the images of the true class, 0 to 1."""
    share_of_all: float
    """Of all images, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What one set of predictions measures."""

    classes: tuple[str, ...]
    total: int
    correct: int
    accuracy: float
    """correct / total, 0 to 1."""
    interval95: tuple[float, float]
    """Wilson's 95 % interval of the accuracy."""
    confusion_matrix: tuple[tuple[int, ...], ...]
    """Counts; rows are the true class, columns the predicted one."""
    per_class: tuple[ClassScores, ...]
    worst_confusions: tuple[Confusion, ...]
    """The largest cells off the diagonal, the largest first, `WORST_CONFUSIONS` at most, none of them 0."""
    log_loss: float
    """Mean of -ln p(true class), in nats."""
    calibration_error: float
    """Expected calibration error, 0 to 1."""

    def to_json(self) -> dict[str, Any]:
        """The fields of a split in ``summary.json``, and ``worst_cell``, which is None where there is no mistake."""
        fields = asdict(self)
        per_class = [{"class": row.pop("name"), **row} for row in fields["per_class"]]
        worst = fields["worst_confusions"]
        return {**fields, "per_class": per_class, "worst_cell": worst[0] if worst else None}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Metrics:
        """The inverse of `to_json`.

        Raises:
            UserError: a field is missing or is no number (a file of another version).
        """
        try:
            matrix = np.array(fields["confusion_matrix"], dtype=np.int64)
            if (matrix < 0).any() or not 0 < matrix.sum() < 2**53:
                raise ValueError("a confusion matrix of no counts")
            classes = tuple(escape_control(str(name)) for name in fields.get("classes", range(len(matrix))))
            return _from_matrix(matrix, classes, float(fields["log_loss"]), float(fields["calibration_error"]))
        except KeyError as error:
            raise UserError(f"these metrics have no field {error}; they were written by another version") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"these metrics cannot be read ({error}); they were written by another version") from None


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """The images whose confidence (largest probability) lies in one bin."""

    lower: float
    """Where the bin begins, 0 to 1."""
    count: int
    confidence: float
    """Mean confidence in the bin; 0 where the bin is empty."""
    accuracy: float
    """Share of them that is right; 0 where the bin is empty."""


def measure(
    labels: np.ndarray, probabilities: np.ndarray, classes: tuple[str, ...], predicted: np.ndarray | None = None
) -> Metrics:
    """Measures predictions against labels.

    Args:
        labels: int64 (N,), the true classes, N > 0.
        probabilities: float (N, C), a row per image.
        classes: the C names.
        predicted: int64 (N,), where it is known; by default the first largest probability of each row.

    Raises:
        UserError: there is no prediction, or the shapes do not fit.
    """
    labels = np.asarray(labels, dtype=np.int64)
    probabilities = np.asarray(probabilities, dtype=np.float64)
    count, width = len(labels), len(classes)
    if count == 0:
        raise UserError("no predictions to measure: found 0 images; give at least one")
    if probabilities.shape != (count, width):
        raise UserError(f"probabilities have the shape {probabilities.shape}; {count} labels need ({count}, {width})")
    if labels.min() < 0 or labels.max() >= width:
        raise UserError(f"labels run from {labels.min()} to {labels.max()}; {width} classes accept 0 to {width - 1}")
    if predicted is None:
        predicted = probabilities.argmax(axis=1)
    matrix = np.bincount(labels * width + predicted, minlength=width * width).reshape(width, width)
    of_true = np.maximum(probabilities[np.arange(count), labels], SMALLEST_PROBABILITY)
    log_loss = float(-np.log(of_true).mean())
    bins = calibration_bins(labels, probabilities, predicted)
    error = sum(row.count * abs(row.accuracy - row.confidence) for row in bins) / count
    return _from_matrix(matrix, classes, log_loss, error)


def calibration_bins(
    labels: np.ndarray, probabilities: np.ndarray, predicted: np.ndarray | None = None, bins: int = CALIBRATION_BINS
) -> tuple[CalibrationBin, ...]:
    """Sorts the images into bins (lower, upper] of equal width by their confidence.

    The expected calibration error is the mean of |accuracy - confidence| over the bins, weighted by their counts:
    Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, equation 3.

    Args:
        labels: int64 (N,).
        probabilities: float (N, C).
        predicted: int64 (N,); by default the first largest probability of each row.
        bins: how many.
    """
    if predicted is None:
        predicted = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    right = np.bincount(place, weights=predicted == labels, minlength=bins)
    sums = np.bincount(place, weights=confidence, minlength=bins)
    divisor = np.maximum(counts, 1)
    return tuple(
        CalibrationBin(
            lower=i / bins,
            count=int(counts[i]),
            confidence=float(sums[i] / divisor[i]),
            accuracy=float(right[i] / divisor[i]),
        )
        for i in range(bins)
    )


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score method, inside [0, 1] and sound near 0 and 1.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927) 209-212.
    """
    share = correct / total
    z2 = NORMAL_QUANTILE_975**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = NORMAL_QUANTILE_975 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # The bounds are exactly 0 and 1 at the ends, which rounding would miss.
    return (0.0 if correct == 0 else middle - half, 1.0 if correct == total else middle + half)


def confusions(matrix: tuple[tuple[int, ...], ...], classes: tuple[str, ...]) -> tuple[Confusion, ...]:
    """The cells off the diagonal that are not 0, the largest first, equal ones in the order of the classes.

    Args:
        matrix: counts, rows are the true class.
        classes: the names of rows and columns.
    """
    total = sum(map(sum, matrix))
    cells = sorted((-cell, i, j) for i, row in enumerate(matrix) for j, cell in enumerate(row) if cell and i != j)
    return tuple(
        Confusion(
            true=classes[i],
            predicted=classes[j],
            count=-negative,
            share_of_true=-negative / sum(matrix[i]),
            share_of_all=-negative / total,
        )
        for negative, i, j in cells
    )


def _ratio(numerator: int, divisor: int) -> float | None:
    return numerator / divisor if divisor else None


def _from_matrix(matrix: np.ndarray, classes: tuple[str, ...], log_loss: float, calibration_error: float) -> Metrics:
    width = len(classes)
    if matrix.shape != (width, width):
        raise UserError(f"a confusion matrix of shape {matrix.shape} does not fit {width} classes")
    total, correct = int(matrix.sum()), int(np.trace(matrix))
    support, columns, diagonal = matrix.sum(axis=1), matrix.sum(axis=0), matrix.diagonal()
    per_class = tuple(
        ClassScores(
            name=classes[i],
            support=int(support[i]),
            predicted=int(columns[i]),
            correct=int(diagonal[i]),
            precision=_ratio(int(diagonal[i]), int(columns[i])),
            recall=_ratio(int(diagonal[i]), int(support[i])),
            f1=_ratio(2 * int(diagonal[i]), int(support[i] + columns[i])),
        )
        for i in range(width)
    )
    rows = tuple(tuple(int(cell) for cell in row) for row in matrix)
    return Metrics(
        classes=classes,
        total=total,
        correct=correct,
        accuracy=correct / total,
        interval95=wilson_interval(correct, total),
        confusion_matrix=rows,
        per_class=per_class,
        worst_confusions=confusions(rows, classes)[:WORST_CONFUSIONS],
        log_loss=log_loss,
        calibration_error=calibration_error,
    )
