"""``predictions_SPLIT.csv`` of a run: the mistakes in it, and the paired difference of two of them."""

import csv
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mnistm_dist.errors import UserError
from mnistm_dist.files import explain_os_errors
from mnistm_dist.reporting.metrics import NORMAL_QUANTILE_975, Metrics, measure


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions of all images of a split, in manifest order."""

    keys: tuple[str, ...]
    labels: np.ndarray
    """int64 (N,)."""
    predicted: np.ndarray
    """int64 (N,)."""
    probabilities: np.ndarray
    """float64 (N, C)."""
    classes: tuple[str, ...]

    @cached_property
    def metrics(self) -> Metrics:
        """The metrics of these predictions."""
        return measure(self.labels, self.probabilities, self.classes, self.predicted)


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """An image that was predicted as another class."""

    id: int
    """Position in manifest order."""
    key: str
    true: str
    predicted: str
    probability: float
    """Probability of the predicted class."""
    true_probability: float
    """Probability of the true class."""


def read_predictions(path: Path, classes: tuple[str, ...] | None = None) -> Predictions:
    """Read ``key,label,predicted,p0,...``.

    Args:
        path: the file.
        classes: names of the classes; by default those in the header, without their ``p``.

    Raises:
        UserError: the file cannot be read, is cut off, has another header, or holds values out of range.
    """
    with explain_os_errors(path, verb="read", advice="evaluate the run to write it"):
        text = path.read_text(encoding="utf-8", errors="replace")
    header, *rows = list(csv.reader(text.splitlines())) or [[]]
    names = tuple(name.removeprefix("p") for name in header[3:])
    if header[:3] != ["key", "label", "predicted"] or not names:
        raise UserError(f"{path}: found the columns {','.join(header) or 'none'}; expected key,label,predicted,p0,...")
    try:
        values = np.array([row[1:] for row in rows], dtype=np.float64).reshape(len(rows), 2 + len(names))
    except ValueError:
        values = np.full((1, 2 + len(names)), -1.0)
    indices, probabilities = values[:, :2], values[:, 2:]
    in_range = np.isin(indices, np.arange(len(names))).all() and ((probabilities >= 0) & (probabilities <= 1)).all()
    if not (rows and text.endswith("\n") and in_range):
        raise UserError(f"{path}: cut off, or a value is missing or out of range; evaluate the run again")
    return Predictions(
        keys=tuple(row[0] for row in rows),
        labels=indices[:, 0].astype(np.int64),
        predicted=indices[:, 1].astype(np.int64),
        probabilities=probabilities,
        classes=classes if classes is not None and len(classes) == len(names) else names,
    )


def mistakes(predictions: Predictions, limit: int | None = None) -> list[Mistake]:
    """Return the mistakes, the most confident first, equal ones in manifest order; at most ``limit`` of them."""
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    rows = [
        Mistake(
            id=int(i),
            key=predictions.keys[i],
            true=predictions.classes[predictions.labels[i]],
            predicted=predictions.classes[predictions.predicted[i]],
            probability=float(predictions.probabilities[i, predictions.predicted[i]]),
            true_probability=float(predictions.probabilities[i, predictions.labels[i]]),
        )
        for i in wrong
    ]
    return sorted(rows, key=lambda row: -row.probability)[:limit]


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Accuracy of a run minus that of a reference, on the same images."""

    difference: float
    """-1 to 1."""
    interval95: tuple[float, float]
    """95 % interval of the difference, -1 to 1."""
    only_correct: int
    """Images that only the run predicts correctly."""
    only_reference_correct: int
    """Images that only the reference predicts correctly."""
    p_value: float
    """Of McNemar's exact test; the null hypothesis is equal accuracy."""


def paired_difference(run: Predictions, reference: Predictions) -> PairedDifference | None:
    """Return the difference in accuracy of two models on the same images, or None if the images differ.

    The interval is Agresti and Min's, "Simple improved confidence intervals for comparing matched proportions",
    Statistics in Medicine 24 (2005) 729-740: Wald's for matched pairs after half an observation is added to each of the
    four cells, which keeps its level if few images are predicted differently.
    """
    if run.keys != reference.keys or not np.array_equal(run.labels, reference.labels):
        return None
    correct, reference_correct = run.predicted == run.labels, reference.predicted == reference.labels
    gained, lost = int((correct & ~reference_correct).sum()), int((~correct & reference_correct).sum())
    net, pairs, total = gained - lost, gained + lost, len(run.labels) + 2
    half = NORMAL_QUANTILE_975 * math.sqrt(pairs + 1 - net**2 / total) / total
    return PairedDifference(
        difference=net / len(run.labels),
        interval95=(max(net / total - half, -1.0), min(net / total + half, 1.0)),
        only_correct=gained,
        only_reference_correct=lost,
        # Twice the smaller tail of the binomial distribution with p = 0.5.
        p_value=min(1.0, 2 * sum(math.comb(pairs, k) for k in range(min(gained, lost) + 1)) / 2**pairs),
    )
