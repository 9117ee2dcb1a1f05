"""Where public copies of the official set are, and what is known of their files.

Each address is quoted in public text, which is named; none of them is ours, and any may be gone. So there are several,
and what comes from one is believed only where its pixels add up to the official sums (writing/lineage.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mnistm_dist.data.transfer import RemoteFile


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A public copy of the official set: one archive, or several files that make up a folder."""

    name: str
    """Its folder in the cache."""
    said_by: str
    """Where its address stands in public."""
    files: Mapping[str, RemoteFile]
    """By their names in the cache."""


OFFICIAL_COPIES: Sequence[Copy] = (
    Copy(
        name="mashaan14",
        said_by="github.com/mashaan14/MNIST-M: the official images in folders of their classes, with their own names",
        files={
            "MNIST-M.zip": RemoteFile(
                address="https://media.githubusercontent.com/media/mashaan14/MNIST-M/main/MNIST-M.zip",
                size=146_914_983,
                checksum=("sha256", "bd899e2c286f1267955a73f6a374f31fc98764380bb8928dbfee37d8ab0393d6"),
            )
        },
    ),
    Copy(
        name="pytorch-adapt",
        said_by="github.com/KevinMusgrave/pytorch-adapt, datasets/mnistm.py: the authors' own archive",
        files={
            "mnist_m.tar.gz": RemoteFile(
                address="https://cornell.box.com/shared/static/jado7quprg6hzzdubvwzh9umr75damwi",
                checksum=("md5", "859df31c91afe82e80e5012ba928f279"),
            )
        },
    ),
    Copy(
        name="Mike0307",
        said_by="huggingface.co/datasets/Mike0307/MNIST-M: parquet",
        files={
            name: RemoteFile(address=f"https://huggingface.co/datasets/Mike0307/MNIST-M/resolve/main/data/{name}")
            for name in (
                "train-00000-of-00001-571b6b1e2c195186.parquet",
                "test-00000-of-00001-ba3ad971b105ff65.parquet",
            )
        },
    ),
    Copy(
        name="ShichengChen",
        said_by="github.com/ShichengChen/Domain-Adversarial-Training-of-Neural-Networks: the official layout in git",
        files={
            "mnist_m.zip": RemoteFile(
                address="https://codeload.github.com/ShichengChen/"
                "Domain-Adversarial-Training-of-Neural-Networks/zip/HEAD"
            )
        },
    ),
)
"""The copies, in the order in which they are tried: those with a known checksum first."""
