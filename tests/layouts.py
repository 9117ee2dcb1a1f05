"""Write a small set in every known layout, for the tests of the sources."""

from __future__ import annotations

import csv
import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mnistm_dist.data.image_io import encode_png
from mnistm_dist.data.sources.catalog import open_source
from mnistm_dist.errors import UserError

NUMBERS = {"train": 40, "test": 12}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One split: uint8 (n, 28, 28, 3) and int64 (n,)."""

    images: np.ndarray
    labels: np.ndarray


Parts = Mapping[str, Part]
Files = dict[str, bytes]


def noise(numbers: Mapping[str, int] = NUMBERS, side: int = 28) -> Parts:
    """A set of noise with every class in it."""
    rng = np.random.default_rng(5)
    return {
        split: Part(
            images=rng.integers(0, 256, (n, side, side, 3), np.uint8), labels=rng.permutation(np.arange(n) % 10)
        )
        for split, n in numbers.items()
    }


def official_files(parts: Parts) -> Files:
    """Return the files of the official layout, by name."""
    files: Files = {}
    for split, part in parts.items():
        lines = [f"{index:08d}.png {label}\n" for index, label in enumerate(part.labels)]
        files[f"mnist_m/mnist_m_{split}_labels.txt"] = "".join(lines).encode()
        for index, image in enumerate(part.images):
            files[f"mnist_m/mnist_m_{split}/{index:08d}.png"] = encode_png(image)
    return files


def image_folder_files(parts: Parts) -> Files:
    """Return the files of a folder per class; the file names are the original numbers."""
    return {
        f"MNIST-M/{split}ing/{label}/{index}.png": encode_png(image)
        for split, part in parts.items()
        for index, (image, label) in enumerate(zip(part.images, part.labels, strict=True))
    }


def csv_files(parts: Parts) -> Files:
    """One folder of images, and CSV files; the test split is named val."""
    files: Files = {}
    for split, part in parts.items():
        name = {"test": "val"}.get(split, split)
        text = io.StringIO()
        rows = csv.writer(text)
        rows.writerow(["image_name", "label"])
        for index, (image, label) in enumerate(zip(part.images, part.labels, strict=True)):
            rows.writerow([f"{name}{index:05d}.png", label])
            files[f"mnistm/data/{name}{index:05d}.png"] = encode_png(image)
        files[f"mnistm/{name}.csv"] = text.getvalue().encode()
    return files


def write_folder(folder: Path, files: Files) -> Path:
    """Write files into a folder and return it."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, files: Files | list[tuple[str, bytes]], mode: str = "w:gz") -> Path:
    """Write files into a tar, in their order; a list may hold a name twice."""
    with tarfile.open(path, mode) as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_zip(path: Path, files: Files) -> Path:
    """Write files into a zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


WRITE: Mapping[str, Callable[[Path, Files], Path]] = {"folder": write_folder, "tar": write_tar, "zip": write_zip}
"""By the kind of tree."""


def write_parquet(folder: Path, parts: Parts) -> Path:
    """As on the Hugging Face hub: two files of train, one of test, several row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    for split, part in parts.items():
        shards = 2 if split == "train" else 1
        for shard, places in enumerate(np.array_split(np.arange(len(part.labels)), shards)):
            images = [{"bytes": encode_png(part.images[place]), "path": f"{place}.png"} for place in places]
            table = pa.table({"image": images, "label": pa.array(part.labels[places], pa.int64())})
            name = f"{split}-{shard:05d}-of-{shards:05d}.parquet"
            pq.write_table(table, folder / "data" / name, row_group_size=7)
    return folder


def write_pt(folder: Path, parts: Parts) -> Path:
    """PyTorch tuples."""
    import torch

    folder.mkdir(parents=True)
    for split, part in parts.items():
        torch.save((torch.from_numpy(part.images), torch.from_numpy(part.labels)), folder / f"mnist_m_{split}.pt")
    return folder


def write_npz(folder: Path, parts: Parts) -> Path:
    """NumPy archives."""
    folder.mkdir(parents=True)
    for split, part in parts.items():
        np.savez(folder / f"{split}.npz", images=part.images, labels=part.labels)
    return folder


def write_npy(folder: Path, parts: Parts) -> Path:
    """Loose NumPy arrays."""
    folder.mkdir(parents=True)
    for split, part in parts.items():
        np.save(folder / f"{split}_images.npy", part.images)
        np.save(folder / f"{split}_labels.npy", part.labels)
    return folder


def write_arrow(folder: Path, parts: Parts) -> Path:
    """As `Dataset.save_to_disk` of Hugging Face: a folder of streams per split."""
    import pyarrow as pa

    for split, part in parts.items():
        (folder / split).mkdir(parents=True)
        images = [{"bytes": encode_png(image), "path": None} for image in part.images]
        table = pa.table({"image": images, "label": pa.array(part.labels, pa.int64())})
        path = folder / split / "data-00000-of-00001.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
    return folder


