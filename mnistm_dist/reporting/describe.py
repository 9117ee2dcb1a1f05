"""The text that reads a confusion matrix, and how numbers are written in it."""

from __future__ import annotations

from collections.abc import Sequence

from mnistm_dist.reporting.metrics import ClassScores, Confusion, Metrics, confusions

MOST_NAMED = 3
"""Confusions of the worst class, and tied names, that a sentence lists before it says how many more there are."""


def percent(share: float, digits: int = 2) -> str:
    """A share from 0 to 1 as ``97.12 %``; never rounded up to 100 or down to 0 while some are left."""
    value = 100 * share
    step = 10.0**-digits
    if 0 < value < step:
        return f"under {step:.{digits}f} %"
    if 100 - step < value < 100:
        return f"over {100 - step:.{digits}f} %"
    return f"{value:.{digits}f} %"


def plural(count: int, noun: str) -> str:
    """``1 image``, ``2 images``, ``1,204 images``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """``4``, ``4 and 9``, ``4, 7 and 9``; the rest is counted after `MOST_NAMED` + 2 names."""
    names = list(names)
    if len(names) > MOST_NAMED + 2:
        names = [*names[:MOST_NAMED], f"{len(names) - MOST_NAMED} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def describe(metrics: Metrics) -> str:
    """What the matrix shows, in plain sentences: accuracy, support, the worst cells, the class that loses most.

    True for any matrix: classes without an image, ties, no mistake, one answer for everything. One paragraph per line.
    """
    return "\n".join([_accuracy(metrics), _support(metrics), *_cells(metrics), *_losers(metrics), *_columns(metrics)])


def _accuracy(metrics: Metrics) -> str:
    low, high = metrics.interval95
    return (
        f"{metrics.correct:,} of {plural(metrics.total, 'image')} {'is' if metrics.total == 1 else 'are'} right: "
        f"{percent(metrics.accuracy)} (95 % interval {100 * low:.2f} to {100 * high:.2f} %)."
    )


def _support(metrics: Metrics) -> str:
    present = [scores for scores in metrics.per_class if scores.support]
    absent = [scores.name for scores in metrics.per_class if not scores.support]
    if len(present) == 1:
        text = f"All images are of class {present[0].name}."
    else:
        few, many = min(row.support for row in present), max(row.support for row in present)
        if few == many:
            text = f"Each of the {len(present)} classes has {plural(few, 'image')}."
        else:
            text = (
                f"The classes have between {few:,} ({_classes(present, few)}) and {many:,} "
                f"({_classes(present, many)}) images."
            )
    if absent and len(present) > 1:
        text += f" There is no image of class {listed(absent)}."
    return text


def _classes(rows: list[ClassScores], support: int) -> str:
    names = [row.name for row in rows if row.support == support]
    return f"{'class' if len(names) == 1 else 'classes'} {listed(names)}"


def _cells(metrics: Metrics) -> list[str]:
    cells = confusions(metrics.confusion_matrix, metrics.classes)
    if not cells:
        return ["No image is off the diagonal: there is no mistake."]
    worst = [cell for cell in cells if cell.count == cells[0].count]
    if len(worst) == 1:
        text = (
            f"The worst cell is {worst[0].true} read as {worst[0].predicted}: {plural(worst[0].count, 'image')}, "
            f"{percent(worst[0].share_of_true)} of class {worst[0].true}, {percent(worst[0].share_of_all)} of all."
        )
    else:
        text = (
            f"No cell off the diagonal holds more than {plural(worst[0].count, 'image')}, "
            f"{percent(worst[0].share_of_all)} of all; {len(worst)} hold that many: "
            f"{listed([f'{cell.true} read as {cell.predicted}' for cell in worst])}."
        )
    rest = cells[len(worst) :]
    named = list(rest[:MOST_NAMED])
    if len(rest) > len(named):
        # A cut through cells of equal counts would name some of them and not others.
        named = [cell for cell in named if cell.count > rest[len(named)].count]
    if named:
        text += f" Then come {listed([_cell(cell) for cell in named])}."
    if len(rest) > len(named):
        others = "The others hold" if named else "The other cells hold"
        text += f" {others} at most {rest[len(named)].count:,} each."
    return [text]


def _cell(cell: Confusion) -> str:
    return f"{cell.true} read as {cell.predicted} ({cell.count:,}, {percent(cell.share_of_true)} of its class)"


def _losers(metrics: Metrics) -> list[str]:
    """Which class loses most images, and to whom; and which loses the largest share, where that is another."""
    rows = [row for row in metrics.per_class if row.support]
    most = max(row.support - row.correct for row in rows)
    if most == 0:
        return []
    losers = [row for row in rows if row.support - row.correct == most]
    if len(losers) == 1:
        row = losers[0]
        text = f"Class {row.name} loses most: {_of_its_images(most, row.support)}, {_to_whom(metrics, row)}."
    else:
        text = f"Classes {listed([row.name for row in losers])} lose most, {plural(most, 'image')} each: " + "; ".join(
            f"{row.name} ({_to_whom(metrics, row)})" for row in losers[:MOST_NAMED]
        )
        text += "." if len(losers) <= MOST_NAMED else "; and so on."
    share = max(1 - row.correct / row.support for row in rows)
    weakest = [row for row in rows if 1 - row.correct / row.support == share]
    if not {row.name for row in weakest} & {row.name for row in losers}:
        one = len(weakest) == 1
        text += (
            f" By share, {'class' if one else 'classes'} {listed([row.name for row in weakest])} "
            f"{'loses' if one else 'lose'} most: {percent(share)} of {'its' if one else 'their'} images."
        )
    return [text]


def _of_its_images(lost: int, support: int) -> str:
    if lost == support:
        return "its only image" if support == 1 else f"all its {support:,} images"
    return f"{lost:,} of its {support:,} images ({percent(lost / support)})"


def _to_whom(metrics: Metrics, row: ClassScores) -> str:
    index = metrics.classes.index(row.name)
    cells = metrics.confusion_matrix[index]
    takers = sorted((-count, j) for j, count in enumerate(cells) if j != index and count)
    named = [f"{-count:,} to {metrics.classes[j]}" for count, j in takers[:MOST_NAMED]]
    left = -sum(count for count, _ in takers[MOST_NAMED:])
    if left:
        named.append(f"{left:,} to others")
    return listed(named)


def _columns(metrics: Metrics) -> list[str]:
    """What the columns say where they say something: one answer for everything, or answers never given."""
    given = [row.name for row in metrics.per_class if row.predicted]
    never = [row.name for row in metrics.per_class if row.support and not row.predicted]
    if len(given) == 1 and never:
        return [f"Every image is read as {given[0]}: the model gives one answer whatever it sees."]
    if never:
        return [f"Nothing is ever read as {listed(never)}."]
    return []
