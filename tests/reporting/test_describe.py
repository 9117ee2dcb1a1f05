"""Claims about `mnistm_dist.reporting.describe`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import Matrix, metrics_of_matrix

from mnistm_dist.reporting.describe import describe, describe_failure, duration, listed, number, percent


def matrices(width: int = 4) -> st.SearchStrategy[Matrix]:
    row = st.lists(st.integers(0, 4), min_size=width, max_size=width)
    return st.lists(row, min_size=width, max_size=width).filter(lambda matrix: any(map(sum, matrix)))


@given(matrix=matrices())
@settings(max_examples=200, deadline=None)
def test_the_text_is_true_for_any_matrix(matrix: Matrix) -> None:
    metrics = metrics_of_matrix(matrix)
    text = describe(metrics)
    array = np.array(matrix)
    errors = array.sum(axis=1) - array.diagonal()
    off = array.copy()
    np.fill_diagonal(off, 0)
    assert ("No errors." in text) == (off.max() == 0)
    if off.max():
        true, predicted = np.argwhere(off == off.max())[0]
        assert f"Most common confusions: {true} as {predicted} ({off.max()})" in text
        most = np.flatnonzero(errors == errors.max())
        assert (f"Class {most[0]} has the most errors: {errors.max()} of " in text) == (len(most) == 1)
    for i in np.flatnonzero((array.sum(axis=1) > 0) & (array.sum(axis=0) == 0)):
        assert "Every image is predicted as" in text or f"{i}" in text[text.index("Never predicted: ") :]
    assert ("No images of class" in text) == bool((array.sum(axis=1) == 0).any())


def test_the_text_names_the_confusions_of_the_source_report() -> None:
    matrix = np.diag([1500] * 10)
    matrix[9] = [0, 0, 0, 1, 15, 2, 0, 12, 3, 1467]
    matrix[7, 9] = 10
    text = describe(metrics_of_matrix(matrix.tolist()))
    assert "Most common confusions: 9 as 4 (15), 9 as 7 (12), 7 as 9 (10), and 3 more." in text
    assert "Class 9 has the most errors: 33 of 1,500, predicted as 4 (15), 7 (12), 8 (3), 5 (2), 3 (1)." in text


def test_ties_are_named_together() -> None:
    matrix = np.diag([10] * 4)
    matrix[0, 1] = matrix[2, 3] = 2
    text = describe(metrics_of_matrix(matrix.tolist()))
    assert "Classes with the most errors, 2 each: 0, 2." in text


def test_a_rare_class_with_the_highest_error_rate_is_named() -> None:
    text = describe(metrics_of_matrix([[90, 10, 0], [0, 100, 0], [1, 1, 0]]))
    assert "Class 0 has the most errors: 10 of 100, predicted as 1 (10)." in text
    assert "Highest error rate: 100.00 %, class 2." in text
    assert "Never predicted: 2." in text


def test_a_constant_prediction_is_named() -> None:
    matrix = [[0, 0, 5], [0, 0, 5], [0, 0, 5]]
    assert "Every image is predicted as 2." in describe(metrics_of_matrix(matrix))


def test_a_model_that_diverged_or_gives_one_answer_is_named_and_no_other() -> None:
    one_answer, good = [[0, 5], [0, 5]], [[4, 1], [0, 5]]
    assert "the model gives one answer: every image is predicted as 1" in describe_failure(
        metrics_of_matrix(one_answer)
    )
    diverged = describe_failure(metrics_of_matrix(good), [0.699, 0.5, 0.7])
    assert diverged.startswith("the training loss ends at 0.700, above the 0.693 of a random guess; use a smaller")
    assert describe_failure(metrics_of_matrix(good), [0.5, 0.6]) == ""
    assert describe_failure(metrics_of_matrix(good), [0.7]) == "", "the first steps of a run"
    assert describe_failure(metrics_of_matrix([[0, 0], [0, 5]])) == "", "a split of one class"


def test_one_image_of_one_class_makes_sentences_too() -> None:
    assert describe(metrics_of_matrix([[0, 1], [0, 0]])).splitlines() == [
        "Images per class: 1. No images of class 1.",
        "Most common confusions: 0 as 1 (1).",
        "Class 0 has the most errors: 1 of 1, predicted as 1 (1).",
        "Every image is predicted as 1.",
    ]


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100.00 %"), (0.99999, "over 99.99 %"), (0.0, "0.00 %"), (1e-6, "under 0.01 %"), (0.97124, "97.12 %")],
)
def test_only_0_is_written_as_0_and_only_1_as_100_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_the_end_of_a_long_list_is_counted() -> None:
    assert listed(list("ab")) == "a, b"
    assert listed(list("abcdefg")) == "a, b, c, and 4 more"


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (duration, 0.04, "0.0 s"),
        (duration, 9.94, "9.9 s"),
        (duration, 59.97, "1:00"),
        (duration, 245.0, "4:05"),
        (duration, 7445.0, "2:04:05"),
        (duration, 266_645.0, "3 d 2:04:05"),
        (duration, 86_400.0, "1 d 0:00:00"),
        (number, 0.98765, "0.988"),
        (number, 12.345, "12.3"),
        (number, 1234.5, "1,234"),
    ],
)
def test_times_and_numbers_are_short(form: Callable[[float], str], value: float, text: str) -> None:
    assert form(value) == text
