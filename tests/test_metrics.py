"""Claims about `mnistm_dist.reporting.metrics`, `words` and `predictions`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import CLASSES, synthetic_labels, synthetic_probabilities, write_predictions

from mnistm_dist.errors import UserError
from mnistm_dist.reporting.describe import describe, listed, percent
from mnistm_dist.reporting.metrics import (
    Metrics,
    calibration_bins,
    measure,
    wilson_interval,
)
from mnistm_dist.reporting.predictions import mistakes, read_predictions

Matrix = list[list[int]]


def from_matrix(matrix: Matrix) -> Metrics:
    """The metrics of predictions that give this matrix, each with probability 0.9."""
    width = len(matrix)
    cells = [(i, j) for i in range(width) for j in range(width) for _ in range(matrix[i][j])]
    labels = np.array([i for i, _ in cells])
    probabilities = np.full((len(cells), width), 0.1 / max(width - 1, 1))
    probabilities[np.arange(len(cells)), [j for _, j in cells]] = 0.9
    return measure(labels, probabilities, tuple(str(i) for i in range(width)))


def matrices(width: int = 4) -> st.SearchStrategy[Matrix]:
    row = st.lists(st.integers(0, 4), min_size=width, max_size=width)
    return st.lists(row, min_size=width, max_size=width).filter(lambda matrix: any(map(sum, matrix)))


@pytest.mark.parametrize("absent", [(), (7,), (0, 9)])
def test_every_number_is_that_of_scikit_learn(absent: tuple[int, ...]) -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    labels = synthetic_labels(500, 1, absent)
    probabilities = synthetic_probabilities(labels, 0.8, 2)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    predicted = probabilities.argmax(axis=1)
    found = measure(labels, probabilities, CLASSES)
    digits = list(range(10))
    assert found.accuracy == sklearn_metrics.accuracy_score(labels, predicted)
    expected = sklearn_metrics.confusion_matrix(labels, predicted, labels=digits)
    np.testing.assert_array_equal(np.array(found.confusion_matrix), expected)
    rows = sklearn_metrics.precision_recall_fscore_support(labels, predicted, labels=digits, zero_division=np.nan)
    ours = [(s.precision, s.recall, s.f1, s.support) for s in found.per_class]
    np.testing.assert_allclose(np.array(ours, dtype=float), np.array(rows, dtype=float).T, rtol=1e-12)
    clipped = np.maximum(probabilities, 5e-7)
    # scikit-learn wants rows that sum to 1, which moves the clipped ones by less than 1e-5.
    clipped /= clipped.sum(axis=1, keepdims=True)
    assert found.log_loss == pytest.approx(sklearn_metrics.log_loss(labels, clipped, labels=digits), abs=1e-5)


def test_a_probability_of_zero_costs_what_six_decimals_can_hide_and_no_more() -> None:
    found = measure(np.array([0]), np.array([[0.0, 1.0]]), ("a", "b"))
    assert found.log_loss == pytest.approx(-np.log(5e-7))


def test_the_interval_is_wilsons() -> None:
    # Agresti and Coull, The American Statistician 52 (1998), section 1: 0 of 20 has the upper bound z^2 / (n + z^2).
    assert wilson_interval(0, 20) == (0.0, pytest.approx(1.959964**2 / (20 + 1.959964**2)))
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@given(total=st.integers(1, 10**6), data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_interval_holds_the_accuracy_and_stays_within_0_and_1(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    low, high = wilson_interval(correct, total)
    assert 0.0 <= low <= correct / total <= high <= 1.0


def test_the_calibration_error_is_that_of_a_count_by_hand() -> None:
    # Four images at 0.9, three of them right; two at 0.6, none right: (4 |0.75 - 0.9| + 2 |0 - 0.6|) / 6.
    labels = np.array([0, 0, 0, 1, 1, 1])
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 2)
    found = measure(labels, probabilities, ("a", "b"))
    assert found.calibration_error == pytest.approx((4 * 0.15 + 2 * 0.6) / 6)


def test_every_image_lies_in_one_bin_and_the_edges_in_the_lower_one() -> None:
    labels = np.zeros(3, dtype=np.int64)
    bins = calibration_bins(labels, np.array([[1.0, 0.0], [0.5, 0.5], [0.51, 0.49]]), bins=2)
    assert [row.count for row in bins] == [1, 2]


def test_json_and_back_gives_the_same_metrics() -> None:
    labels = synthetic_labels(200, 3, (5,))
    found = measure(labels, synthetic_probabilities(labels, 0.9, 4), CLASSES)
    assert Metrics.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_the_json_names_what_design_names() -> None:
    fields = from_matrix([[5, 2], [0, 0]]).to_json()
    assert {"accuracy", "correct", "total", "confusion_matrix", "worst_cell", "per_class"} <= set(fields)
    assert fields["worst_cell"] == {
        "true": "0",
        "predicted": "1",
        "count": 2,
        "share_of_true": 2 / 7,
        "share_of_all": 2 / 7,
    }
    assert fields["per_class"][1] == {
        "class": "1",
        "support": 0,
        "predicted": 2,
        "correct": 0,
        "precision": 0.0,
        "recall": None,
        "f1": 0.0,
    }


@pytest.mark.parametrize("fields", [{}, {"confusion_matrix": "x", "log_loss": 0, "calibration_error": 0}])
def test_metrics_of_another_version_are_named_as_such(fields: dict[str, object]) -> None:
    with pytest.raises(UserError, match="another version"):
        Metrics.from_json(fields)


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        (np.zeros(0, dtype=np.int64), np.zeros((0, 2)), "0 images"),
        (np.zeros(2, dtype=np.int64), np.zeros((2, 3)), "shape"),
        (np.array([2]), np.zeros((1, 2)), "labels run from 2 to 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(labels: np.ndarray, probabilities: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(labels, probabilities, ("a", "b"))


# The text


@given(matrix=matrices())
@settings(max_examples=300, deadline=None)
def test_the_text_is_true_for_any_matrix(matrix: Matrix) -> None:
    metrics, text = from_matrix(matrix), describe(from_matrix(matrix))
    array = np.array(matrix)
    lost = array.sum(axis=1) - array.diagonal()
    off = array.copy()
    np.fill_diagonal(off, 0)
    assert ("no mistake" in text) == (off.max() == 0)
    assert ("loses most" in text or "lose most" in text) == (off.max() > 0)
    if off.max():
        worst = np.argwhere(off == off.max())
        assert ("The worst cell is" in text) == (len(worst) == 1)
        if len(worst) == 1:
            assert f"The worst cell is {worst[0][0]} read as {worst[0][1]}" in text
        losers = np.flatnonzero(lost == lost.max())
        assert (f"Class {losers[0]} loses most" in text) == (len(losers) == 1)
    for i in np.flatnonzero((array.sum(axis=1) > 0) & (array.sum(axis=0) == 0)):
        assert "Every image is read as" in text or f"{i}" in text[text.index("Nothing is ever read as") :]
    assert f"{metrics.correct:,} of {metrics.total:,}" in text
    assert ("There is no image of class" in text or "All images are of class" in text) == bool(
        (array.sum(1) == 0).any()
    )


def test_the_text_reads_the_matrix_of_the_source_report_as_it_does() -> None:
    matrix = np.diag([1500] * 10)
    matrix[9] = [0, 0, 0, 1, 15, 2, 0, 12, 3, 1467]
    matrix[7, 9] = 10
    text = describe(from_matrix(matrix.tolist()))
    assert "The worst cell is 9 read as 4: 15 images, 1.00 % of class 9, 0.10 % of all." in text
    assert "Then come 9 read as 7 (12, 0.80 % of its class), 7 read as 9 (10, " in text
    assert "Class 9 loses most: 33 of its 1,500 images (2.20 %), 15 to 4, 12 to 7, 3 to 8 and 3 to others." in text


def test_a_model_that_always_says_3_is_told_so() -> None:
    matrix = [[0] * 10 for _ in range(10)]
    for i in range(10):
        matrix[i][3] = 5
    text = describe(from_matrix(matrix))
    assert "Every image is read as 3: the model gives one answer whatever it sees." in text


def test_one_image_of_one_class_makes_sentences_too() -> None:
    assert describe(from_matrix([[0, 1], [0, 0]])).splitlines() == [
        "0 of 1 image is right: 0.00 % (95 % interval 0.00 to 79.35 %).",
        "All images are of class 0.",
        "The worst cell is 0 read as 1: 1 image, 100.00 % of class 0, 100.00 % of all.",
        "Class 0 loses most: its only image, 1 to 1.",
        "Every image is read as 1: the model gives one answer whatever it sees.",
    ]


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100.00 %"), (0.99999, "over 99.99 %"), (0.0, "0.00 %"), (1e-6, "under 0.01 %"), (0.97124, "97.12 %")],
)
def test_a_share_is_never_rounded_to_all_or_nothing(share: float, text: str) -> None:
    assert percent(share) == text


def test_long_lists_are_counted_at_their_end() -> None:
    assert listed(list("ab")) == "a and b"
    assert listed(list("abcdefg")) == "a, b, c and 4 more"


# The predictions file


def test_predictions_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    labels = synthetic_labels(50, 5)
    probabilities = synthetic_probabilities(labels, 0.8, 6)
    write_predictions(tmp_path / "p.csv", labels, probabilities)
    found = read_predictions(tmp_path / "p.csv")
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.probabilities, probabilities)
    assert found.keys[:2] == ("00008000", "00008001")
    assert found.measure() == measure(labels, probabilities, CLASSES)


def test_mistakes_come_with_the_most_confident_first(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 3])
    probabilities = np.full((4, 10), 0.01)
    probabilities[[0, 1, 2, 3], [0, 7, 8, 9]] = [0.9, 0.5, 0.8, 0.8]
    write_predictions(tmp_path / "p.csv", labels, probabilities)
    found = mistakes(read_predictions(tmp_path / "p.csv"))
    assert [(m.id, m.true, m.predicted, m.probability) for m in found] == [
        (2, "2", "8", 0.8),
        (3, "3", "9", 0.8),
        (1, "1", "7", 0.5),
    ]
    assert len(mistakes(read_predictions(tmp_path / "p.csv"), limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("", "none; expected key,label,predicted"),
        ("key,label,predicted,p0\n", "no row"),
        ("key,label,predicted,p0\na,0,0,1", "the last line is cut"),
        ("key,label,predicted,p0\na,0,0,1\nb,0\n", "a row is cut"),
        ("file,label\na,0\n", "found the columns file,label"),
    ],
)
def test_a_predictions_file_that_is_none_is_refused_by_name(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "predictions_val.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_predictions(path)
    assert str(path) in str(caught.value)
