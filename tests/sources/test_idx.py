"""MNIST's IDX files are read compressed or not, and refused by name when they are damaged."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from layouts import noise, write_mnist

from mnistm_dist.data.sources.synthesis import read_digits
from mnistm_dist.errors import UserError

PARTS = noise({"train": 60, "test": 12})


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_found_compressed_or_not_and_where_torchvision_puts_them(tmp_path, suffix, nested):
    write_mnist(tmp_path / "MNIST" / "raw" if nested else tmp_path, PARTS, suffix=suffix)
    np.testing.assert_array_equal(read_digits(tmp_path, "test")[1], PARTS["test"].labels)


DAMAGE = {
    "truncated": (lambda data: data[:-1], "do not fit its shape"),
    "too long": (lambda data: data + b"x", "do not fit its shape"),
    "not IDX": (lambda data: b"x" * len(data), "it starts with 78787878"),
    "empty": (lambda data: b"", "not an IDX file"),
    "gzip truncated": (lambda data: gzip.compress(data)[:-9], "not an IDX file"),
    "gzip changed": (lambda data: gzip.compress(data)[:20] + b"xxxx" + gzip.compress(data)[24:], "not an IDX file"),
}


@pytest.mark.parametrize("content", ["images-idx3", "labels-idx1"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_idx_file_is_refused_by_name(tmp_path, content, damage):
    write_mnist(tmp_path, PARTS, suffix="")
    spoil, part = DAMAGE[damage]
    file = tmp_path / f"train-{content}-ubyte"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError) as caught:
        read_digits(tmp_path, "train")
    assert str(caught.value).startswith(f"{file}: ")
    assert part in str(caught.value)


def test_no_more_of_a_file_is_read_than_its_header_says(tmp_path):
    write_mnist(tmp_path, PARTS, suffix="")
    with (tmp_path / "train-images-idx3-ubyte").open("ab") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(UserError, match="do not fit its shape"):
        read_digits(tmp_path, "train")


def test_idx_files_that_are_missing_or_do_not_match_are_refused(tmp_path):
    with pytest.raises(UserError, match="no train-images-idx3-ubyte"):
        read_digits(tmp_path, "train")
    write_mnist(tmp_path, PARTS)
    (tmp_path / "t10k-images-idx3-ubyte.gz").rename(tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(UserError, match=r"uint8 of shape \(60,\); expected 12 whole numbers"):
        read_digits(tmp_path, "train")
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(b"\0\0\x08\x01\0\0\0\x0c" + bytes(11) + b"\x0a")
    with pytest.raises(UserError, match="label 10 at index 11"):
        read_digits(tmp_path, "train")
