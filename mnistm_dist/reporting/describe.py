"""Results as text: how numbers are written, and sentences that summarise a confusion matrix."""

import math
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from mnistm_dist.reporting.metrics import Metrics

MOST_NAMED = 3  # items of a list that are named before the rest is counted


def number(value: float) -> str:
    """Format a number with three significant figures below 100, and as a whole number above."""
    return f"{value:.3g}" if abs(value) < 99.95 else f"{value:,.0f}"


def percent(share: float, digits: int = 2) -> str:
    """Format a share from 0 to 1 as ``97.12 %``. Only 0 is written as 0, and only 1 as 100."""
    value, step = 100 * share, 10.0**-digits
    if 0 < value < step:
        return f"under {step:.{digits}f} %"
    if 100 - step < value < 100:
        return f"over {100 - step:.{digits}f} %"
    return f"{value:.{digits}f} %"


def duration(seconds: float) -> str:
    """Format seconds as ``0.4 s``, ``4:05`` (minutes), ``2:04:05`` (hours) or ``3 d 2:04:05``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    # Python writes 0:04:05 and 3 days, 2:04:05.
    return re.sub(" days?,", " d", str(timedelta(seconds=round(seconds))).lstrip("0:"))


def plural(count: int, noun: str) -> str:
    """Return ``1 image``, ``2 images``, ``1,204 images``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """Join names with commas; of more than `MOST_NAMED` + 2 names, count the rest."""
    if len(names) > MOST_NAMED + 2:
        names = [*names[:MOST_NAMED], f"and {len(names) - MOST_NAMED} more"]
    return ", ".join(names)


def describe_accuracy(correct: int, total: int, interval95: Sequence[float]) -> str:
    """Return the accuracy and its interval in one sentence."""
    low, high = interval95
    return (
        f"{correct:,} of {total:,} correct: {percent(correct / total)} "
        f"(95 % interval {100 * low:.2f} to {100 * high:.2f} %)"
    )


def describe_checkpoint(checkpoint: Mapping[str, Any]) -> str:
    """Return ``step 640 (best on val), averaged weights, 64 px`` for the ``checkpoint`` field of ``summary.json``."""
    chosen, size = checkpoint.get("chosen"), checkpoint.get("image_size")
    text = f"step {checkpoint['step']:,}{f' ({chosen})' if chosen else ''}"
    return f"{text}{', averaged weights' if checkpoint.get('averaged') else ''}{f', {size} px' if size else ''}"


def describe(metrics: Metrics) -> str:
    """Summarise the errors in a confusion matrix, one paragraph per line.

    The sentences hold for any matrix: classes without images, ties, no errors, a constant prediction.
    """
    cells = [f"{cell.true} as {cell.predicted} ({cell.count:,})" for cell in metrics.confusions]
    paragraphs = (
        _support(metrics),
        f"Most common confusions: {listed(cells)}." if cells else "No errors.",
        _classes(metrics) if cells else "",
        _never_predicted(metrics),
    )
    return "\n".join(filter(None, paragraphs))


def describe_failure(metrics: Metrics, losses: Sequence[float] = ()) -> str:
    """Return why a model has learned nothing: it diverged, or gives one answer; an empty text for any other model.

    ``losses``: of the training, in order, nats.
    """
    guess, advice = math.log(len(metrics.classes)), "use a smaller --learning-rate, or train for more steps"
    if losses and losses[-1] > max(guess, losses[0]):
        return f"the training loss ends at {losses[-1]:.3f}, above the {guess:.3f} of a random guess; {advice}"
    if sum(row.predicted > 0 for row in metrics.per_class) == 1 < sum(row.support > 0 for row in metrics.per_class):
        return f"the model gives one answer: {_never_predicted(metrics).removesuffix('.').lower()}; {advice}"
    return ""


def _support(metrics: Metrics) -> str:
    present = [row for row in metrics.per_class if row.support]
    absent = [row.name for row in metrics.per_class if not row.support]
    few, many = (limit(present, key=lambda row: row.support) for limit in (min, max))
    text = f"{few.support:,} (class {few.name}) to {many.support:,} (class {many.name})"
    text = f"Images per class: {text if few.support < many.support else f'{few.support:,}'}."
    return f"{text} No images of class {listed(absent)}." if absent else text


def _classes(metrics: Metrics) -> str:
    """Name the classes with the most errors and, if they are others, those with the highest error rate."""
    errors = {row: row.support - row.correct for row in metrics.per_class if row.support}
    most = max(errors.values())
    worst = [row for row, count in errors.items() if count == most]
    text = f"Classes with the most errors, {most:,} each: {listed([row.name for row in worst])}."
    if len(worst) == 1:
        count = f"{most:,} of {worst[0].support:,}"
        named = [f"{cell.predicted} ({cell.count:,})" for cell in metrics.confusions if cell.true == worst[0].name]
        text = f"Class {worst[0].name} has the most errors: {count}, predicted as {listed(named)}."
    highest = max(count / row.support for row, count in errors.items())
    weakest = [row for row, count in errors.items() if count / row.support == highest]
    if not set(weakest) & set(worst):
        text += f" Highest error rate: {percent(highest)}, class {listed([row.name for row in weakest])}."
    return text


def _never_predicted(metrics: Metrics) -> str:
    predicted = [row.name for row in metrics.per_class if row.predicted]
    never = [row.name for row in metrics.per_class if row.support and not row.predicted]
    if len(predicted) == 1 and never:
        return f"Every image is predicted as {predicted[0]}."
    return f"Never predicted: {listed(never)}." if never else ""
