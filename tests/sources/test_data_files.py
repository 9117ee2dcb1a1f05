"""Layouts of arrays: anything damaged, or without images and labels, is refused in bounded memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from layouts import WRITERS, Part, noise, refusal

from mnistm_dist.data.sources import archives
from mnistm_dist.data.sources.catalog import open_source
from mnistm_dist.data.sources.parsers import read_mat
from mnistm_dist.errors import UserError

PARTS = noise()
IMAGES, LABELS = PARTS["train"].images, PARTS["train"].labels
ARRAYS: dict[str, tuple[dict[str, object], str]] = {
    "no images": ({"labels": LABELS}, "train.npz: labels; expected images and labels"),
    "no labels": ({"images": IMAGES}, "images: no labels beside it"),
    "too few labels": ({"images": IMAGES, "labels": LABELS[1:]}, "int64 of shape (39,); expected 40 whole numbers"),
    "a label of -1": ({"images": IMAGES, "labels": LABELS - 1}, "label -1 at index"),
    "broken labels": ({"images": IMAGES, "labels": LABELS + 0.5}, ".5 at index"),
    "labels of infinity": ({"images": IMAGES, "labels": LABELS + np.inf}, "label inf at index"),
    "objects": ({"images": IMAGES, "labels": np.array([None] * 40)}, "allow_pickle"),
    "floats above 1": ({"images": IMAGES / 2, "labels": LABELS}, "accepted are uint8, or floats from 0 to 1"),
    "floats of NaN": ({"images": IMAGES * np.nan, "labels": LABELS}, "floats from nan to nan"),
    "four channels": ({"images": IMAGES.repeat(2, 3)[..., :4], "labels": LABELS}, "uint8 of shape (40, 28, 28, 4)"),
    "images without height": ({"images": IMAGES[:, :0], "labels": LABELS}, "uint8 of shape (40, 0, 28, 3)"),
    "not one-hot": ({"images": IMAGES, "labels": np.ones((40, 10), int)}, "not one-hot"),
    "no samples": ({"images": IMAGES[:0], "labels": LABELS[:0]}, "found 0 train images"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_are_not_images_and_labels_are_refused(tmp_path, case):
    arrays, part = ARRAYS[case]
    np.savez(tmp_path / "train.npz", **arrays)
    assert part in refusal(tmp_path / "train.npz")


@pytest.mark.parametrize("layout", ["parquet", "pt", "npz", "hdf5", "mat"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_refused(tmp_path, layout, share):
    path = WRITERS[layout](tmp_path / "set", PARTS)
    file = next(file for file in sorted(tmp_path.rglob("*")) if file.is_file() and "test" not in file.name)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    refusal(path, layout=layout)


@pytest.mark.parametrize("compressed", [False, True])
def test_matlab_arrays_are_read_as_scipy_reads_them(tmp_path, compressed):
    from scipy.io import loadmat, savemat

    rng = np.random.default_rng(0)
    arrays = {
        "images": rng.integers(0, 256, (50, 9, 7, 3), np.uint8),
        "one_hot": np.eye(10),
        "a": np.int16([[-5]]),
        "floats": np.float32([[1.5, 2]]),
        "empty": np.zeros((0, 3)),
        "a_name_that_is_longer_than_most": np.uint16([[1, 2, 3]]),
    }
    texts = {"names": np.array(["cat", "dög"], dtype=object), "text": "hällo", "padded": np.array(["a", "bc"])}
    others = {
        "complex": np.array([1 + 2j]),
        "cell": np.array([[1], ["a"]], dtype=object),
        "struct": {"q": 1},
    }
    file = tmp_path / "set.mat"
    savemat(file, arrays | texts | others, do_compression=compressed)
    result, expected = read_mat(file), loadmat(file)
    assert {name for name, array in result.items() if array is None} == set(others)
    for name, text in texts.items():
        assert result[name].tolist() == np.atleast_1d(text).tolist()
    for name in arrays:
        array = result[name]
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_torch_file_is_refused_and_not_run(tmp_path, monkeypatch, is_zip):
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save((torch.zeros(1), Evil()), "train.pt", _use_new_zipfile_serialization=is_zip)
    assert "damaged or not a tuple of two tensors" in refusal(tmp_path / "train.pt")
    assert not (tmp_path / "evil").exists()


def test_a_torch_file_of_the_old_format_is_read(tmp_path):
    import torch

    tensors = torch.from_numpy(IMAGES), torch.from_numpy(LABELS)
    torch.save(tensors, tmp_path / "train.pt", _use_new_zipfile_serialization=False)
    assert [sample.label for sample in open_source(str(tmp_path)).samples()] == LABELS.tolist()


def test_arrays_that_unpack_without_bound_are_refused(tmp_path):
    import h5py
    from scipy.io import savemat

    np.savez_compressed(tmp_path / "train.npz", images=np.zeros((40_000, 28, 28, 3), np.uint8), labels=[1])
    assert "unpacks to more than 100 times" in refusal(tmp_path / "train.npz")
    with h5py.File(tmp_path / "mnistm.h5", "w") as file:
        file.create_dataset("train/X", (3, 28, 28, 3), np.uint8)
        file.create_dataset("train/Y", (10**8,), np.int64)
    assert "train/Y: unpacks to more than 100 times" in refusal(tmp_path / "mnistm.h5")
    savemat(tmp_path / "mnistm.mat", {"train": np.zeros((40_000, 28, 28, 3), np.uint8)}, do_compression=True)
    assert "unpacks without bound" in refusal(tmp_path / "mnistm.mat")


def test_an_oversized_image_in_parquet_is_refused_before_it_is_copied(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1 << 20)
    table = pa.table({"image": [{"bytes": bytes(2 << 20), "path": "a"}], "label": pa.array([1], pa.int64())})
    pq.write_table(table, tmp_path / "train.parquet", compression="none", use_dictionary=False)
    assert "row 0: 2,097,152 bytes; accepted are at most 1 MiB" in refusal(tmp_path)


def test_parquet_is_read_in_memory_of_a_few_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, image = 100, np.random.default_rng(1).bytes(1 << 20)
    images = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int8()), pa.array([image]))
    table = pa.table({"image": images.cast(pa.binary()), "label": pa.array([1] * rows, pa.int64())})
    pq.write_table(table, tmp_path / "train.parquet", dictionary_pagesize_limit=8 << 20)
    del table, images
    assert (tmp_path / "train.parquet").stat().st_size < 2 << 20
    before = pa.total_allocated_bytes()
    peaks = [pa.total_allocated_bytes() - before for _ in open_source(str(tmp_path)).samples()]
    assert len(peaks) == rows
    assert max(peaks) < 50 << 20


def test_parquet_with_other_columns_or_empty_cells_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "train.parquet"
    image = {"bytes": b"x", "path": None}
    for columns, part in (
        ({"image": [image], "colour": [1]}, "expected image, a struct with bytes, and label, an integer"),
        ({"blob": [image], "label": [1]}, "columns blob struct<bytes: binary, path: null>, label int64; expected"),
        ({"image": [{"path": "x.png"}], "label": [1]}, "expected image, a struct with bytes"),
        ({"image": [image, {"bytes": None, "path": "x"}], "label": [1, 2]}, "row 1: no image bytes"),
        ({"image": [image, image], "label": [1, None]}, "row 1: no label"),
        ({"image": [image, image], "label": [1, -1]}, "label -1 at index 1; accepted are whole numbers from 0"),
    ):
        pq.write_table(pa.table(columns), path)
        assert part in refusal(path)


@pytest.mark.parametrize(("layout", "library"), [("parquet", "pyarrow.parquet"), ("hdf5", "h5py")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, layout, library):
    path = WRITERS[layout](tmp_path / "set", PARTS)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=r'needs \w+: pip install "mnistm-dist\[formats\]"'):
        open_source(str(path))


def test_two_files_of_one_split_are_refused(tmp_path):
    folder: Path = WRITERS["npz"](tmp_path / "set", {"train": Part(images=IMAGES, labels=LABELS)})
    (folder / "train-2.npz").write_bytes((folder / "train.npz").read_bytes())
    assert "several sets of images (npz: " in refusal(folder)
