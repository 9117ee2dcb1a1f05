"""From a configuration to a packed set and its training order: all that comes before the first image, without torch.

1. `open_shards`: a folder, or a server's set fetched into the cache.
2. `choose_reading`: which order, read how.
3. `create_order`: the order itself.
"""

from __future__ import annotations

from pathlib import Path

from mnistm_dist.config import DataConfig, StepsConfig
from mnistm_dist.data.fetch import fetch, is_address
from mnistm_dist.data.manifest import Manifest, Split
from mnistm_dist.data.order import FullOrder, Order, WindowedOrder
from mnistm_dist.data.progress import Progress
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError

RESIDENT_BYTES = 8 << 30
"""A training split of more decoded bytes than this is streamed in windowed order unless the configuration says
otherwise."""
DEFAULT_STREAMS = 16


def open_shards(shards: str, *, cache_dir: Path, progress: Progress | None = None) -> ShardSet:
    """Opens a packed set: a folder, or an ``https://``, ``http://`` or ``s3://`` address, fetched once per node.

    ``progress(done, total)`` counts bytes that are fetched. Raises `UserError`.
    """
    if is_address(shards):
        return ShardSet.open(fetch(shards, cache_dir, progress))
    return ShardSet.open(shards)


def choose_reading(config: DataConfig, manifest: Manifest, *, batch_size: int, world_size: int) -> tuple[str, str, int]:
    """Settles ``order``, ``data`` and ``streams``: by the manifest's size, never by the memory at hand.

    Raises `UserError` where they, the batch and the number of processes do not fit one another.
    """
    height, width = manifest.image_size
    small = _train_split(manifest).count * height * width * 3 <= RESIDENT_BYTES
    order, data = config.order, config.reader
    if order == "auto":
        order = "full" if small and data != "streaming" else "windowed"
    if data == "auto":
        data = "resident" if small or order == "full" else "streaming"
    if (order, data) == ("full", "streaming"):
        raise UserError("data streaming reads the windowed order only: use --order windowed, or --reader resident")
    streams = config.shuffle_streams
    if streams == "auto":
        streams = auto_streams(batch_size=batch_size, world_size=world_size)
    elif order == "windowed" and (streams % world_size or batch_size % streams):
        raise UserError(
            f"streams {streams} does not fit {world_size} processes and a batch of {batch_size}: the processes divide "
            f"the streams and the streams the batch; {auto_streams(batch_size=batch_size, world_size=world_size)} fits"
        )
    return order, data, streams


def auto_streams(*, batch_size: int, world_size: int) -> int:
    """The largest number of streams up to 16, or the world size if that is more, which the world size divides
    and which divides the batch; 1 where the world size does not divide the batch."""
    fits = (s for s in range(max(DEFAULT_STREAMS, world_size), 0, -1) if s % world_size == 0 and batch_size % s == 0)
    return next(fits, 1)


def _train_split(manifest: Manifest) -> Split:
    if "train" not in manifest.splits:
        raise UserError(f"these shards hold no train split, only {', '.join(manifest.splits)}; train on other ones")
    return manifest.splits["train"]


def create_order(data: DataConfig, schedule: StepsConfig, manifest: Manifest) -> Order:
    """The training order of a configuration whose order and streams are settled. Raises `UserError`."""
    train = _train_split(manifest)
    if data.order == "full":
        return FullOrder(size=train.count, seed=schedule.seed)
    assert data.order == "windowed", "the order is not settled"
    assert data.shuffle_streams != "auto", "the streams are not settled"
    return WindowedOrder(
        shard_counts=[shard.count for shard in train.shards],
        seed=schedule.seed,
        batch_size=schedule.batch_size,
        streams=data.shuffle_streams,
        window=data.shuffle_window,
    )
