"""Runs beside one another: what differs in their configurations, by how much their accuracies differ, and the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mnistm_dist.reporting.metrics import NORMAL_QUANTILE_975
from mnistm_dist.reporting.predictions import Predictions
from mnistm_dist.reporting.runs import RunRecord

SEED = "steps.seed"
PLACES = ("data.cache_dir", "data.workers", "data.shards")
"""Fields that say where a run lives, not what it learns, as most in ``run`` do; sets are compared by identity."""


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Accuracy of one run minus that of a reference, on the same images."""

    difference: float
    """-1 to 1."""
    interval95: tuple[float, float]
    """95 % interval of the difference, -1 to 1."""
    only_right: int
    """Images that this run alone reads right."""
    only_reference_right: int
    """Images that the reference alone reads right."""
    total: int
    """Images."""
    p_value: float
    """Of McNemar's exact test that both are equally good."""

    @property
    def decided(self) -> bool:
        """Whether the interval leaves 0 out."""
        low, high = self.interval95
        return low > 0 or high < 0


@dataclass(frozen=True, kw_only=True)
class SeedGroup:
    """Runs that differ in nothing but their seed."""

    runs: tuple[RunRecord, ...]

    def accuracies(self, split: str) -> list[float]:
        """Of the runs that were scored on the split."""
        return [run.metrics[split].accuracy for run in self.runs if split in run.metrics]


def paired_difference(run: Predictions, reference: Predictions) -> PairedDifference | None:
    """The difference in accuracy of two models on the same images, or None where the images are not the same.

    The interval is Agresti and Min's, "Simple improved confidence intervals for comparing matched proportions",
    Statistics in Medicine 24 (2005) 729-740: Wald's for matched pairs after half an observation is added to each of the
    four cells, which holds its level where few images are read differently. The test is McNemar's, exact: under it,
    the images that one alone reads right fall to either like coins.
    """
    if run.keys != reference.keys or not np.array_equal(run.labels, reference.labels):
        return None
    right, reference_right = run.predicted == run.labels, reference.predicted == reference.labels
    gained, lost = int((right & ~reference_right).sum()), int((~right & reference_right).sum())
    total = len(run.labels)
    gained_more, lost_more, total_more = gained + 0.5, lost + 0.5, total + 2
    middle = (gained_more - lost_more) / total_more
    variance = (gained_more + lost_more - (gained_more - lost_more) ** 2 / total_more) / total_more**2
    half = NORMAL_QUANTILE_975 * math.sqrt(variance)
    return PairedDifference(
        difference=(gained - lost) / total,
        interval95=(max(middle - half, -1.0), min(middle + half, 1.0)),
        only_right=gained,
        only_reference_right=lost,
        total=total,
        p_value=binom_p_two_sided(min(gained, lost), gained + lost),
    )


def binom_p_two_sided(fewer: int, total: int) -> float:
    """The two-sided probability that of `total` fair coins so few, or fewer, fall on the rarer side."""
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def differing_fields(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The fields of the configurations that are not the same in all runs, and their values in the order of the runs.

    A field that a run does not have is None. Where runs live and how often they log is left out.
    """
    names = dict.fromkeys(name for run in runs for name in run.config)
    compared = [name for name in names if name == "run.max_steps" or not (name.startswith("run.") or name in PLACES)]
    found = {name: [run.config.get(name) for run in runs] for name in compared}
    # What the launches decided, or the set that the path leads to, differs as well.
    for name in ("world_size", "data.identity", "data.lineage"):
        first, _, rest = name.partition(".")
        values = [run.summary.get(first) for run in runs]
        if rest:
            values = [value.get(rest) if isinstance(value, dict) else None for value in values]
        found[name if rest else f"launch.{name}"] = values
    return {name: values for name, values in found.items() if any(value != values[0] for value in values[1:])}


def seed_groups(runs: Sequence[RunRecord]) -> list[SeedGroup]:
    """The runs, gathered by what they have in common but the seed, in the order of their first runs."""
    groups: list[list[RunRecord]] = []
    for run in runs:
        for group in groups:
            if run.config and not set(differing_fields([group[0], run])) - {SEED, "launch.world_size"}:
                group.append(run)
                break
        else:
            groups.append([run])
    return [SeedGroup(runs=tuple(group)) for group in groups]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation of the sample (divisor n - 1), None of fewer than two values."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