def write_webdataset(folder: Path, parts: Parts) -> Path:
    """Shards of 25 samples."""
    folder.mkdir(parents=True)
    for split, part in parts.items():
        for shard, start in enumerate(range(0, len(part.labels), 25)):
            files: Files = {}
            for index in range(start, min(start + 25, len(part.labels))):
                files[f"{index:06d}.cls"] = str(part.labels[index]).encode()
                files[f"{index:06d}.png"] = encode_png(part.images[index])
            write_tar(folder / f"{split}-{shard:06d}.tar", files, "w")
    return folder


def write_file_names(folder: Path, parts: Parts) -> Path:
    """Names of images with their labels."""
    files = {
        f"{split}_images/{index:05d}_{label}.png": encode_png(image)
        for split, part in parts.items()
        for index, (image, label) in enumerate(zip(part.images, part.labels, strict=True))
    }
    return write_folder(folder, files)


def write_hdf5(folder: Path, parts: Parts) -> Path:
    """Groups with X and Y."""
    import h5py

    folder.mkdir(parents=True)
    with h5py.File(folder / "mnistm.h5", "w") as file:
        for split, part in parts.items():
            file[f"{split}/X"], file[f"{split}/Y"] = part.images, part.labels
    return folder / "mnistm.h5"


def write_mat(folder: Path, parts: Parts) -> Path:
    """MATLAB 5, with labels one-hot, as floats."""
    from scipy.io import savemat

    folder.mkdir(parents=True)
    arrays = {split: part.images for split, part in parts.items()}
    savemat(
        folder / "mnistm.mat", arrays | {f"label_{split}": np.eye(10)[part.labels] for split, part in parts.items()}
    )
    return folder / "mnistm.mat"


def write_mnist(folder: Path, parts: Parts, *, suffix: str = ".gz") -> Path:
    """MNIST's four IDX files, with the labels of a set and its first channel as ink."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in parts.items():
        name = {"train": "train", "test": "t10k"}[split]
        ink = part.images[..., 0] * (part.images[..., 0] > 170)
        images = struct.pack(">IIII", 2051, *ink.shape) + ink.tobytes()
        labels = struct.pack(">II", 2049, len(part.labels)) + part.labels.astype(np.uint8).tobytes()
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            packed = gzip.compress(data, 1) if suffix else data
            (folder / f"{name}-{kind}-ubyte{suffix}").write_bytes(packed)
    return folder


def write_pickle(folder: Path, parts: Parts) -> Path:
    """Arrays without labels, as Python 3 pickles them."""
    folder.mkdir(parents=True)
    data = pickle.dumps({split.encode(): part.images for split, part in parts.items()})
    (folder / "mnistm.pkl").write_bytes(data)
    return folder / "mnistm.pkl"


def write_python2_pickle(folder: Path, parts: Parts) -> Path:
    """Write the Keras copy: a gzip'ed pickle as Python 2 and its NumPy wrote it, opcode by opcode."""
    folder.mkdir(parents=True)
    program = b"\x80\x02}("
    for split, part in parts.items():
        raw = part.images.tobytes()
        program += b"U" + bytes([len(split)]) + split.encode()
        program += b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01("
        program += b"".join(b"J" + struct.pack("<i", size) for size in part.images.shape)
        program += b"tcnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        program += b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    (folder / "keras_mnistm.pkl.gz").write_bytes(gzip.compress(program + b"u.", 1))
    return folder / "keras_mnistm.pkl.gz"


WRITERS: Mapping[str, Callable[[Path, Parts], Path]] = {
    "official-folder": lambda folder, parts: write_folder(folder, official_files(parts)),
    "official-tar": lambda folder, parts: write_tar(folder.with_suffix(".tar.gz"), official_files(parts)),
    "official-zip": lambda folder, parts: write_zip(folder.with_suffix(".zip"), official_files(parts)),
    "image-folder": lambda folder, parts: write_folder(folder, image_folder_files(parts)),
    "image-tar": lambda folder, parts: write_tar(folder.with_suffix(".tar"), image_folder_files(parts), "w"),
    "image-zip": lambda folder, parts: write_zip(folder.with_suffix(".zip"), image_folder_files(parts)),
    "csv": lambda folder, parts: write_folder(folder, csv_files(parts)),
    "parquet": write_parquet,
    "pt": write_pt,
    "npz": write_npz,
    "npy": write_npy,
    "arrow": write_arrow,
    "idx": write_mnist,
    "webdataset": write_webdataset,
    "file-names": write_file_names,
    "hdf5": write_hdf5,
    "mat": write_mat,
    "pickle": write_pickle,
}
"""The writer of each layout, of image files per kind of tree: it gets a new path and returns the path to open."""


def layout_of(name: str) -> str:
    """Return the layout of a name in `WRITERS`."""
    return {"official": "official", "image": "image-folder"}.get(name.partition("-")[0], name)


def refusal(source: Path, **options: str) -> str:
    """Return the line in which a source is refused, when it is opened or while it is read."""
    with pytest.raises(UserError) as caught:
        list(open_source(str(source), **options).samples())
    message = str(caught.value)
    assert str(source) in message
    assert "\n" not in message
    return message
