"""What one would read the images with instead, each as its documentation shows it.

Every function gives an endless iterator over batches of images. They are read in this process where ``workers`` is 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_png

from mnistm_dist.data.shards import ShardSet

SHUFFLE_BUFFER = 1000
"""Samples in WebDataset's shuffle buffer, as in its documentation."""
CHUNK = 256


def usual_transform(image_size: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Any], Tensor]:
    """torchvision's transforms of one PIL image, as tutorials show them: float32 (3, size, size)."""
    size = (image_size, image_size)
    return transforms.Compose([transforms.Resize(size), transforms.ToTensor(), transforms.Normalize(mean, std)])


def webdataset(tars: Sequence[Path], transform: Callable[[Any], Tensor], *, batch_size: int, workers: int) -> Any:
    """WebDataset as its documentation shows it: shuffled, decoded by PIL, each image transformed by itself."""
    wds = import_webdataset()
    dataset = (
        wds.WebDataset([str(tar) for tar in tars], shardshuffle=len(tars))
        .shuffle(SHUFFLE_BUFFER)
        .decode("pil")
        .to_tuple("png", "cls")
        .map_tuple(transform, lambda label: label)
        .batched(batch_size)
    )
    return endless(wds.WebLoader(dataset, batch_size=None, num_workers=workers))


def webdataset_uint8(tars: Sequence[Path], *, batch_size: int, workers: int, torchvision: bool) -> Iterator[Tensor]:
    """WebDataset that decodes to uint8 only, by PIL as it does by itself or by torchvision's decoder."""
    wds = import_webdataset()
    dataset = wds.WebDataset([str(tar) for tar in tars], shardshuffle=len(tars)).shuffle(SHUFFLE_BUFFER)
    if torchvision:
        dataset = dataset.to_tuple("png", "cls").map_tuple(decode_bytes, int)
    else:
        dataset = dataset.decode("rgb8").to_tuple("png", "cls")
    batched = dataset.batched(batch_size)
    return map(torch.as_tensor, endless(wds.WebLoader(batched, batch_size=None, num_workers=workers)))


def import_webdataset() -> Any:
    """The package, told before its import to unpickle nothing and to run no shell, whatever stands in a tar."""
    os.environ["WDS_SECURE"] = "1"
    import webdataset

    return webdataset


def decode_bytes(data: bytes) -> Tensor:
    """A PNG to uint8 (3, H, W) by torchvision."""
    return decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def image_folder(
    folder: Path, transform: Callable[[Any], Tensor], *, batch_size: int, workers: int
) -> Iterator[Tensor]:
    """torchvision's ImageFolder behind a shuffling DataLoader."""
    dataset = ImageFolder(str(folder), transform=transform)
    return endless(DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=workers))


def write_image_folder(shards: ShardSet, count: int, folder: Path) -> None:
    """Writes the first ``count`` training images out as ``folder/CLASS/KEY.png``."""
    for name in shards.manifest.classes:
        (folder / name).mkdir()
    for key, label, png in samples(shards, count):
        (folder / shards.manifest.classes[label] / f"{key}.png").write_bytes(png)


def samples(shards: ShardSet, count: int) -> Iterator[tuple[str, int, bytes]]:
    """Key, label and PNG of the first ``count`` training images in storage order."""
    labels = shards.labels("train")
    for first in range(0, count, CHUNK):
        ids = np.arange(first, min(first + CHUNK, count))
        yield from zip(shards.keys("train", ids), labels[ids].tolist(), shards.read("train", ids), strict=True)


def endless(loader: Any) -> Iterator[Any]:
    """The images of a loader's (images, labels), epoch after epoch."""
    while True:
        for images, _ in loader:
            yield images
