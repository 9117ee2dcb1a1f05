"""What each step trains: its positions, epoch, image size and learning rate, all closed forms of the step."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import assert_never

from mnistm_dist.config import Config, OptimConfig, StepsConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps of a run. Steps and epochs count from 0; nothing here needs to be saved or restored."""

    steps: StepsConfig
    optim: OptimConfig
    train_size: int
    """Images in the train split."""
    max_steps: int | None
    """The run ends after this many steps; the schedule stays that of the full run."""

    @classmethod
    def of(cls, config: Config, train_size: int) -> Schedule:
        """Return the schedule of a configuration for a train split of ``train_size`` images."""
        return cls(steps=config.steps, optim=config.optim, train_size=train_size, max_steps=config.run.max_steps)

    @property
    def total_steps(self) -> int:
        """Steps of the full run: ``ceil(epochs * train_size / batch_size)``."""
        return -(-self.steps.epochs * self.train_size // self.steps.batch_size)

    @property
    def last_step(self) -> int:
        """Steps after which this run ends."""
        return min(self.total_steps, self.max_steps or self.total_steps)

    @property
    def full_image_size(self) -> int:
        """The largest training size, pixels."""
        return max(self.steps.image_size)

    @property
    def peak_learning_rate(self) -> float:
        """The largest learning rate."""
        ratio = self.steps.batch_size / self.optim.base_batch_size
        return (
            self.optim.learning_rate * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.optim.lr_scaling]
        )

    def epoch(self, step: int) -> int:
        """Return the epoch of the first position of a step."""
        return step * self.steps.batch_size // self.train_size

    def ends_epoch(self, step: int) -> bool:
        """Return whether an epoch e ends with this step: the first with ``(step + 1) * B >= (e + 1) * N``."""
        return self.epochs_done(step + 1) > self.epochs_done(step)

    def epochs_done(self, steps_done: int) -> int:
        """Return the number of complete epochs in the first ``steps_done`` steps."""
        return steps_done * self.steps.batch_size // self.train_size

    def image_size(self, step: int) -> int:
        """Return the image size of a step, pixels: the run's sizes take equal parts of its epochs.

        Epochs after the last one have the last size.
        """
        sizes = self.steps.image_size
        return sizes[min(self.epoch(step), self.steps.epochs - 1) * len(sizes) // self.steps.epochs]

    def work_left(self, steps_done: int, evaluate_every: int) -> tuple[Counter[int], Counter[int]]:
        """Return the steps and the evaluations on val that remain after ``steps_done``, by image size in pixels.

        ``evaluate_every``: epochs between evaluations. A batch is at most the train split.
        """
        steps: Counter[int] = Counter()
        evaluated = {self.last_step}
        for epoch in range(self.epoch(steps_done), self.epoch(self.last_step - 1) + 1):
            first, end = (-(-number * self.train_size // self.steps.batch_size) for number in (epoch, epoch + 1))
            remaining = min(end, self.last_step) - max(first, steps_done)
            if remaining > 0:
                steps[self.image_size(first)] += remaining
            if (epoch + 1) % evaluate_every == 0 and steps_done < end < self.last_step:
                evaluated.add(end)
        return steps, Counter(self.image_size(step - 1) for step in evaluated if step > steps_done)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step.

        constant: the peak. exponential: peak * decay ** epoch. one-cycle: linear from 0 to the peak over the fraction
        ``warmup`` of the steps, then (1 + cos) / 2 down to 0 (Smith and Topin 2017, arXiv 1708.07120, with the cosine
        of Loshchilov and Hutter, arXiv 1608.03983). The peak scales with batch_size / base_batch_size: linearly (Goyal
        et al. 2017, arXiv 1706.02677) or by the square root (Krizhevsky 2014, arXiv 1404.5997).
        """
        optim, peak = self.optim, self.peak_learning_rate
        if optim.lr_schedule == "constant":
            return peak
        if optim.lr_schedule == "exponential":
            return peak * optim.decay ** self.epoch(step)
        if optim.lr_schedule != "one-cycle":
            assert_never(optim.lr_schedule)
        done = (step + 1) / (self.total_steps + 1)
        if done < optim.warmup:
            return peak * done / optim.warmup
        return peak * (1 + math.cos(math.pi * (done - optim.warmup) / (1 - optim.warmup))) / 2
