"""Claims about comparisons: `paired_difference` of predictions, `differing_fields` and `seed_groups` of runs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import CLASSES, write_run

from mnistm_dist import __version__
from mnistm_dist.reporting.predictions import Predictions, paired_difference
from mnistm_dist.reporting.runs import RunRecord, differing_fields, read_runs, seed_groups


def predictions_of(correct: list[bool]) -> Predictions:
    labels = np.arange(len(correct)) % 10
    predicted = np.where(correct, labels, (labels + 1) % 10)
    keys = tuple(f"{i:08d}" for i in range(len(correct)))
    return Predictions(
        keys=keys, labels=labels, predicted=predicted, probabilities=np.eye(10)[predicted], classes=CLASSES
    )


def test_the_paired_interval_is_that_of_agresti_and_min() -> None:
    # 100 images: 10 that only the run predicts correctly, 4 that only the reference does.
    run = predictions_of([True] * 80 + [True] * 10 + [False] * 4 + [False] * 6)
    reference = predictions_of([True] * 80 + [False] * 10 + [True] * 4 + [False] * 6)
    difference = paired_difference(run, reference)
    assert difference is not None
    assert (difference.only_correct, difference.only_reference_correct, difference.difference) == (10, 4, 0.06)
    middle, spread = 6 / 102, math.sqrt((10.5 + 4.5) - 6**2 / 102) / 102
    assert difference.interval95 == pytest.approx((middle - 1.959964 * spread, middle + 1.959964 * spread))
    # McNemar's exact test: 4 or fewer of 14 coins, two-sided.
    assert difference.p_value == pytest.approx(2 * (1 + 14 + 91 + 364 + 1001) / 2**14)


def test_the_paired_interval_contains_the_truth_as_often_as_it_claims() -> None:
    rng, covered, trials = np.random.default_rng(0), 0, 600
    for _ in range(trials):
        cell = rng.choice(4, size=400, p=[0.94, 0.03, 0.015, 0.015])
        difference = paired_difference(
            predictions_of(list((cell == 0) | (cell == 1))), predictions_of(list((cell == 0) | (cell == 2)))
        )
        assert difference is not None
        covered += difference.interval95[0] <= 0.015 <= difference.interval95[1]
    assert 0.93 <= covered / trials <= 0.985


@given(correct=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
@settings(max_examples=80, deadline=None)
def test_a_paired_difference_changes_its_sign_with_its_sides(correct: list[tuple[bool, bool]]) -> None:
    left, right = predictions_of([a for a, _ in correct]), predictions_of([b for _, b in correct])
    there, back = paired_difference(left, right), paired_difference(right, left)
    assert there is not None
    assert back is not None
    assert there.difference == -back.difference
    assert there.interval95 == pytest.approx((-back.interval95[1], -back.interval95[0]))
    assert there.p_value == back.p_value
    assert -1 <= there.interval95[0] <= there.difference <= there.interval95[1] <= 1


def test_predictions_of_other_images_are_not_compared() -> None:
    assert paired_difference(predictions_of([True] * 3), predictions_of([True] * 4)) is None


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    root = tmp_path_factory.mktemp("three")
    paths = [
        write_run(root / name, seed=seed, learning_rate=rate, val_size=20, epochs=1, steps_per_epoch=2)
        for name, seed, rate in (("a", 0, 4e-3), ("b", 1, 4e-3), ("c", 2, 1e-5))
    ]
    return read_runs(paths, __version__)


def test_the_fields_that_differ_are_named_and_no_others(three: list[RunRecord]) -> None:
    assert differing_fields(three) == {"optim.learning_rate": [4e-3, 4e-3, 1e-5], "steps.seed": [0, 1, 2]}
    assert differing_fields(three[:1]) == {}


def test_runs_that_differ_only_in_their_seed_are_one_group(three: list[RunRecord]) -> None:
    assert [[run.name for run in group] for group in seed_groups(three)] == [["a", "b"], ["c"]]


def test_runs_on_packed_sets_of_another_identity_are_no_group(three: list[RunRecord], tmp_path: Path) -> None:
    other = write_run(tmp_path / "d", seed=3, val_size=20, epochs=1, steps_per_epoch=2)
    (other / "summary.json").write_text((other / "summary.json").read_text().replace("c0ffee", "decade"))
    (record,) = read_runs([other], __version__)
    assert list(differing_fields([three[0], record])) == ["steps.seed", "data.identity"]
    assert len(seed_groups([three[0], record])) == 2
