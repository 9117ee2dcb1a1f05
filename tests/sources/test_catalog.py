"""Every layout of MNIST-M is detected and gives the same images and labels, in bounded memory."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layouts import (
    WRITE,
    WRITERS,
    Part,
    csv_files,
    image_folder_files,
    layout_of,
    noise,
    official_files,
    refusal,
    write_folder,
    write_mnist,
    write_npz,
    write_parquet,
    write_pt,
    write_python2_pickle,
    write_tar,
    write_zip,
)
from PIL import Image

from mnistm_dist.data.sources.base import CLASSES, Sample, Source
from mnistm_dist.data.sources.catalog import KNOWN_LAYOUTS, open_source
from mnistm_dist.errors import UserError

PARTS = noise()


def read(source: Source) -> dict[str, Part]:
    """Read a whole source in its order, decoded; asserts that each sample comes once."""
    result: dict[str, dict[int, tuple[np.ndarray, int]]] = {split: {} for split in source.counts}
    for sample in source.samples():
        assert (sample.encoded is None) != (sample.pixels is None)
        pixels = sample.pixels if sample.encoded is None else np.asarray(Image.open(io.BytesIO(sample.encoded)))
        assert sample.index not in result[sample.split]
        result[sample.split][sample.index] = pixels, sample.label
    assert {split: list(range(count)) for split, count in source.counts.items()} == {
        split: sorted(samples) for split, samples in result.items()
    }
    return {
        split: Part(
            images=np.stack([samples[index][0] for index in sorted(samples)]),
            labels=np.array([samples[index][1] for index in sorted(samples)]),
        )
        for split, samples in result.items()
    }


def assert_same(source: Source, parts=PARTS, renamed: dict[str, str] | None = None) -> None:
    result = read(source)
    assert list(result) == [(renamed or {}).get(split, split) for split in parts]
    for split, part in parts.items():
        same = result[(renamed or {}).get(split, split)]
        np.testing.assert_array_equal(same.labels, part.labels)
        np.testing.assert_array_equal(same.images, part.images)


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_is_detected_and_gives_the_same_images_and_labels_in_order(tmp_path, layout):
    path = WRITERS[layout](tmp_path / "set", PARTS)
    mnist = str(write_mnist(tmp_path / "mnist", PARTS)) if layout == "pickle" else None
    grey = {}
    if layout == "idx":
        inks = {split: part.images[..., :1] * (part.images[..., :1] > 170) for split, part in PARTS.items()}
        grey = {split: Part(images=ink.repeat(3, axis=3), labels=PARTS[split].labels) for split, ink in inks.items()}
    for forced in (None, layout_of(layout)):
        source = open_source(str(path), layout=forced, mnist=mnist)
        assert (source.layout, source.lineage, source.val_size()) == (layout_of(layout), None, None)
        assert source.classes == CLASSES
        assert_same(source, grey or PARTS, renamed={"test": "val"} if layout == "csv" else None)


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("family", ["official", "image"])
def test_a_layout_can_be_forced_for_a_folder_a_tar_and_a_zip(tmp_path, family, kind):
    path = WRITERS[f"{family}-{kind}"](tmp_path / "set", PARTS)
    layout = layout_of(family)
    assert open_source(str(path), layout=layout).layout == layout


def test_every_known_layout_is_tested():
    assert set(map(layout_of, WRITERS)) | {"sample", "mnist+photos"} == set(KNOWN_LAYOUTS)


@pytest.mark.parametrize("around", ["", "mnist_m/", "a/b/"])
@pytest.mark.parametrize("kind", WRITE)
def test_a_set_may_lie_up_to_two_folders_deep(tmp_path, around, kind):
    files = {around + name.removeprefix("mnist_m/"): data for name, data in official_files(PARTS).items()}
    assert_same(open_source(str(WRITE[kind](tmp_path / "set", files))))


def test_members_of_a_tar_may_come_in_any_order(tmp_path):
    files = list(official_files(PARTS).items())
    random.Random(0).shuffle(files)
    assert_same(open_source(str(write_tar(tmp_path / "set.tar", files, "w"))))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_is_detected_by_its_bytes_with_any_compression_and_name(tmp_path, mode):
    assert_same(open_source(str(write_tar(tmp_path / "download", official_files(PARTS), mode))))


def test_files_of_operating_systems_and_leading_dots_are_ignored(tmp_path):
    files = [("./" + name, data) for name, data in official_files(PARTS).items()]
    files += [("./mnist_m/mnist_m_train/._00000000.png", b"x"), ("__MACOSX/mnist_m/x.png", b"x"), ("./.DS_Store", b"")]
    assert_same(open_source(str(write_tar(tmp_path / "set.tar.gz", files))))


def test_a_set_without_test_is_accepted_and_one_without_train_is_not(tmp_path):
    only = {"train": PARTS["train"]}
    assert_same(open_source(str(write_tar(tmp_path / "train.tar.gz", official_files(only)))), only)
    (tmp_path / "other").mkdir()
    path = write_tar(tmp_path / "other" / "test.tar.gz", official_files({"test": PARTS["test"]}))
    assert "found 12 test images; expected train" in refusal(path)


@pytest.mark.parametrize(("write", "name"), [(write_pt, "mnist_m_train.pt"), (write_npz, "test.npz")])
def test_one_file_of_a_set_adds_the_other_files_of_that_set(tmp_path, write, name):
    folder = write(tmp_path / "set", PARTS)
    shutil.copy(folder / name, folder / f"other_{name}")
    assert_same(open_source(str(folder / name)))
    assert "several sets of images" in refusal(folder)


def test_one_parquet_file_adds_the_others(tmp_path):
    folder = write_parquet(tmp_path / "set", PARTS)
    assert_same(open_source(str(folder / "data" / "train-00001-of-00002.parquet")))


def test_a_pickle_that_python_2_wrote_is_read(tmp_path):
    path = write_python2_pickle(tmp_path / "keras", PARTS)
    source = open_source(str(path), mnist=str(write_mnist(tmp_path / "mnist", PARTS, suffix="")))
    assert source.layout == "pickle"
    assert_same(source)
    assert "add --mnist DIR" in refusal(path)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["set.pkl", "set.pickle.gz"])
def test_a_pickle_of_any_protocol_is_read(tmp_path, name, protocol):
    data = pickle.dumps({split: part.images for split, part in PARTS.items()}, protocol)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert_same(open_source(str(tmp_path / name), mnist=str(write_mnist(tmp_path / "mnist", PARTS))))


@pytest.mark.parametrize("kind", WRITE)
def test_csv_files_may_lie_in_an_archive_beside_their_images(tmp_path, kind):
    files = {name.replace("/data/", "/"): data for name, data in csv_files(PARTS).items()}
    source = open_source(str(WRITE[kind](tmp_path / "set", files)))
    assert (source.layout, source.notes) == ("csv", ())
    assert_same(source, renamed={"test": "val"})


def test_a_csv_file_may_name_images_with_their_folder(tmp_path):
    files = {name.replace("/data/val", "/test/train"): data for name, data in csv_files(PARTS).items()}
    for split, folder in (("train", b"data"), ("val", b"test")):
        text = files[f"mnistm/{split}.csv"].replace(b"val0", b"train0")
        files[f"mnistm/{split}.csv"] = text.replace(b"\ntrain0", b"\n" + folder + b"/train0")
    assert_same(open_source(str(write_folder(tmp_path / "set", files))), renamed={"test": "val"})


def test_images_that_no_csv_file_names_are_skipped_with_a_note(tmp_path):
    files = csv_files(PARTS)
    files["mnistm/data/private.png"] = next(data for name, data in files.items() if name.endswith(".png"))
    source = open_source(str(write_folder(tmp_path, files)))
    assert source.notes == ("left out: mnistm/data/private.png",)
    assert_same(source, renamed={"test": "val"})


def test_classes_are_spread_evenly_if_names_are_no_numbers(tmp_path):
    files = image_folder_files(PARTS)
    renamed = {str(Path(name).with_name(f"img_{Path(name).name}")): data for name, data in files.items()}
    labels = read(open_source(str(write_folder(tmp_path, renamed))))["train"].labels
    assert sorted(labels[-10:]) == list(range(10))


def test_a_set_of_the_official_size_gives_its_last_4001_as_val_in_any_layout(tmp_path):
    part = Part(images=np.zeros((59_001, 1, 1, 3), np.uint8), labels=np.arange(59_001) % 10)
    assert open_source(str(write_npz(tmp_path / "set", {"train": part}))).val_size() == 4_001


@pytest.mark.parametrize("index", [-1, 1])
def test_an_image_beyond_the_counted_ones_is_refused(index):
    sample = Sample(split="train", index=index, label=0, encoded=b"", origin="set: image")
    source = Source(layout="x", description="set", counts={"train": 1}, read=lambda: iter([sample]))
    with pytest.raises(UserError, match="set: image: set has changed since it was opened"):
        list(source.samples())


def test_a_source_that_misses_an_image_is_refused():
    sample = Sample(split="train", index=0, label=0, encoded=b"", origin="set: image")
    source = Source(layout="x", description="set", counts={"train": 3}, read=lambda: iter([sample]))
    with pytest.raises(UserError, match="set: 2 of 3 train images are gone"):
        list(source.samples())


def test_a_file_that_is_removed_after_the_source_was_opened_is_named(tmp_path):
    folder = write_folder(tmp_path, official_files(PARTS))
    source = open_source(str(folder))
    (folder / "mnist_m" / "mnist_m_train" / "00000007.png").unlink()
    with pytest.raises(UserError, match=r"00000007\.png: missing or not a regular file"):
        list(source.samples())


MEASURE_PEAK = """
import sys, tracemalloc
from mnistm_dist.data.sources.catalog import open_source
tracemalloc.start()
for path in sys.argv[1:]:
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    count = sum(1 for _ in open_source(path).samples())
    print(count, tracemalloc.get_traced_memory()[1] - before)
