"""Readers of formats of their own, measured where a person has installed them: LitData and MosaicML Streaming.

They are no dependency, nor an extra. Each function writes the images in its format below ``folder`` and gives an
endless iterator over batches of images, model-ready, read and shuffled as its documentation shows it.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.other_readers import endless

Sample = tuple[str, int, bytes]
"""Key, label, PNG."""


def installed() -> dict[str, Callable[..., Iterator[Tensor]]]:
    """The readers that can be imported here, by name."""
    known = {"litdata": ("LitData", litdata), "streaming": ("MosaicML Streaming", mosaicml)}
    return {name: reader for package, (name, reader) in known.items() if find_spec(package) is not None}


def litdata(
    samples: Iterable[Sample], folder: Path, transform: Callable[[Any], Tensor], *, batch_size: int, workers: int
) -> Iterator[Tensor]:
    """LitData's StreamingDataset and StreamingDataLoader over PNGs in its chunks."""
    package: Any = importlib.import_module("litdata")
    writer_module: Any = importlib.import_module("litdata.streaming.writer")
    writer = writer_module.BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, (_, label, png) in enumerate(samples):
        writer.add_item(number, {"image": png, "label": label})
    writer.done()
    writer.merge()

    class Images(package.StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[Tensor, int]:
            sample = super().__getitem__(index)
            return transform(Image.open(io.BytesIO(sample["image"]))), sample["label"]

    dataset = Images(str(folder), shuffle=True)
    return endless(package.StreamingDataLoader(dataset, batch_size=batch_size, num_workers=workers))


def mosaicml(
    samples: Iterable[Sample], folder: Path, transform: Callable[[Any], Tensor], *, batch_size: int, workers: int
) -> Iterator[Tensor]:
    """MosaicML's StreamingDataset behind a DataLoader over PNGs in its MDS shards."""
    package: Any = importlib.import_module("streaming")
    with package.MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as writer:
        for _, label, png in samples:
            writer.write({"image": png, "label": label})

    class Images(package.StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[Tensor, int]:
            sample = super().__getitem__(index)
            return transform(Image.open(io.BytesIO(sample["image"]))), sample["label"]

    dataset = Images(local=str(folder), shuffle=True, batch_size=batch_size)
    return endless(DataLoader(dataset, batch_size=batch_size, num_workers=workers))
