"""The predictions that a run leaves: ``predictions_SPLIT.csv``, read back, and the mistakes among them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnistm_dist.errors import UserError
from mnistm_dist.reporting.metrics import Metrics, measure


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a model said of each image of a split, in manifest order."""

    keys: tuple[str, ...]
    labels: np.ndarray
    """int64 (N,)."""
    predicted: np.ndarray
    """int64 (N,)."""
    probabilities: np.ndarray
    """float64 (N, C)."""
    classes: tuple[str, ...]

    def measure(self) -> Metrics:
        """The metrics of these predictions."""
        return measure(self.labels, self.probabilities, self.classes, self.predicted)


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """An image that was read as another class."""

    id: int
    """Its place in manifest order."""
    key: str
    true: str
    predicted: str
    probability: float
    """What the model gave the class that it named."""
    true_probability: float
    """What it gave the true one."""


def read_predictions(path: Path, classes: tuple[str, ...] | None = None) -> Predictions:
    """Reads ``key,label,predicted,p0,...``.

    Args:
        path: the file.
        classes: the names of the classes, by default those in the head, ``p`` taken off.

    Raises:
        UserError: there is no such file, its head is another, a row is cut, or no row is there.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; evaluate the run to write it") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not text in UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"{path}: cannot be read ({reason}); evaluate the run again") from None
    if text and not text.endswith("\n"):
        raise UserError(f"{path}: the last line is cut; evaluate the run again")
    try:
        rows = list(csv.reader(text.splitlines()))
    except csv.Error as error:
        raise UserError(f"{path}: no CSV ({error}); evaluate the run again") from None
    head = rows[0] if rows else []
    names = head[3:]
    if head[:3] != ["key", "label", "predicted"] or not names or not all(name.startswith("p") for name in names):
        raise UserError(f"{path}: found the columns {','.join(head) or 'none'}; expected key,label,predicted,p0,p1,...")
    if len(rows) == 1:
        raise UserError(f"{path}: no row under the head; evaluate the run again")
    if classes is None or len(classes) != len(names):
        classes = tuple(name.removeprefix("p") for name in names)
    try:
        numbers = np.array([row[1:] for row in rows[1:]], dtype=np.float64)
    except ValueError:
        raise UserError(f"{path}: a row is cut or holds what is no number; evaluate the run again") from None
    if numbers.shape != (len(rows) - 1, len(head) - 1):
        raise UserError(
            f"{path}: rows have {numbers.shape[-1] + 1} fields, the head has {len(head)}; evaluate the run again"
        )
    whole = numbers[:, :2]
    if not ((whole >= 0) & (whole < len(names)) & (whole == np.trunc(whole))).all():
        raise UserError(f"{path}: a label or a prediction is none of the {len(names)} classes; evaluate the run again")
    if not ((numbers[:, 2:] >= 0) & (numbers[:, 2:] <= 1)).all():
        raise UserError(f"{path}: a probability is not from 0 to 1; evaluate the run again")
    return Predictions(
        keys=tuple(row[0] for row in rows[1:]),
        labels=numbers[:, 0].astype(np.int64),
        predicted=numbers[:, 1].astype(np.int64),
        probabilities=numbers[:, 2:],
        classes=classes,
    )


def mistakes(predictions: Predictions, limit: int | None = None) -> list[Mistake]:
    """The mistakes, the most confident first, at most `limit` of them; equal ones in manifest order."""
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
