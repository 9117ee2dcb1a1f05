"""Compare runs: differing fields of the configuration, paired differences in accuracy, groups of seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mnistm_dist.reporting.metrics import NORMAL_QUANTILE_975
from mnistm_dist.reporting.predictions import Predictions
from mnistm_dist.reporting.runs import RunRecord

SEED, WORLD_SIZE = "steps.seed", "launch.world_size"
PLACES = ("data.cache_dir", "data.workers", "data.shards")
"""Fields that, like most of ``run``, do not change what is learnt; packed sets are compared by their identity."""


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

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        low, high = self.interval95
        return low > 0 or high < 0


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
    net, total = gained - lost, len(run.labels) + 2
    half = NORMAL_QUANTILE_975 * math.sqrt(gained + lost + 1 - net**2 / total) / total
    return PairedDifference(
        difference=net / len(run.labels),
        interval95=(max(net / total - half, -1.0), min(net / total + half, 1.0)),
        only_correct=gained,
        only_reference_correct=lost,
        p_value=binom_p_two_sided(min(gained, lost), gained + lost),
    )


def binom_p_two_sided(fewer: int, total: int) -> float:
    """Return the two-sided exact binomial p-value (p = 0.5) of ``fewer`` successes, at most half of ``total``."""
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def differing_fields(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return the fields of the configurations that differ, with their values in the order of the runs.

    The world size and the identity of the packed set are compared too; where the runs are and how often they log are
    not. A field that a run does not have is None.
    """
    compared = [_compared_fields(run) for run in runs]
    names = dict.fromkeys(name for fields in compared for name in fields)
    values = {name: [fields.get(name) for fields in compared] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row[1:])}


def seed_groups(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Group the runs that differ only in their seed and world size, in the order of their first runs."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        fields = {**_compared_fields(run), SEED: None, WORLD_SIZE: None}
        groups.setdefault(str(sorted(fields.items())) if run.config else run.name, []).append(run)
    return list(groups.values())


def _compared_fields(run: RunRecord) -> dict[str, Any]:
    fields = {
        name: value
        for name, value in run.config.items()
        if name == "run.max_steps" or not (name.startswith("run.") or name in PLACES)
    }
    data = {f"data.{name}": getattr(run.summary.data, name, None) for name in ("identity", "lineage")}
    return {**fields, WORLD_SIZE: run.summary.world_size, **data}
