"""Every layout of MNIST-M gives the same images and labels, told apart by looking, in bounded memory."""

from __future__ import annotations

import gzip
import io
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from layouts import (
    WRITERS,
    Part,
    course_files,
    image_folder_files,
    noise,
    official_files,
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

from mnistm_dist.data.sources import matlab as mat5
from mnistm_dist.data.sources.base import Sample, Source
from mnistm_dist.data.sources.catalog import KNOWN_LAYOUTS, open_source
from mnistm_dist.errors import UserError

ARCHIVE = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist_m.tar.gz"
PARTS = noise()


def read(source: Source) -> dict[str, Part]:
    """All of a source, in its order, decoded; asserts that each sample is there once."""
    found: dict[str, dict[int, tuple[np.ndarray, int]]] = {split: {} for split in source.splits}
    for sample in source.samples():
        assert (sample.png is None) != (sample.pixels is None)
        pixels = sample.pixels if sample.png is None else np.asarray(Image.open(io.BytesIO(sample.png)))
        assert sample.index not in found[sample.split]
        found[sample.split][sample.index] = pixels, sample.label
    assert {split: list(range(count)) for split, count in source.counts.items()} == {
        split: sorted(samples) for split, samples in found.items()
    }
    return {
        split: Part(
            images=np.stack([samples[place][0] for place in sorted(samples)]),
            labels=np.array([samples[place][1] for place in sorted(samples)]),
        )
        for split, samples in found.items()
    }


def assert_same(source: Source, parts=PARTS, renamed: dict[str, str] | None = None) -> None:
    found = read(source)
    assert list(found) == [(renamed or {}).get(split, split) for split in parts]
    for split, part in parts.items():
        same = found[(renamed or {}).get(split, split)]
        np.testing.assert_array_equal(same.labels, part.labels)
        np.testing.assert_array_equal(same.images, part.images)


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_is_told_by_looking_and_gives_the_same_images_and_labels_in_order(tmp_path, layout):
    path = WRITERS[layout](tmp_path / "set", PARTS)
    mnist = str(write_mnist(tmp_path / "mnist", PARTS)) if layout == "pickle" else None
    for forced in (None, layout):
        source = open_source(str(path), layout=forced, mnist=mnist)
        assert list(source.counts) == list(source.splits)
        assert (source.layout, source.lineage, source.val_size()) == (layout, None, None)
        assert_same(source, renamed={"test": "val"} if layout == "course" else None)


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
@pytest.mark.parametrize("family", ["official", "image"])
def test_a_family_of_layouts_can_be_forced_whatever_holds_it(tmp_path, family, kind):
    path = WRITERS[f"{family}-{kind}"](tmp_path / "set", PARTS)
    assert open_source(str(path), layout=family).layout == f"{family}-{kind}"


def test_every_known_layout_that_is_read_has_a_writer_here():
    families = {"official", "image"}
    assert set(WRITERS) | {"sample", "mnist+photos"} | families == set(KNOWN_LAYOUTS)


@pytest.mark.parametrize("around", ["", "mnist_m/", "a/b/"])
@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_the_official_layout_may_have_up_to_two_folders_around_it(tmp_path, around, kind):
    files = {around + name.removeprefix("mnist_m/"): data for name, data in official_files(PARTS).items()}
    write = {"folder": write_folder, "tar": write_tar, "zip": write_zip}[kind]
    assert_same(open_source(str(write(tmp_path / "set", files))))


@pytest.mark.parametrize("seed", range(3))
def test_members_of_a_tar_may_come_in_any_order(tmp_path, seed):
    files = list(official_files(PARTS).items())
    random.Random(seed).shuffle(files)
    assert_same(open_source(str(write_tar(tmp_path / "set.tar", files, "w"))))


def test_labels_may_come_last_and_test_first(tmp_path):
    files = official_files(PARTS)
    ordered = sorted(files.items(), key=lambda item: (item[0].endswith(".txt"), "test" not in item[0]))
    assert_same(open_source(str(write_tar(tmp_path / "set.tgz", ordered))))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_is_told_by_its_bytes_whatever_it_is_compressed_by_or_named(tmp_path, mode):
    assert_same(open_source(str(write_tar(tmp_path / "download", official_files(PARTS), mode))))


def test_litter_of_operating_systems_and_leading_dots_are_passed_over(tmp_path):
    files = [("./" + name, data) for name, data in official_files(PARTS).items()]
    files += [("./mnist_m/mnist_m_train/._00000000.png", b"x"), ("__MACOSX/mnist_m/x.png", b"x"), ("./.DS_Store", b"")]
    assert_same(open_source(str(write_tar(tmp_path / "set.tar.gz", files))))


def test_a_set_of_train_alone_is_accepted_and_one_of_test_alone_is_not(tmp_path):
    only = {"train": PARTS["train"]}
    assert_same(open_source(str(write_tar(tmp_path / "train.tar.gz", official_files(only)))), only)
    path = write_tar(tmp_path / "test.tar.gz", official_files({"test": PARTS["test"]}))
    with pytest.raises(UserError, match="no train split, only test"):
        open_source(str(path))


@pytest.mark.parametrize(("write", "name"), [(write_pt, "mnist_m_train.pt"), (write_npz, "test.npz")])
def test_one_file_of_a_set_brings_the_others_of_its_set_and_no_foreign_ones(tmp_path, write, name):
    folder = write(tmp_path / "set", PARTS)
    shutil.copy(folder / name, folder / f"other_{name}")
    assert_same(open_source(str(folder / name)))
    with pytest.raises(UserError, match="more than one set of images"):
        open_source(str(folder))


def test_one_parquet_file_brings_the_others(tmp_path):
    folder = write_parquet(tmp_path / "set", PARTS)
    assert_same(open_source(str(folder / "data" / "train-00001-of-00002.parquet")))


def test_the_pickle_that_python_2_wrote_is_read(tmp_path):
    path = write_python2_pickle(tmp_path / "keras", PARTS)
    source = open_source(str(path), mnist=str(write_mnist(tmp_path / "mnist", PARTS, suffix="")))
    assert source.layout == "pickle"
    assert_same(source)


def test_a_pickle_says_that_it_needs_the_labels_of_mnist(tmp_path):
    path = write_python2_pickle(tmp_path / "keras", PARTS)
    with pytest.raises(UserError, match="without labels; give --mnist"):
        open_source(str(path))


@pytest.mark.parametrize("name", ["set.pkl", "set.pickle", "set.pickle.gz"])
def test_a_pickle_of_the_oldest_protocol_is_told_by_its_name(tmp_path, name):
    data = pickle.dumps({split: part.images for split, part in PARTS.items()}, protocol=0)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert_same(open_source(str(tmp_path / name), mnist=str(write_mnist(tmp_path / "mnist", PARTS))))


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_a_course_may_be_packed_and_its_images_may_stand_beside_its_csvs(tmp_path, kind):
    files = {name.replace("/data/", "/"): data for name, data in course_files(PARTS).items()}
    write = {"folder": write_folder, "tar": write_tar, "zip": write_zip}[kind]
    source = open_source(str(write(tmp_path / "set", files)))
    assert (source.layout, source.notes) == ("course", ())
    assert_same(source, renamed={"test": "val"})


def test_images_that_no_csv_names_are_left_out_and_said(tmp_path):
    files = course_files(PARTS)
    files["mnistm/data/private.png"] = next(data for name, data in files.items() if name.endswith(".png"))
    source = open_source(str(write_folder(tmp_path, files)))
    assert source.notes == ("images that no CSV names are left out: 1",)
    assert_same(source, renamed={"test": "val"})


def test_classes_are_spread_evenly_where_names_do_not_tell_the_order(tmp_path):
    files = image_folder_files(PARTS)
    renamed = {str(Path(name).with_name(f"img_{Path(name).name}")): data for name, data in files.items()}
    labels = read(open_source(str(write_folder(tmp_path, renamed))))["train"].labels
    assert sorted(labels[-10:]) == list(range(10))


def test_the_published_size_gives_its_last_4001_as_val_in_any_layout(tmp_path):
    images = np.zeros((59_001, 1, 1, 3), np.uint8)
    part = Part(images=images, labels=np.arange(59_001) % 10)
    for write in (write_npz, write_pt):
        assert open_source(str(write(tmp_path / write.__name__, {"train": part}))).val_size() == 4_001


@pytest.mark.parametrize("index", [-1, 1])
def test_an_image_beyond_the_counted_ones_is_refused(index):
    sample = Sample(split="train", index=index, label=0, png=b"", origin="set: image")
    source = Source(layout="x", description="set", counts={"train": 1}, read=lambda: iter([sample]))
    with pytest.raises(UserError, match="set: image: not there when set was opened"):
        list(source.samples())


def test_a_source_that_changes_after_it_was_opened_is_refused(tmp_path):
    folder = write_folder(tmp_path, official_files(PARTS))
    source = open_source(str(folder))
    gone = folder / "mnist_m" / "mnist_m_train" / "00000007.png"
    gone.unlink()
    with pytest.raises(UserError, match=r"00000007\.png: cannot be read"):
        list(source.samples())
    path = write_tar(tmp_path / "set.tar", official_files(PARTS), "w")
    source = open_source(str(path))
    write_tar(path, official_files({"train": PARTS["train"]}), "w")
    with pytest.raises(UserError, match="12 of 12 test images are gone"):
        list(source.samples())


MEASURE_PEAK = """
import sys, tracemalloc
from mnistm_dist.data.sources.catalog import open_source
tracemalloc.start()
count = sum(1 for _ in open_source(sys.argv[1]).samples())
print(count, tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_memory_does_not_grow_with_the_images(tmp_path, environment, kind):
    parts = noise({"train": 600}, side=60)
    files = official_files(parts)
    write = {"folder": write_folder, "tar": write_tar, "zip": write_zip}[kind]
    path = write(tmp_path / "set", files)
    total = sum(map(len, files.values()))
    # In a process of its own: pathlib interns every name, and the table of a whole suite's interned strings, when it is
    # its turn to be enlarged, takes megabytes at once.
    command = [sys.executable, "-c", MEASURE_PEAK, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    count, peak = map(int, done.stdout.split())
    assert count == 600
    assert peak < total / 4, f"{peak} bytes at the peak for {total} bytes of images"


def test_memory_does_not_grow_with_a_parquet_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = {"bytes": bytes(range(256)) * 400, "path": None}
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()})
    with pq.ParquetWriter(tmp_path / "train.parquet", schema, compression="none", use_dictionary=False) as writer:
        for _ in range(40):
            writer.write_table(pa.table({"image": [image] * 10, "label": [1] * 10}, schema=schema))
    source = open_source(str(tmp_path / "train.parquet"))
    peaks = [pa.total_allocated_bytes() for _ in source.samples()]
    assert len(peaks) == 400
    assert max(peaks) - peaks[0] < 40 * 10 * len(image["bytes"]) / 4


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
    others = {
        "text": "x",
        "complex": np.array([1 + 2j]),
        "cell": np.array([[1], ["a"]], dtype=object),
        "struct": {"q": 1},
    }
    file = tmp_path / "set.mat"
    savemat(file, arrays | others, do_compression=compressed)
    found, expected = mat5.variables(file), loadmat(file)
    assert set(found) == set(arrays)
    for name, variable in found.items():
        read_again = mat5.read(file, variable)
        assert read_again.dtype == expected[name].dtype
        np.testing.assert_array_equal(read_again, expected[name])


@pytest.mark.parametrize(("layout", "library"), [("parquet", "pyarrow.parquet"), ("hdf5", "h5py")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, layout, library):
    path = WRITERS[layout](tmp_path / "set", PARTS)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=r'needs \w+: pip install "mnistm-dist\[formats\]"'):
        open_source(str(path))


@pytest.mark.skipif(not ARCHIVE.exists(), reason="the official archive is not in ../shared/data")
def test_the_official_archive_is_known_by_looking():
    source = open_source(str(ARCHIVE))
    assert (source.layout, source.val_size()) == ("official-tar", 4_001)
    assert source.counts == {"train": 59_001, "test": 9_001}
