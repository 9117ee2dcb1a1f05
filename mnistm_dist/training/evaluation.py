"""Exact evaluation: every sample of a split once, the same predictions file at every world size.

Canonical batches of 250 in manifest order, the last one padded to 250; batch i belongs to rank i mod W. Each rank runs
the unwrapped model with rank 0's buffers, and the loop has no collective operation, so ranks with unequal numbers of
batches cannot hang. At the end everything is gathered on rank 0 and unpadded, and rank 0 asserts that each id is there
exactly once.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mnistm_dist.data.loader import Reader, evaluation_batches
from mnistm_dist.data.parallel import Progress
from mnistm_dist.data.transforms import Preprocess
from mnistm_dist.files import write_atomic
from mnistm_dist.training.distributed import World

# Images in a canonical batch. It is fixed, since the shape of a batch decides the last bits of its result.
BATCH_SIZE = 250
# Decimals of a written probability.
DECIMALS = 6


@dataclass(frozen=True, kw_only=True)
class SplitOutputs:
    """The outputs of a model for a split, in manifest order."""

    labels: np.ndarray
    """int64 (N,)."""
    probabilities: np.ndarray
    """float64 (N, C), rounded to six decimals, as they are written."""

    @property
    def predicted(self) -> np.ndarray:
        """int64 (N,): the first class with the largest written probability."""
        return self.probabilities.argmax(axis=1)

    @property
    def accuracy(self) -> float:
        """correct / total, 0 to 1."""
        return int((self.predicted == self.labels).sum()) / len(self.labels)


def predict_split(
    world: World,
    model: nn.Module,
    preprocess: Preprocess,
    reader: Reader,
    *,
    image_size: int,
    progress: Progress | None = None,
) -> SplitOutputs | None:
    """Predict this rank's batches of a split at ``image_size`` pixels; gather all on rank 0. All ranks take part.

    Return the outputs on rank 0, None elsewhere. ``model`` is unwrapped; its mode is restored. ``progress(done,
    total)`` counts this rank's samples, times the world size. Raise `UserError` for shards that were damaged since
    ``reader`` was opened.
    """
    # After training each rank has its own BatchNorm statistics.
    world.broadcast(model.buffers())
    own = _predict(world, model, preprocess, reader, image_size, progress)
    gathered = world.gather_objects(own, on_main=True)
    if not gathered:
        return None
    ids, labels, probabilities = (np.concatenate(parts) for parts in zip(*filter(None, gathered), strict=True))
    order = np.argsort(ids, kind="stable")
    assert np.array_equal(ids[order], np.arange(reader.size)), "evaluation did not see each sample exactly once"
    rounded = np.round(probabilities[order].astype(np.float64), DECIMALS)
    return SplitOutputs(labels=labels[order], probabilities=rounded)


@torch.inference_mode()
def _predict(
    world: World, model: nn.Module, preprocess: Preprocess, reader: Reader, image_size: int, progress: Progress | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """This rank's ids int64 (n,), labels int64 (n,) and probabilities float32 (n, C), without padding, or None if
    it has no batch."""
    was_training = model.training
    model.eval()
    ids, labels, outputs, done = [], [], [], 0
    for batch in evaluation_batches(reader, batch_size=BATCH_SIZE, world_size=world.size, rank=world.rank):
        images = preprocess(batch.images, image_size)
        with world.accelerator.autocast():
            logits = model(images)
        outputs.append(logits.float().softmax(dim=1)[: batch.count])
        ids.append(batch.ids[: batch.count])
        labels.append(batch.labels[: batch.count])
        done += batch.count
        if progress is not None:
            progress(min(done * world.size, reader.size), reader.size)
    model.train(was_training)
    if not outputs:
        return None
    return np.concatenate(ids), world.fetch(torch.cat(labels)).numpy(), world.fetch(torch.cat(outputs)).numpy()


def write_predictions(path: Path, keys: list[str], outputs: SplitOutputs, classes: tuple[str, ...]) -> None:
    """Write ``predictions_SPLIT.csv``: ``key,label,predicted,p0,...``, a row per sample in manifest order."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", "label", "predicted", *(f"p{name}" for name in classes)])
    rows = zip(keys, outputs.labels, outputs.predicted, outputs.probabilities, strict=True)
    writer.writerows(
        [key, label, predicted, *(f"{p:.{DECIMALS}f}" for p in row)] for key, label, predicted, row in rows
    )
    write_atomic(path, text.getvalue())
