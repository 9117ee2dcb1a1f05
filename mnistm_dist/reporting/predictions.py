"""``predictions_SPLIT.csv`` of a run, and the mistakes in it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mnistm_dist.errors import UserError
from mnistm_dist.files import explain_os_errors
from mnistm_dist.reporting.metrics import Metrics, measure


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
    if not rows or not text.endswith("\n"):
        raise UserError(f"{path}: the last line is cut off; evaluate the run again")
    try:
        values = np.array([row[1:] for row in rows], dtype=np.float64).reshape(len(rows), 2 + len(names))
    except ValueError:
        raise UserError(f"{path}: a row is incomplete or not numeric; evaluate the run again") from None
    indices, probabilities = values[:, :2], values[:, 2:]
    if not np.isin(indices, np.arange(len(names))).all() or not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise UserError(f"{path}: a class or a probability is out of range; evaluate the run again")
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
    confidence = predictions.probabilities[wrong, predictions.predicted[wrong]]
    order = np.lexsort((wrong, -confidence))[:limit]
    return [
        Mistake(
            id=int(i),
            key=predictions.keys[i],
            true=predictions.classes[predictions.labels[i]],
            predicted=predictions.classes[predictions.predicted[i]],
            probability=float(predictions.probabilities[i, predictions.predicted[i]]),
            true_probability=float(predictions.probabilities[i, predictions.labels[i]]),
        )
        for i in wrong[order]
    ]
