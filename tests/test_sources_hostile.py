"""What is damaged, foreign or hostile is refused in one line that names the file and the member."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pickle
import random
import re
import shutil
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layouts import (
    WRITERS,
    Files,
    Part,
    course_files,
    image_folder_files,
    noise,
    official_files,
    write_folder,
    write_mnist,
    write_npz,
    write_tar,
    write_zip,
)

from mnistm_dist.data.sources.catalog import open_source
from mnistm_dist.errors import UserError

PARTS = noise()
LABELS = "mnist_m/mnist_m_train_labels.txt"
IMAGE = "mnist_m/mnist_m_train/00000003.png"
WRITE = {"folder": write_folder, "tar": write_tar, "zip": write_zip}


def refusal(source: Path, **options: str) -> str:
    """The one line in which a source is refused, at its opening or while it is read."""
    with pytest.raises(UserError) as caught:
        list(open_source(str(source), **options).samples())
    message = str(caught.value)
    assert str(source) in message
    assert "\n" not in message
    return message


def relabel(change: Callable[[list[str]], list[str]]) -> Callable[[Files], None]:
    def damage(files: Files) -> None:
        files[LABELS] = "".join(f"{line}\n" for line in change(files[LABELS].decode().splitlines())).encode()

    return damage


def rename(files: Files) -> None:
    files["mnist_m/mnist_m_train/other.png"] = files.pop(IMAGE)


OFFICIAL_DAMAGE: dict[str, tuple[Callable[[Files], object], str]] = {
    "no labels": (
        lambda files: files.pop(LABELS),
        "mnist_m_train: images without labels; put mnist_m_train_labels.txt",
    ),
    "an image is missing": (lambda files: files.pop(IMAGE), "00000003.png: labelled in"),
    "an image is renamed": (rename, "00000003.png: labelled in"),
    "a foreign file": (lambda files: files.update({"mnist_m/mnist_m_train/a.exe": b""}), "a.exe: foreign"),
    "a foreign folder": (lambda files: files.update({"mnist_m/mnist_m_test/b/x.png": b""}), "mnist_m_test/b: foreign"),
    "a label is missing": (relabel(lambda lines: lines[:3] + lines[4:]), "00000003.png: no label for it"),
    "labels are too many": (relabel(lambda lines: [*lines, "00000099.png 1"]), "00000099.png: labelled in"),
    "a label twice": (relabel(lambda lines: [*lines, lines[3]]), "line 41: 00000003.png is labelled twice"),
    "a label of 10": (
        relabel(lambda lines: [*lines[:-1], "00000039.png 10"]),
        "line 40: label '10'; accepted are 0 to 9",
    ),
    "a label of -1": (relabel(lambda lines: ["00000000.png -1", *lines[1:]]), "line 1: label '-1'"),
    "a label in words": (relabel(lambda lines: ["00000000.png five", *lines[1:]]), "line 1: label 'five'"),
    "a line of one word": (relabel(lambda lines: ["00000000.png", *lines[1:]]), "line 1: '00000000.png'; accepted"),
    "labels in binary": (lambda files: files.update({LABELS: b"\xff\xfe\x00"}), "labels.txt: not text in UTF-8"),
    "a huge image": (lambda files: files.update({IMAGE: bytes(17 << 20)}), "00000003.png: 17825792 bytes"),
}


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("damage", OFFICIAL_DAMAGE)
def test_a_damaged_official_set_is_refused_by_the_name_of_what_is_wrong(tmp_path, kind, damage):
    files = official_files(PARTS)
    spoil, said = OFFICIAL_DAMAGE[damage]
    spoil(files)
    path = tmp_path / "set"
    with pytest.raises(UserError) as caught:
        list(open_source(str(WRITE[kind](path, files))).samples())
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(path))


IMAGE_FOLDER_DAMAGE: dict[str, tuple[Files, str]] = {
    "a class that is none": (
        {"MNIST-M/training/ten/1.png": b""},
        "training/ten: foreign; accepted there are the folders",
    ),
    "a file among the classes": ({"MNIST-M/training/x.png": b""}, "training/x.png: foreign"),
    "a file that is no PNG": ({"MNIST-M/training/3/x.jpg": b""}, "training/3/x.jpg: foreign among the images"),
    "a split twice": ({"MNIST-M/train/3/x.png": b""}, "training: a second folder of the split train"),
}


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("damage", IMAGE_FOLDER_DAMAGE)
def test_a_foreign_member_of_an_image_folder_is_refused_by_its_name(tmp_path, kind, damage):
    more, said = IMAGE_FOLDER_DAMAGE[damage]
    assert said in refusal(WRITE[kind](tmp_path / "set", image_folder_files(PARTS) | more))


COURSE_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "other columns": (
        lambda text: text.replace(b"image_name", b"file"),
        "train.csv: columns 'file, label'; needed are",
    ),
    "a cell is missing": (lambda text: text + b"train00001.png\r\n", "line 42: not one value for each column"),
    "a cell too many": (lambda text: text + b"train00001.png,1,2\r\n", "line 42: not one value for each column"),
    "no such image": (lambda text: text + b"gone.png,1\r\n", "line 42: gone.png: no such image"),
    "named twice": (lambda text: text + b"train00001.png,1\r\n", "line 42: train00001.png is named a second time"),
    "in two splits": (lambda text: text + b"val00001.png,1\r\n", "val00001.png is named a second time"),
    "no class": (lambda text: text.replace(b"00000.png,", b"00000.png,1"), "line 2: label '1"),
    "no CSV": (lambda text: text + b'"unclosed', "no CSV"),
}


@pytest.mark.parametrize("damage", COURSE_DAMAGE)
def test_a_damaged_course_is_refused_by_file_and_line(tmp_path, damage):
    files = course_files(PARTS)
    spoil, said = COURSE_DAMAGE[damage]
    files["mnistm/train.csv"] = spoil(files["mnistm/train.csv"])
    assert said in refusal(write_folder(tmp_path / "set", files))


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize(
    "member", ["../evil.png", "mnist_m/../../evil.png", "/etc/evil.png", "a\\..\\evil.png", "C:/x.png"]
)
def test_a_path_that_climbs_out_of_an_archive_is_refused(tmp_path, kind, member):
    assert f"{member}: a path that climbs out" in refusal(
        WRITE[kind](tmp_path / "set", official_files(PARTS) | {member: b""})
    )


def test_a_name_of_thousands_of_digits_is_no_number(tmp_path):
    files = image_folder_files(PARTS)
    first = next(name for name in files if name.startswith("MNIST-M/training/"))
    files[f"{first.rpartition('/')[0]}/{'9' * 5_000}.png"] = files.pop(first)
    source = open_source(str(write_tar(tmp_path / "set.tar", files)))
    assert sum(1 for _ in source.samples()) == len(files)


def test_a_member_that_comes_twice_is_refused(tmp_path):
    files = [*official_files(PARTS).items(), (f"./{IMAGE}", b"another")]
    assert "00000003.png: comes twice in the archive" in refusal(write_tar(tmp_path / "set", files))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, data in official_files(PARTS).items():
            archive.writestr(name, data)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(IMAGE, b"another")
    assert "00000003.png: comes twice in the archive" in refusal(tmp_path / "set.zip")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    path = write_tar(tmp_path / "set.tar", official_files(PARTS), "w")
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("mnist_m/mnist_m_train/link.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    message = refusal(path)
    assert "mnist_m/mnist_m_train/link.png: a link" in message or "link.png: neither a file nor a folder" in message


def test_links_and_passwords_in_a_zip_are_refused(tmp_path):
    link = zipfile.ZipInfo("mnist_m/mnist_m_train/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = write_zip(tmp_path / "set.zip", official_files(PARTS))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    assert "link.png: a link" in refusal(path)
    path = write_zip(tmp_path / "locked.zip", official_files(PARTS))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert "encrypted" in refusal(path)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_tar_cut_short_anywhere_is_refused(tmp_path, mode, share):
    path = write_tar(tmp_path / "set", official_files(PARTS), mode)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "cut short" in refusal(path)


def test_a_tar_cut_between_two_members_is_refused(tmp_path):
    path = write_tar(tmp_path / "set.tar", {**official_files(PARTS), "mnist_m/z_README.txt": b"last"}, "w")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mnist_m/z_README")])
    assert "the mark at the end of a tar is not there" in refusal(path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("header", [bytes(512), b"\xff"])
def test_a_damaged_header_inside_a_tar_is_not_its_end(tmp_path, mode, header):
    path = write_tar(tmp_path / "set.tar", image_folder_files(PARTS), "w")
    with tarfile.open(path) as tar:
        place = tar.getmembers()[25].offset
    data = bytearray(path.read_bytes())
    data[place : place + len(header)] = header
    path.write_bytes(gzip.compress(data, 1) if mode == "w:gz" else data)
    assert "damaged: more follows after its end; fetch it again" in refusal(path)


@pytest.mark.parametrize(
    "pax", [{"GNU.sparse.map": "a,b"}, {"GNU.sparse.size": "abc"}, {"GNU.sparse.realsize": "x"}], ids=str
)
def test_extended_headers_that_make_no_sense_are_refused(tmp_path, pax):
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in official_files(PARTS).items():
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), pax if name == IMAGE else {}
            tar.addfile(member, io.BytesIO(data))
    refusal(path)


def test_a_zip_of_another_compression_that_is_damaged_is_refused(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, data in official_files(PARTS).items():
            archive.writestr(name, data)
    content = bytearray(path.read_bytes())
    for place in range(200, 3_000, 200):
        path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        with contextlib.suppress(UserError):
            list(open_source(str(path)).samples())


def test_a_zip_that_is_small_and_unpacks_to_much_is_refused(tmp_path):
    files = {f"mnist_m/mnist_m_train/{index:08d}.png": bytes(15 << 20) for index in range(24)}
    assert "unpack" in refusal(write_zip(tmp_path / "set.zip", official_files(PARTS) | files))


def test_parquet_with_a_huge_image_is_refused_before_it_is_unpacked(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = bytes(17 << 20)
    table = pa.table({"image": [{"bytes": image, "path": "a"}], "label": pa.array([1], pa.int64())})
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet", compression="none", use_dictionary=False)
    assert "17825792 bytes, where at most 16 MiB" in refusal(tmp_path)


def test_parquet_whose_few_bytes_stand_for_gigabytes_is_read_in_little_memory(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = 500
    image = np.random.default_rng(1).bytes(4 << 20)
    images = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int8()), pa.array([image]))
    table = pa.table({"image": images.cast(pa.binary()), "label": pa.array([1] * rows, pa.int64())})
    path = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(table, path, dictionary_pagesize_limit=8 << 20)
    del table, images
    assert path.stat().st_size < 5 << 20
    source = open_source(str(tmp_path))
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in source.samples())
    assert source.counts == {"train": rows}
    assert most < 200 << 20


@pytest.mark.parametrize(("shape", "labels"), [((3, 28, 28, 3), 10**8), ((3, 2_000, 28, 3), 3)], ids=str)
def test_arrays_that_were_never_written_take_no_memory(tmp_path, shape, labels):
    import h5py

    with h5py.File(tmp_path / "mnistm.h5", "w") as file:
        file.create_dataset("train/X", shape, np.uint8)
        file.create_dataset("train/Y", (labels,), np.int64)
    assert "train/" in refusal(tmp_path / "mnistm.h5")


def test_a_byte_changed_in_a_compressed_tar_or_a_zip_is_noticed(tmp_path):
    for kind in ("tar", "zip"):
        path = WRITE[kind](tmp_path / kind, official_files(PARTS))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
        message = refusal(path)
        assert "damaged" in message or "cut short" in message


def test_a_zip_cut_short_is_refused(tmp_path):
    path = write_zip(tmp_path / "set.zip", official_files(PARTS))
    path.write_bytes(path.read_bytes()[:-300])
    assert "no whole zip" in refusal(path)


def test_archives_that_unpack_without_end_are_refused(tmp_path):
    bomb = tmp_path / "bomb.tar.gz"
    with gzip.open(bomb, "wb", 9) as file:
        member = tarfile.TarInfo("README.txt")
        member.size = 200 << 20
        file.write(member.tobuf())
        for _ in range(200):
            file.write(bytes(1 << 20))
    assert "unpacks to more than 100 times its size" in refusal(bomb)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mnist_m/mnist_m_train/00000000.png", bytes(20 << 20))
    assert "at most 16 MiB are accepted" in refusal(tmp_path / "bomb.zip")
    write_npz(tmp_path / "npz", {"train": Part(images=np.zeros((9, 1, 1, 3), np.uint8), labels=np.zeros(9, np.int64))})
    np.savez_compressed(tmp_path / "npz" / "train.npz", images=np.zeros((40_000, 28, 28, 3), np.uint8), labels=[1])
    assert "images.npy: unpacks to more than 100 times" in refusal(tmp_path / "npz" / "train.npz")


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch evil",)


MEMO_BOMB = b"\x80\x02}r" + struct.pack("<I", 1 << 31) + b"."
SHAPE_BOMB = b"\x80\x02cnumpy\nndarray\nJ" + struct.pack("<i", 1 << 30) + b"\x85R."
BYTES_BOMB = b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"few."
PICKLES: dict[str, tuple[bytes, str]] = {
    "code": (pickle.dumps({"train": Evil()}), "asks for 'posix.system' when it is unpickled"),
    "code beside arrays": (pickle.dumps({"train": np.zeros((1, 2, 2, 3), np.uint8), "x": Evil()}), "posix.system"),
    "eval": (b"\x80\x02cbuiltins\neval\n(U\x011tR.", "builtins.eval"),
    "numpy's own loader": (b"\x80\x02cnumpy\nload\n.", "numpy.load"),
    "a class of ours": (pickle.dumps({"train": Part(images=np.zeros(1), labels=np.zeros(1))}), "layouts.Part"),
    "no dict": (pickle.dumps([1]), "a list; accepted is a dict of arrays"),
    "no arrays": (pickle.dumps({"train": 1}), "a dict; accepted is a dict of arrays"),
    "other keys": (pickle.dumps({"a": np.zeros((1, 2, 2, 3), np.uint8)}), "a dict of a; accepted are the keys train"),
    "objects": (pickle.dumps({"train": np.array([None])}), "an array of 'O8'; accepted is uint8"),
    "floats": (pickle.dumps({"train": np.zeros((40, 28, 28, 3))}), "an array of 'f8'; accepted is uint8"),
    "another shape": (pickle.dumps({"train": np.zeros((40, 28, 28), np.uint8)}), "uint8 of shape (40, 28, 28)"),
    "too few": (pickle.dumps({"train": PARTS["train"].images[:9]}), "40 labels for 9 images"),
    "a memo of gigabytes": (MEMO_BOMB, "a dict of nothing; accepted are the keys train and test"),
    "an array of gigabytes": (SHAPE_BOMB, "no whole pickle of arrays"),
    "bytes of a terabyte": (BYTES_BOMB, "no whole pickle of arrays (4 bytes where 1099511627776 are promised)"),
    "cut short": (pickle.dumps({"train": PARTS["train"].images})[:-9], "no whole pickle of arrays"),
    "text": (b"(this is no pickle", "no whole pickle of arrays"),
    "an object that nothing made": (
        b"\x80\x02}U\x05traincnumpy.core.multiarray\n_reconstruct\n)\x81s.",
        "uint8 of shape (0,)",
    ),
    "a state for a stand-in": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}U\x05arrayK\x01sb.",
        "(a state for a type)",
    ),
    "a state for a dict": (b"\x80\x02}}b.", "(a state for a dict)"),
    "a key of a megabyte": (pickle.dumps({"a" * 10**6: np.zeros((1, 2, 2, 3), np.uint8)}), "a dict of aaaa"),
}


@pytest.mark.parametrize("case", PICKLES)
@pytest.mark.parametrize("suffix", [".pkl", ".pkl.gz"])
def test_a_pickle_of_anything_but_arrays_is_refused_and_none_of_it_runs(tmp_path, monkeypatch, case, suffix):
    monkeypatch.chdir(tmp_path)
    data, said = PICKLES[case]
    path = tmp_path / f"set{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    message = refusal(path, mnist=str(write_mnist(tmp_path / "mnist", PARTS)))
    assert said in message
    assert len(message) < 600
    assert not (tmp_path / "evil").exists()


def test_a_torch_file_of_the_old_format_whose_storages_are_misnamed_is_refused(tmp_path):
    import torch

    path = tmp_path / "mnist_m_train.pt"
    torch.save((torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.ones(2)), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    key = re.findall(rb"X.\x00\x00\x00(\d{6,})", data, re.DOTALL)[-1]
    place = data.rindex(key)
    path.write_bytes(data[:place] + key[::-1].replace(b"0", b"1") + data[place + len(key) :])
    assert "damaged, or something else than a tuple of two tensors" in refusal(tmp_path)


def test_a_torch_file_with_code_in_it_is_refused_and_does_not_run(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    for name, legacy in (("mnist_m_train.pt", False), ("old_train.pt", True)):
        torch.save((torch.zeros(1), Evil()), name, _use_new_zipfile_serialization=not legacy)
        assert "damaged, or something else than a tuple of two tensors" in refusal(tmp_path / name)
    assert not (tmp_path / "evil").exists()


def spoilt_npz(folder: Path, **arrays: object) -> Path:
    folder.mkdir()
    np.savez(folder / "train.npz", **arrays)
    return folder / "train.npz"


IMAGES, LABELS_OF = PARTS["train"].images, PARTS["train"].labels
ARRAYS: dict[str, tuple[dict[str, object], str]] = {
    "images are missing": ({"labels": LABELS_OF}, "images.npy"),
    "labels are missing": ({"images": IMAGES}, "labels"),
    "labels too few": ({"images": IMAGES, "labels": LABELS_OF[1:]}, "39 labels for 40 images"),
    "labels too many": ({"images": IMAGES, "labels": [*LABELS_OF, 1]}, "41 labels for 40 images"),
    "a label of 10": ({"images": IMAGES, "labels": LABELS_OF + 1}, "label 10 at place"),
    "a label of -1": ({"images": IMAGES, "labels": LABELS_OF - 1}, "label -1 at place"),
    "labels as floats": ({"images": IMAGES, "labels": LABELS_OF / 2}, "accepted are integers"),
    "objects": ({"images": IMAGES, "labels": np.array([None] * 40)}, "allow_pickle"),
    "images as floats": ({"images": IMAGES / 255, "labels": LABELS_OF}, "float64 of shape"),
    "channels first": ({"images": IMAGES.transpose(0, 3, 1, 2), "labels": LABELS_OF}, "shape (40, 3, 28, 28)"),
    "not one-hot": ({"images": IMAGES, "labels": np.ones((40, 10), int)}, "not one-hot"),
    "no images at all": ({"images": IMAGES[:0], "labels": LABELS_OF[:0]}, "no images in its split train"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_are_not_images_and_labels_are_refused(tmp_path, case):
    arrays, said = ARRAYS[case]
    assert said in refusal(spoilt_npz(tmp_path / "set", **arrays))


@pytest.mark.parametrize("layout", ["parquet", "pt", "npz", "hdf5", "mat"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_file_of_arrays_cut_short_is_refused(tmp_path, layout, share):
    path = WRITERS[layout](tmp_path / "set", PARTS)
    file = next(file for file in sorted(tmp_path.rglob("*")) if file.is_file() and "test" not in file.name)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    refusal(path, layout=layout)


@pytest.mark.parametrize("layout", sorted(set(WRITERS) - {"official-folder", "image-folder", "course"}))
def test_bytes_changed_anywhere_give_images_or_a_refusal_and_never_another_error(tmp_path, layout):
    path = WRITERS[layout](tmp_path / "set", PARTS)
    mnist = {"mnist": str(write_mnist(tmp_path / "mnist", PARTS))} if layout == "pickle" else {}
    files = [file for file in tmp_path.rglob("*train*" if path.is_dir() else path.name) if file.is_file()]
    chance = random.Random(layout)
    for _ in range(20):
        file = chance.choice(files)
        whole = file.read_bytes()
        data = bytearray(whole)
        for _ in range(chance.choice((1, 4))):
            near_the_start = min(len(data), 300)
            data[chance.randrange(chance.choice((near_the_start, len(data))))] = chance.randrange(256)
        file.write_bytes(data)
        with contextlib.suppress(UserError):
            assert sum(1 for _ in open_source(str(path), **mnist).samples()) > 0
        file.write_bytes(whole)


def test_parquet_with_other_columns_or_empty_cells_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "train.parquet"
    image = {"bytes": b"x", "path": None}
    for columns, said in (
        ({"image": [image], "target": [1]}, "needed are image, a struct with bytes, and label, an integer"),
        ({"img": [image], "label": [1]}, "columns img struct<bytes: binary, path: null>, label int64; needed"),
        ({"image": [{"path": "x.png"}], "label": [1]}, "needed are image, a struct with bytes"),
        ({"image": [image], "label": ["1"]}, "and label, an integer"),
        ({"image": [image, {"bytes": None, "path": "x"}], "label": [1, 2]}, "row 1: no bytes of an image"),
        ({"image": [image, image], "label": [1, None]}, "row 1: no label"),
        ({"image": [image, image], "label": [1, 10]}, "row 1: label 10; accepted are 0 to 9"),
    ):
        pq.write_table(pa.table(columns), path)
        assert said in refusal(path)


def test_matlab_7_3_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "set.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n")
    assert "save it with -v7" in refusal(tmp_path / "set.mat")


UNKNOWN: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty folder": (lambda path: path.mkdir(), "it is an empty folder"),
    "other files": (lambda path: write_folder(path, {"a.txt": b"", "b/c.txt": b""}), "a folder of a.txt, b/"),
    "an empty file": (lambda path: path.write_bytes(b""), "an empty file"),
    "text": (lambda path: path.write_text("hello\n"), "a text file"),
    "bytes": (lambda path: path.write_bytes(bytes(range(256))), "begins with the bytes 00 01 02"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><html>"), "a web page"),
    "a pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "a pointer of Git LFS"),
    "another tar": (lambda path: write_tar(path, {"a.py": b"1"}), "a tar of other things"),
    "another zip": (lambda path: write_zip(path, {"a.py": b"1"}), "a zip of other things"),
    "MNIST": (lambda path: write_mnist(path, PARTS), "MNIST itself: blend it"),
    "a packed set": (lambda path: write_folder(path, {"manifest.json": b"{}"}), "a packed set already"),
    "a pipe": (os.mkfifo, "neither a file nor a folder"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_cannot_be_told_is_refused_with_what_was_found_and_the_layouts_known(tmp_path, case):
    make, said = UNKNOWN[case]
    path = tmp_path / "thing"
    make(path)
    message = refusal(path)
    assert said in message
    assert "known are official-folder, official-tar, official-zip, image-folder" in message
    assert message.endswith("pickle (pack --layouts shows each)")


def test_a_path_that_is_not_there_or_cannot_be_read_is_refused(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot be looked at"):
        open_source("a" * 5000)
    folder = write_folder(tmp_path / "set", official_files(PARTS))
    image = folder / IMAGE
    image.unlink()
    image.symlink_to("/nowhere.png")
    assert f"{image}: cannot be read" in refusal(folder)
    image.unlink()
    os.mkfifo(image)
    assert f"{image}: no regular file" in refusal(folder)


def test_two_sets_in_one_folder_are_refused_with_both_named(tmp_path):
    write_folder(tmp_path / "set" / "a", official_files(PARTS))
    shutil.copytree(tmp_path / "set" / "a", tmp_path / "set" / "b")
    message = refusal(tmp_path / "set")
    assert "more than one set of images (official-folder" in message
    assert "set/a/mnist_m" in message
    assert "set/b/mnist_m" in message


@pytest.mark.parametrize("forced", ["image-folder", "official-tar", "npz", "pickle"])
def test_a_forced_layout_that_does_not_fit_is_refused(tmp_path, forced):
    folder = write_folder(tmp_path / "set", official_files(PARTS))
    assert f"not of the layout {forced} (" in refusal(folder, layout=forced)
    assert "a file of the layout npz" in refusal(write_npz(tmp_path / "n", PARTS) / "train.npz", layout="pt")


def test_flags_that_do_not_belong_to_a_source_are_refused(tmp_path):
    folder = str(write_folder(tmp_path / "set", official_files(PARTS)))
    for arguments, said in (
        ({"source": folder, "layout": "cifar"}, "--layout cifar: not known; known are sample"),
        ({"source": "sample", "layout": "npz"}, "sample is made, not read"),
        ({"source": "sample", "photos": folder}, "--photos is for the source mnist"),
        ({"source": "sample", "mnist": folder}, "the sample brings its own digits"),
        ({"source": folder, "mnist": folder}, "--mnist is for mnist"),
        ({"source": "mnist+photos", "mnist": folder}, "needs --mnist DIR"),
        ({"source": folder, "blends": 2}, "--blends is for sample and mnist+photos, whose images are made"),
    ):
        with pytest.raises(UserError) as caught:
            open_source(**arguments)
        assert said in str(caught.value)


def test_a_zip_that_spells_a_name_as_no_utf_8_is_refused(tmp_path):
    path = write_zip(tmp_path / "set.zip", official_files(PARTS))
    data = bytearray(path.read_bytes())
    name = IMAGE.encode()
    local, central = data.index(name), data.rindex(name)
    data[central - 46 + 9] |= 8  # the flag that says UTF-8
    data[local + len(name) - 5] = 0xFF
    path.write_bytes(data)
    assert "00000003.png: damaged" in refusal(path)


def test_a_zip_whose_member_is_longer_than_it_says_gives_an_error_not_memory(tmp_path):
    path = write_zip(tmp_path / "set.zip", official_files(PARTS))
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = struct.pack("<I", archive.getinfo(IMAGE).file_size)
    at = data.rindex(IMAGE.encode()) - 46 + 24
    assert data[at : at + 4] == size
    path.write_bytes(data[:at] + struct.pack("<I", 100) + data[at + 4 :])
    assert "00000003.png: damaged" in refusal(path)
