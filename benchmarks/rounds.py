"""Contenders measured side by side: interleaved rounds, medians, ratios and spreads.

A round measures every contender once, A B C, and then again, A B C, so that what else happens on the machine falls on
all of them. A ratio is the median over the rounds of the ratios within a round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

from mnistm_dist.data.progress import Progress
from mnistm_dist.errors import UserError

Output = Literal["uint8", "model-ready"]
ENDLESS = 2**40
"""Steps that no round ever reaches."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One round of one contender."""

    images: int
    seconds: float
    more: dict[str, float] = field(default_factory=dict)
    """What else was seen, by name, the unit in the name."""

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something that is measured."""

    name: str
    measure: Callable[[], Measured]
    """One round."""
    output: Output = "model-ready"
    """What it gives: uint8 images, or floats as the model takes them."""
    against: tuple[str, ...]
    """The contenders that it is compared with, a row for each; the reference of a group names itself."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison, as ``--json`` gives it."""

    name: str
    output: Output
    images_per_second: float | None
    """The median over the rounds."""
    ratio: float | None
    """How many times ``against``; None where the other was not measured."""
    against: str
    spread: float
    """Largest less smallest images per second of the rounds, over their median."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a bench found."""

    rows: list[Row]
    conditions: dict[str, Any]
    """Under which conditions, and under ``details`` what else was seen of each contender."""

    def to_json(self, bench: str) -> dict[str, Any]:
        """The document of ``--json``."""
        return {"bench": bench, "rows": [asdict(row) for row in self.rows], "conditions": self.conditions}


def choose(contenders: Sequence[Contender], only: Sequence[str]) -> list[Contender]:
    """The contenders whose names hold one of the texts ``only``; all where there are none.

    Raises `UserError` where a text fits no name.
    """
    for text in only:
        if not any(text in contender.name for contender in contenders):
            raise UserError(f"only: no contender is named {text!r}; there are {'; '.join(c.name for c in contenders)}")
    return [c for c in contenders if not only or any(text in c.name for text in only)]


def interleave(
    contenders: Sequence[Contender], *, rounds: int, warm_up: int, tell: Progress
) -> dict[str, list[Measured]]:
    """Every contender's rounds, by name, after ``warm_up`` rounds that do not count.

    ``tell(done, total)`` counts measurements.
    """
    measured: dict[str, list[Measured]] = {contender.name: [] for contender in contenders}
    assert len(measured) == len(contenders), "two contenders have one name"
    total = (warm_up + rounds) * len(contenders)
    for number in range(warm_up + rounds):
        for place, contender in enumerate(contenders):
            found = contender.measure()
            if number >= warm_up:
                measured[contender.name].append(found)
            tell(number * len(contenders) + place + 1, total)
    return measured


def compare(contenders: Sequence[Contender], measured: dict[str, list[Measured]]) -> list[Row]:
    """A row for each contender and each one that it is compared with."""
    rows = []
    for contender in contenders:
        own = [found.images_per_second for found in measured[contender.name]]
        for against in contender.against:
            ratio = None
            if against in measured:
                theirs = [found.images_per_second for found in measured[against]]
                ratio = round(median(a / b for a, b in zip(own, theirs, strict=True)), 4)
            rows.append(
                Row(
                    name=contender.name,
                    output=contender.output,
                    images_per_second=round(median(own), 2),
                    ratio=ratio,
                    against=against,
                    spread=round(relative_range(own), 4),
                )
            )
    return rows


def relative_range(values: Sequence[float]) -> float:
    """Largest less smallest, over the median."""
    return (max(values) - min(values)) / median(values)


def details(measured: dict[str, list[Measured]]) -> dict[str, dict[str, Any]]:
    """Every contender's rounds, and the median of what else was seen."""
    return {
        name: {
            "rounds": [round(found.images_per_second, 2) for found in rounds],
            **{key: round(median(found.more[key] for found in rounds), 4) for key in rounds[0].more},
        }
        for name, rounds in measured.items()
    }


RATIO = "median over the rounds of images_per_second / that of `against` in the same round"
SPREAD = "(largest - smallest) / median of images_per_second over the rounds"


def result(contenders: Sequence[Contender], measured: dict[str, list[Measured]], **conditions: Any) -> Result:
    """Rows, and the conditions with what the numbers mean."""
    rounds = len(next(iter(measured.values())))
    told = {"rounds": rounds, **conditions, "ratio": RATIO, "spread": SPREAD, "details": details(measured)}
    return Result(rows=compare(contenders, measured), conditions=told)
