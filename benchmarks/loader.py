"""``loader``: images per second of each way of reading, as uint8 and ready for the model.

A round draws batches for some seconds, after a few that do not count: they use up what a reader has prepared while the
others were measured.
"""

import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, io, transforms

from benchmarks.measure import (
    ENDLESS,
    RESIDENT,
    Contender,
    Measurement,
    Result,
    clock,
    default_device,
    open_set,
    open_train,
    rate,
    run,
)
from benchmarks.options import Loader
from mnistm_dist.config import DataConfig, StepsConfig
from mnistm_dist.data.loader import train_batches
from mnistm_dist.data.order import auto_streams, create_order
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.data.transforms import Preprocess

# Batches at the start of a round that do not count: more than streaming prepares ahead.
PREPARED = 4
# Samples in WebDataset's shuffle buffer, as in its documentation.
SHUFFLE_BUFFER = 1000
WEBDATASET, WEBDATASET_UINT8 = "WebDataset, as its docs show it", "WebDataset, to uint8"
Batches = Iterator[torch.Tensor]
# By name: a function that returns an endless iterator over batches of images.
Readers = dict[str, Callable[[], Batches]]


def loader(options: Loader) -> Result:
    """Measure every reader. Raises `UserError`."""
    torch.set_num_threads(options.threads)
    device, shards = default_device(), open_set(options)
    split = shards.split("train")
    options = dataclasses.replace(options, batch_size=min(options.batch_size, split.count))
    streaming = DataConfig(
        order="windowed",
        reader="streaming",
        shuffle_streams=auto_streams(batch_size=options.batch_size, world_size=1),
    )
    ready = partial(Preprocess(split.mean, split.std, device), size=options.image_size)

    def read(data: DataConfig, prepare: Callable[[torch.Tensor], torch.Tensor]) -> Batches:
        order = create_order(data, StepsConfig(batch_size=options.batch_size), shards.manifest)
        sizes = {"batch_size": options.batch_size, "micro_batch": options.batch_size, "stop_step": ENDLESS}
        return (prepare(batch.images) for (batch,) in train_batches(open_train(options, shards, data), order, **sizes))

    with tempfile.TemporaryDirectory(prefix="mnistm_dist-bench-") as folder:
        readers = OtherReaders(options, shards, folder).by_output()
        for name, data in {"resident": RESIDENT, "streaming": streaming}.items():
            readers["uint8"][f"{name}, uint8"] = partial(read, data, lambda images: images)
            readers["model-ready"][name] = partial(read, data, ready)
        contenders = [
            Contender(
                name=name,
                output=output,
                against=(WEBDATASET_UINT8 if output == "uint8" else WEBDATASET,),
                # Opened in its first round: readers that are not selected write no files.
                measure=partial(draw, cache(reader), options.seconds, device),
            )
            for output in readers
            for name, reader in readers[output].items()
        ]
        contenders.append(
            Contender(
                name="first launch, uint8",
                output="uint8",
                against=(WEBDATASET_UINT8,),
                measure=partial(first_launch, options, shards),
            )
        )
        return run(options, contenders, warm_up=1, files="in the page cache")


def draw(opened: Callable[[], Batches], seconds: float, device: torch.device) -> Measurement:
    """Draw batches to the device for ``seconds``."""
    batches, images = opened(), 0
    for _ in range(PREPARED):
        next(batches).to(device)
    start = clock()
    while time.perf_counter() - start[0] < seconds:
        images += len(next(batches).to(device, non_blocking=True))
    return rate(images, start)


