"""``bench loader``: how many images per second each way of reading gives, as uint8 and ready for the model.

A round draws batches for some seconds, after a few that do not count: what a reader had prepared while the others were
measured is used up by then.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import other_formats, other_readers
from benchmarks.clock import Stopwatch
from benchmarks.rounds import ENDLESS, Contender, Measured, Output, Result, choose, interleave, result
from benchmarks.setting import Setting, device_here, open_set, open_train
from mnistm_dist.config import DataConfig, StepsConfig
from mnistm_dist.data.loader import Reader, train_batches
from mnistm_dist.data.order import FullOrder, Order, auto_streams, create_order
from mnistm_dist.data.resident import open_resident
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.data.streaming import open_streaming
from mnistm_dist.data.transforms import Preprocess

USED_UP = 4
"""Batches at the start of a round that do not count: more than streaming prepares ahead."""
WEBDATASET, WEBDATASET_UINT8 = "WebDataset, as its docs show it", "WebDataset, to uint8"
"""The references of the two groups."""


def bench(setting: Setting, *, seconds: float, images: int, image_size: int, workers: int) -> Result:
    """Rounds of ``seconds`` of every reader.

    ``images``: how many are written out for the readers that need another format; ``image_size``: of what is
    model-ready, pixels; ``workers``: worker processes of the other readers, 0 being this process. Raises `UserError`.
    """
    torch.set_num_threads(setting.threads)
    device = device_here()
    shards = open_set(setting)
    split = shards.split("train")
    resident = open_train(setting, shards, device)
    preprocess = Preprocess(split.mean, split.std, device)
    batch_size = min(setting.batch_size, split.count)
    tars = [shards.root / shard.name for shard in split.shards]
    transform = other_readers.usual_transform(image_size, split.mean, split.std)
    count = min(images, split.count)

    with tempfile.TemporaryDirectory(prefix="mnistm_dist-bench-") as temporary:

        def contender(name: str, output: Output, batches: Callable[[], Iterator[Tensor]]) -> Contender:
            # Made at its first round, so that one that is not chosen writes no files.
            begun = cache(batches)
            against = WEBDATASET if output == "model-ready" else WEBDATASET_UINT8
            return Contender(
                name=name, output=output, against=(against,), measure=lambda: draw(begun(), seconds, device)
            )

        def ours(name: str, read: Callable[[], Iterator[Tensor]]) -> list[Contender]:
            return [
                contender(f"{name}, uint8", "uint8", read),
                contender(name, "model-ready", lambda: (preprocess(batch, image_size) for batch in read())),
            ]

        def folder(name: str) -> Path:
            made = Path(temporary) / name.replace(" ", "-")
            made.mkdir()
            return made

        def read_image_folder() -> Iterator[Tensor]:
            place = folder("folder")
            other_readers.write_image_folder(shards, count, place)
            return other_readers.image_folder(place, transform, batch_size=batch_size, workers=workers)

        def read_format(name: str, reader: Callable[..., Iterator[Tensor]]) -> Iterator[Tensor]:
            samples = other_readers.samples(shards, count)
            return reader(samples, folder(name), transform, batch_size=batch_size, workers=workers)

        theirs = partial(other_readers.webdataset, tars, transform, batch_size=batch_size, workers=workers)
        theirs_uint8 = partial(other_readers.webdataset_uint8, tars, batch_size=batch_size, workers=workers)
        contenders = [
            *ours("resident", lambda: batches_of(resident, FullOrder(size=split.count, seed=0), batch_size)),
            *ours("streaming", lambda: stream(setting, shards, device, batch_size)),
            Contender(
                name="first launch, uint8",
                output="uint8",
                against=(WEBDATASET_UINT8,),
                measure=lambda: first_launch(setting, shards, device),
            ),
            contender(WEBDATASET_UINT8, "uint8", partial(theirs_uint8, torchvision=False)),
            contender(f"{WEBDATASET_UINT8} by torchvision", "uint8", partial(theirs_uint8, torchvision=True)),
            contender(WEBDATASET, "model-ready", theirs),
            contender("ImageFolder and DataLoader", "model-ready", read_image_folder),
            *(
                contender(name, "model-ready", partial(read_format, name, reader))
                for name, reader in other_formats.installed().items()
            ),
        ]
        chosen = choose(contenders, setting.only)
        with setting.console.progress("loader", None, "measurements") as bar:
            measured = interleave(chosen, rounds=setting.rounds, warm_up=1, tell=bar)
    return result(
        chosen,
        measured,
        batch_size=setting.batch_size,
        device=device.type,
        image_size=image_size,
        seconds_per_round=seconds,
        workers_of_the_others=workers,
        images_written_out=count,
        files="in the page cache",
        images_per_cpu_second="per second of this process's CPU time, all its threads",
    )


def draw(batches: Iterator[Tensor], seconds: float, device: torch.device) -> Measured:
    """Draws batches onto the device for ``seconds``."""
    for _ in range(USED_UP):
        next(batches).to(device)
    images, watch, cpu = 0, Stopwatch(device), time.process_time()
    while watch.elapsed() < seconds:
        images += len(next(batches).to(device, non_blocking=True))
    elapsed, cpu = watch.stop(), time.process_time() - cpu
    return Measured(images=images, seconds=elapsed, more={"images_per_cpu_second": images / cpu})


def batches_of(reader: Reader, order: Order, batch_size: int) -> Iterator[Tensor]:
    """The training batches of a reader without end, as the trainer gets them."""
    steps = train_batches(reader, order, batch_size=batch_size, micro_batch=batch_size, stop_step=ENDLESS)
    return (batch.images for (batch,) in steps)


def stream(setting: Setting, shards: ShardSet, device: torch.device, batch_size: int) -> Iterator[Tensor]:
    """The same, streamed in windowed order."""
    data = DataConfig(
        order="windowed", reader="streaming", shuffle_streams=auto_streams(batch_size=batch_size, world_size=1)
    )
    reader = open_streaming(shards, "train", cache_dir=setting.cache_dir, device=device, workers=setting.threads)
    order = create_order(data, StepsConfig(batch_size=batch_size), shards.manifest)
    return batches_of(reader, order, batch_size)


def first_launch(setting: Setting, shards: ShardSet, device: torch.device) -> Measured:
    """Opens the training split with an empty cache: every shard is hashed and decoded, the result written to disk."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=setting.cache_dir) as empty:
        watch, cpu = Stopwatch(device), time.process_time()
        reader = open_resident(shards, "train", cache_dir=Path(empty), device=device, workers=len(setting.cores))
        seconds, cpu = watch.stop(), time.process_time() - cpu
    return Measured(images=reader.size, seconds=seconds, more={"images_per_cpu_second": reader.size / cpu})
