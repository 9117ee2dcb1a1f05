"""Claims about `mnistm_dist.reporting.metrics`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from run_folders import CLASSES, metrics_of_matrix, synthetic_labels, synthetic_probabilities

from mnistm_dist.reporting.metrics import Metrics, calibration_bins, measure, wilson_interval


@pytest.mark.parametrize("absent", [(), (0, 9)])
def test_every_number_is_that_of_scikit_learn(absent: tuple[int, ...]) -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    labels = synthetic_labels(500, 1, absent)
    probabilities = synthetic_probabilities(labels, 0.8, 2)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    predicted = probabilities.argmax(axis=1)
    metrics = measure(labels, probabilities, CLASSES)
    digits = list(range(10))
    assert metrics.accuracy == sklearn_metrics.accuracy_score(labels, predicted)
    expected = sklearn_metrics.confusion_matrix(labels, predicted, labels=digits)
    np.testing.assert_array_equal(np.array(metrics.confusion_matrix), expected)
    rows = sklearn_metrics.precision_recall_fscore_support(labels, predicted, labels=digits, zero_division=np.nan)
    scores = [(row.precision, row.recall, row.f1, row.support) for row in metrics.per_class]
    np.testing.assert_allclose(np.array(scores, dtype=float), np.array(rows, dtype=float).T, rtol=1e-12)
    clipped = np.maximum(probabilities, 5e-7)
    # scikit-learn wants rows that sum to 1, which moves the clipped ones by less than 1e-5.
    clipped /= clipped.sum(axis=1, keepdims=True)
    assert metrics.log_loss == pytest.approx(sklearn_metrics.log_loss(labels, clipped, labels=digits), abs=1e-5)


def test_a_probability_of_zero_counts_as_half_of_the_last_decimal_in_the_log_loss() -> None:
    metrics = measure(np.array([0]), np.array([[0.0, 1.0]]), ("a", "b"))
    assert metrics.log_loss == pytest.approx(-np.log(5e-7))


def test_the_interval_is_wilsons() -> None:
    # Agresti and Coull, The American Statistician 52 (1998), section 1: 0 of 20 has the upper bound z^2 / (n + z^2).
    assert wilson_interval(0, 20) == (0.0, pytest.approx(1.959964**2 / (20 + 1.959964**2)))
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@given(total=st.integers(1, 10**6), data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_interval_contains_the_accuracy_and_stays_within_0_and_1(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    low, high = wilson_interval(correct, total)
    assert 0.0 <= low <= correct / total <= high <= 1.0


def test_the_calibration_error_is_that_of_a_count_by_hand() -> None:
    # Four images at 0.9, three of them correct; two at 0.6, none correct: (4 |0.75 - 0.9| + 2 |0 - 0.6|) / 6.
    labels = np.array([0, 0, 0, 1, 1, 1])
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 2)
    metrics = measure(labels, probabilities, ("a", "b"))
    assert metrics.calibration_error == pytest.approx((4 * 0.15 + 2 * 0.6) / 6)


def test_every_image_is_in_one_bin_and_the_edges_in_the_lower_one() -> None:
    labels = np.zeros(3, dtype=np.int64)
    bins = calibration_bins(labels, np.array([[1.0, 0.0], [0.5, 0.5], [0.51, 0.49]]), labels, bins=2)
    assert [row.count for row in bins] == [1, 2]


def test_json_and_back_gives_the_same_metrics() -> None:
    labels = synthetic_labels(200, 3, (5,))
    metrics = measure(labels, synthetic_probabilities(labels, 0.9, 4), CLASSES)
    assert TypeAdapter(Metrics).validate_json(json.dumps(metrics.to_json())) == metrics


def test_the_json_has_the_documented_fields() -> None:
    fields = metrics_of_matrix([[5, 2], [0, 0]]).to_json()
    assert {"accuracy", "correct", "total", "confusion_matrix", "worst_cell", "per_class"} <= set(fields)
    assert fields["worst_cell"] == {
        "true": "0",
        "predicted": "1",
        "count": 2,
        "share_of_true": 2 / 7,
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
