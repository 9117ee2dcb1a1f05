"""The steps since the last row of the log: their losses, and the time spent in them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mnistm_dist.training.distributed import World
from mnistm_dist.training.train_state import TrainingHistory


class LogWindow:
    """The losses of the steps since the last row, on the device until `fetch`."""

    def __init__(self, world: World, shares: Sequence[range], history: TrainingHistory) -> None:
        """``shares``: the micro-batches of each rank. ``history``: before this launch."""
        self.world, self.shares = world, shares
        self.losses = list(history.pending)
        """Mean loss of each fetched step, oldest first."""
        self._on_device: list[tuple[int, Tensor]] = []
        self._steps, self._closed_at = 0, history.train_seconds

    def add(self, step: int, losses: Tensor) -> None:
        """Add the losses of this rank's micro-batches, float (k,), of ``step`` (from 0)."""
        self._on_device.append((step, losses))
        self._steps += 1

    def fetch(self) -> int | None:
        """Gather the losses from all ranks; return the first step whose loss is NaN or infinite, if there is one.

        All ranks take part. The loss of a step is the mean over its micro-batches in canonical order, in float64: the
        same at every world size.
        """
        if not self._on_device:
            return None
        table = torch.stack([losses for _, losses in self._on_device], dim=1)
        rows = self.world.gather_rows(table, [len(share) for share in self.shares])
        means = self.world.fetch(rows.T.contiguous().double()).numpy().mean(axis=1)
        steps = [step for step, _ in self._on_device]
        self.losses.extend(means.tolist())
        self._on_device.clear()
        return next((step for step, mean in zip(steps, means, strict=True) if not np.isfinite(mean)), None)

    def close(self, train_seconds: float) -> tuple[float, float]:
        """Return the mean of the fetched losses and the steps per second of this launch, and begin a new window.

        ``train_seconds``: in training steps, over all launches; evaluation and saving do not count.
        """
        mean, seconds = sum(self.losses) / len(self.losses), train_seconds - self._closed_at
        steps_per_second = self._steps / seconds
        self.losses.clear()
        self._steps, self._closed_at = 0, train_seconds
        return mean, steps_per_second
