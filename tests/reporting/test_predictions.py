"""Claims about `mnistm_dist.reporting.predictions`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from run_folders import CLASSES, synthetic_labels, synthetic_probabilities, write_predictions

from mnistm_dist.errors import UserError
from mnistm_dist.reporting.metrics import measure
from mnistm_dist.reporting.predictions import mistakes, read_predictions


def test_predictions_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    labels = synthetic_labels(50, 5)
    probabilities = synthetic_probabilities(labels, 0.8, 6)
    write_predictions(tmp_path / "p.csv", labels, probabilities)
    predictions = read_predictions(tmp_path / "p.csv")
    np.testing.assert_array_equal(predictions.labels, labels)
    np.testing.assert_array_equal(predictions.probabilities, probabilities)
    assert predictions.keys[:2] == ("00008000", "00008001")
    assert predictions.metrics == measure(labels, probabilities, CLASSES)


def test_mistakes_come_with_the_most_confident_first(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 3])
    probabilities = np.full((4, 10), 0.01)
    probabilities[[0, 1, 2, 3], [0, 7, 8, 9]] = [0.9, 0.5, 0.8, 0.8]
    write_predictions(tmp_path / "p.csv", labels, probabilities)
    predictions = read_predictions(tmp_path / "p.csv")
    assert [(m.id, m.true, m.predicted, m.probability) for m in mistakes(predictions)] == [
        (2, "2", "8", 0.8),
        (3, "3", "9", 0.8),
        (1, "1", "7", 0.5),
    ]
    assert len(mistakes(predictions, limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("", "none; expected key,label,predicted"),
        ("file,label\na,0\n", "found the columns file,label"),
        ("key,label,predicted,p0\n", "cut off"),
        ("key,label,predicted,p0\na,0,0,1", "cut off"),
        ("key,label,predicted,p0\na,0,0,1\nb,0\n", "a value is missing"),
        ("key,label,predicted,p0\na,0,0,x\n", "a value is missing"),
        ("key,label,predicted,p0\na,1,0,1\n", "out of range"),
        ("key,label,predicted,p0\na,0,0,nan\n", "out of range"),
    ],
)
def test_a_damaged_predictions_file_is_refused_by_its_name(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "predictions_val.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_predictions(path)
    assert str(path) in str(caught.value)