def first_launch(options: Loader, shards: ShardSet) -> Measurement:
    """Open the training split with an empty cache: hash and decode every shard, and write the result to disk."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.cache_dir) as empty:
        start = clock()
        return rate(open_train(dataclasses.replace(options, cache_dir=Path(empty)), shards).size, start)


def decode_png_bytes(png: bytes) -> torch.Tensor:
    """Decode a PNG to uint8 (3, H, W) with torchvision."""
    return io.decode_png(torch.frombuffer(bytearray(png), dtype=torch.uint8), io.ImageReadMode.RGB)


class OtherReaders:
    """Other readers of the training split, each as its documentation shows it.

    For other formats, some of its images are written to new folders in ``folder``.
    """

    def __init__(self, options: Loader, shards: ShardSet, folder: str) -> None:
        self.options, self.folder, self.classes, split = options, folder, shards.manifest.classes, shards.split("train")
        self.tars = [str(shards.root / shard.name) for shard in split.shards]
        # torchvision's transforms of one PIL image, as in tutorials.
        self.transform = transforms.Compose(
            [
                transforms.Resize((options.image_size, options.image_size)),
                transforms.ToTensor(),
                transforms.Normalize(split.mean, split.std),
            ]
        )

    def by_output(self) -> dict[str, Readers]:
        """Return the readers that are installed, by what they return and by name."""
        uint8: Readers = {
            WEBDATASET_UINT8: lambda: self.webdataset(lambda data: data.decode("rgb8").to_tuple("png", "cls")),
            f"{WEBDATASET_UINT8} by torchvision": lambda: self.webdataset(
                lambda data: data.to_tuple("png", "cls").map_tuple(decode_png_bytes, int)
            ),
        }
        model_ready: Readers = {
            WEBDATASET: lambda: self.webdataset(
                lambda data: data.decode("pil").to_tuple("png", "cls").map_tuple(self.transform, int)
            ),
            "ImageFolder and DataLoader": self.image_folder,
            **({"LitData": self.litdata} if importlib.util.find_spec("litdata") else {}),
            **({"MosaicML Streaming": self.mosaicml} if importlib.util.find_spec("streaming") else {}),
        }
        return {"uint8": uint8, "model-ready": model_ready}

    def samples(self) -> Iterator[tuple[str, int, bytes]]:
        """Yield key, label and PNG of the images that are written for other formats."""
        for sample in islice(wds.WebDataset(self.tars, shardshuffle=False), self.options.images):
            yield sample["__key__"], int(sample["cls"]), sample["png"]

    def batches(self, loader: Any, dataset: Any, **options: Any) -> Batches:
        """Yield the images of a loader's (images, labels), epoch after epoch."""
        sizes = {"batch_size": self.options.batch_size, "num_workers": self.options.workers}
        batches = loader(dataset, **{**sizes, **options})
        while True:
            yield from (torch.as_tensor(images) for images, _ in batches)

    def webdataset(self, decode: Callable[[Any], Any]) -> Batches:
        """Read with WebDataset: shuffled; ``decode`` decodes, and transforms, each image by itself."""
        dataset = wds.WebDataset(self.tars, shardshuffle=len(self.tars)).shuffle(SHUFFLE_BUFFER)
        return self.batches(wds.WebLoader, decode(dataset).batched(self.options.batch_size), batch_size=None)

    def image_folder(self) -> Batches:
        """Read CLASS/KEY.png with torchvision's ImageFolder and a shuffling DataLoader."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        for name in self.classes:
            (folder / name).mkdir()
        for key, label, png in self.samples():
            (folder / self.classes[label] / f"{key}.png").write_bytes(png)
        dataset = datasets.ImageFolder(str(folder), transform=self.transform)
        return self.batches(DataLoader, dataset, shuffle=True)

    def litdata(self) -> Batches:
        """Read PNGs in LitData's chunks with its StreamingDataset and StreamingDataLoader."""
        package, folder = importlib.import_module("litdata"), tempfile.mkdtemp(dir=self.folder)
        writer = importlib.import_module("litdata.streaming.writer").BinaryWriter(folder, chunk_bytes="64MB")
        for number, (_, label, png) in enumerate(self.samples()):
            writer.add_item(number, {"image": png, "label": label})
        writer.done()
        writer.merge()
        dataset = self.transformed(package.StreamingDataset)(folder, shuffle=True)
        return self.batches(package.StreamingDataLoader, dataset)

    def mosaicml(self) -> Batches:
        """Read PNGs in MosaicML's MDS shards with its StreamingDataset and a DataLoader."""
        package, folder = importlib.import_module("streaming"), tempfile.mkdtemp(dir=self.folder)
        with package.MDSWriter(out=folder, columns={"image": "bytes", "label": "int"}) as writer:
            for _, label, png in self.samples():
                writer.write({"image": png, "label": label})
        dataset = self.transformed(package.StreamingDataset)
        return self.batches(DataLoader, dataset(local=folder, shuffle=True, batch_size=self.options.batch_size))

    def transformed(self, base: Any) -> Any:
        """Return a dataset class that decodes and transforms the PNGs of ``base``."""
        transform = self.transform

        class Images(base):
            def __getitem__(self, index: Any) -> tuple[torch.Tensor, int]:
                sample = super().__getitem__(index)
                return transform(Image.open(BytesIO(sample["image"]))), sample["label"]

        return Images
