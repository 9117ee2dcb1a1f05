"""Which MNIST-M a set is: proven by the sums of its pixels and labels, or said by its source, or unknown.

The sums are of the archive of Ganin and Lempitsky (``mnist_m.tar.gz``): of all RGB bytes in the order of the file
names, and of its two label files. They survive a re-encoding of the images and a change of layout, so they identify the
set.
"""

from __future__ import annotations

import hashlib

import numpy as np

OFFICIAL_PIXELS = {
    "train+val": "3c689850ded80df111260294d02c79ee0a6e602a9fd634c4e08e1339628f8d33",
    "test": "47415b066fe8a39de3f0e86f65a72d4c4078f1e2557a388ca0a7cfd8dfe90b14",
}
"""sha256 of the pixels of the official training images and test images."""
OFFICIAL_LABELS = {
    "train+val": "9e1059c2131453bb9638eeea3bbf46dc552358086f3666c038b4047aaf0a6b68",
    "test": "2e8124bc2a92b483930141f677e09cb1c5a3fe99504e05fe59877d92766d7d61",
}
"""sha256 of ``mnist_m_train_labels.txt`` and ``mnist_m_test_labels.txt``."""


def labels_sha256(labels: np.ndarray) -> str:
    """sha256 of the official label file that holds these labels: a line ``00000000.png 5`` for each, in key order."""
    digest = hashlib.sha256()
    for number, label in enumerate(labels.tolist()):
        digest.update(b"%08d.png %d\n" % (number, label))
    return digest.hexdigest()


def find_lineage(pixels: dict[str, str], labels: dict[str, np.ndarray], said: str | None) -> str:
    """ "official" if all pixels and labels are the official ones, else what the source said of itself, else "unknown".

    ``pixels`` and ``labels``: sha256 of the pixels and the labels in key order, of "train+val" and, where there is one,
    of "test". A source's word alone makes nothing official.
    """
    if all(digest == OFFICIAL_PIXELS[group] for group, digest in pixels.items()) and all(
        labels_sha256(values) == OFFICIAL_LABELS[group] for group, values in labels.items()
    ):
        return "official"
    return said if said is not None and said != "official" else "unknown"
