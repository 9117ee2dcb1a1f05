"""What each step trains: its positions, epoch, image size and learning rate, all closed forms of the step."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import assert_never

from mnistm_dist.config import Config


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps of a run. Steps and epochs count from 0; nothing here needs to be saved or restored."""

    config: Config
    """Its batch size, epochs, image sizes and learning rate. With max_steps the run ends earlier."""
    train_size: int
    """Images in the train split."""

    @property
    def total_steps(self) -> int:
        """Steps of the full run: ``ceil(epochs * train_size / batch_size)``."""
        return -(-self.config.steps.epochs * self.train_size // self.config.steps.batch_size)

    @property
    def last_step(self) -> int:
        """Steps after which this run ends."""
        return min(self.total_steps, self.config.run.max_steps or self.total_steps)

    @property
    def peak_learning_rate(self) -> float:
        """The largest learning rate."""
        optim = self.config.optim
        ratio = self.config.steps.batch_size / optim.base_batch_size
        return optim.learning_rate * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[optim.lr_scaling]

    def epoch(self, step: int) -> int:
        """Return the epoch of the first position of a step: as many epochs are complete before the step."""
        return step * self.config.steps.batch_size // self.train_size

    def ends_epoch(self, step: int) -> bool:
        """Return whether an epoch e ends with this step: the first with ``(step + 1) * B >= (e + 1) * N``."""
        return self.epoch(step + 1) > self.epoch(step)

    def image_size(self, step: int) -> int:
        """Return the image size of a step, pixels: the run's sizes take equal parts of its epochs.

        Epochs after the last one have the last size.
        """
        sizes, epochs = self.config.steps.image_size, self.config.steps.epochs
        return sizes[min(self.epoch(step), epochs - 1) * len(sizes) // epochs]

    def work_left(self, steps_done: int, evaluate_every: int) -> tuple[Counter[int], Counter[int]]:
        """Return the steps and the evaluations on val that remain after ``steps_done``, by image size in pixels.

        ``evaluate_every``: epochs between evaluations. A batch is at most the train split.
        """
        steps: Counter[int] = Counter()
        evaluated = {self.last_step}
        for epoch in range(self.epoch(steps_done), self.epoch(self.last_step - 1) + 1):
            first, end = (-(-e * self.train_size // self.config.steps.batch_size) for e in (epoch, epoch + 1))
            steps[self.image_size(first)] += max(0, min(end, self.last_step) - max(first, steps_done))
            if (epoch + 1) % evaluate_every == 0 and steps_done < end < self.last_step:
                evaluated.add(end)
        return +steps, Counter(self.image_size(step - 1) for step in evaluated if step > steps_done)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step.

        constant: the peak. exponential: peak * decay ** epoch. one-cycle: linear from 0 to the peak over the fraction
        ``warmup`` of the steps, then (1 + cos) / 2 down to 0 (Smith and Topin 2017, arXiv 1708.07120, with the cosine
        of Loshchilov and Hutter, arXiv 1608.03983). The peak scales with batch_size / base_batch_size: linearly (Goyal
        et al. 2017, arXiv 1706.02677) or by the square root (Krizhevsky 2014, arXiv 1404.5997).
        """
        optim, peak = self.config.optim, self.peak_learning_rate
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