"""


def test_memory_does_not_grow_with_the_images(tmp_path, environment):
    files = official_files(noise({"train": 600}, side=60))
    paths = [WRITE[kind](tmp_path / f"set.{kind}", files) for kind in WRITE]
    # In its own process: pathlib interns every name, and the table of a whole suite's interned strings takes megabytes
    # at once when it grows.
    command = [sys.executable, "-c", MEASURE_PEAK, *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        count, peak = map(int, line.split())
        assert count == 600
        assert peak < sum(map(len, files.values())) / 4


UNKNOWN: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty folder": (lambda path: path.mkdir(), "found an empty folder"),
    "other files": (lambda path: write_folder(path, {"a.txt": b"", "b/c.txt": b""}), "found a.txt, b/;"),
    "an empty file": (lambda path: path.write_bytes(b""), "found an empty file"),
    "text": (lambda path: path.write_text("hello\n"), r"found a file that starts with b'hello\n'"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><html>"), "found a web page"),
    "a Git LFS pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "another tar": (lambda path: write_tar(path, {"a.py": b"1"}), "found an archive of a.py"),
    "another zip": (lambda path: write_zip(path, {"a.py": b"1"}), "found an archive of a.py"),
    "LMDB": (lambda path: write_folder(path, {"train/data.mdb": b"x"}), "train/data.mdb: an LMDB database"),
    "a 7z archive": (lambda path: path.write_bytes(b"7z\xbc\xaf\x27\x1c"), "unpack it with 7z x FILE"),
    "a RAR archive": (lambda path: path.write_bytes(b"Rar!\x1a\x07"), "unpack it with unrar x FILE"),
    "zstd": (lambda path: write_folder(path, {"mnist_m.tar.zst": b"\x28\xb5\x2f\xfd"}), "unpack it with zstd -d FILE"),
    "a pipe": (os.mkfifo, "found neither a file nor a folder"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unrecognised_path_is_refused_with_what_was_found_and_the_known_layouts(tmp_path, case):
    make, part = UNKNOWN[case]
    make(tmp_path / "thing")
    message = refusal(tmp_path / "thing")
    assert "unrecognised layout" in message
    assert part in message
    assert "expected one of official, image-folder, csv" in message
    assert message.endswith("pickle (see pack --layouts)")


def test_a_file_whose_name_has_no_split_is_train(tmp_path):
    folder = write_npz(tmp_path / "set", {"train": PARTS["train"]})
    (folder / "train.npz").rename(folder / "arrays.npz")
    assert_same(open_source(str(folder / "arrays.npz")), {"train": PARTS["train"]})


def test_a_packed_set_is_named_as_such(tmp_path):
    folder = write_folder(tmp_path / "set", {"manifest.json": b"{}", "train.index.npy": b""})
    assert "a packed set; train on it with --shards" in refusal(folder)


def test_two_sets_in_one_folder_are_refused_with_both_paths(tmp_path):
    for name in ("a", "b"):
        write_folder(tmp_path / "set" / name, official_files(PARTS))
    message = refusal(tmp_path / "set")
    assert "several sets of images (official: " in message
    assert "set/a/mnist_m; " in message
    assert "set/b/mnist_m)" in message


@pytest.mark.parametrize("forced", ["image-folder", "npz", "pickle"])
def test_a_forced_layout_that_does_not_fit_is_refused(tmp_path, forced):
    folder = write_folder(tmp_path / "set", official_files(PARTS))
    message = refusal(folder, layout=forced)
    assert f"found mnist_m/; expected {forced}: " in message or "52 images without labels" in message
    assert "found a npz file" in refusal(write_npz(tmp_path / "n", PARTS) / "train.npz", layout="pt")


def test_options_that_do_not_fit_a_source_are_refused(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "nothing")
    folder = str(write_folder(tmp_path / "set", official_files(PARTS)))
    for arguments, part in (
        ({"source": folder, "layout": "cifar"}, "--layout cifar: unknown; choose sample"),
        ({"source": "sample", "layout": "npz"}, "--layout npz: only for a path, not for sample"),
        ({"source": "sample", "photos": folder}, "--photos: only for mnist+photos"),
        ({"source": "sample", "mnist": folder}, "--mnist: only for mnist+photos and pickle, not for layout sample"),
        ({"source": folder, "mnist": folder}, "--mnist: only for mnist+photos"),
        ({"source": "mnist+photos", "mnist": folder}, "mnist+photos: add --photos DIR"),
        ({"source": folder, "blends": 2}, "--blends: only for sample and mnist+photos"),
    ):
        with pytest.raises(UserError) as caught:
            open_source(**arguments)
        assert part in str(caught.value)
