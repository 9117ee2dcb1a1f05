"""MNIST over photos is MNIST-M: by its formula, a function of the seed alone, with the counts of the source report."""

from __future__ import annotations

import hashlib
import os
import resource
import struct
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import noise, write_mnist
from packed_sets import SHARED
from PIL import Image

from mnistm_dist.data.hashing import uniform
from mnistm_dist.data.packing.verify import inspect
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.shards import OK, ShardSet
from mnistm_dist.data.sources.catalog import Source, open_source
from mnistm_dist.data.sources.synthesis import blend, read_digits, read_photos
from mnistm_dist.errors import UserError

PARTS = noise({"train": 60, "test": 12})


def pixels_sha256(source: Source) -> str:
    digest = hashlib.sha256()
    for sample in source.samples():
        assert sample.pixels is not None
        digest.update(sample.pixels.tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three photos of noise, one of them no larger than a digit."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(2)
    for name, size in (("b.png", (40, 50)), ("a.png", (28, 28)), ("c.PNG", (31, 90))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def mnist(tmp_path_factory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("mnist"), PARTS)


def test_the_sample_is_the_same_on_every_machine():
    sample = open_source("sample")
    assert (sample.layout, sample.lineage, sample.val_size()) == ("sample", "regenerated", None)
    assert sample.counts == {"train": 8_000, "val": 2_000}
    assert pixels_sha256(sample) == "2baac763fb06306e8670b2f3d9eddceefcdb39caa6edefaaafff328eb5bac48d"


def test_another_seed_gives_other_pixels_and_the_same_labels():
    one, two = (list(open_source("sample", seed=seed).samples()) for seed in (0, 1))
    assert [sample.label for sample in one] == [sample.label for sample in two]
    assert sum(np.array_equal(a.pixels, b.pixels) for a, b in zip(one, two, strict=True)) < 100


def test_every_class_is_in_both_splits_of_the_sample_in_about_equal_numbers():
    samples = list(open_source("sample").samples())
    for split in ("train", "val"):
        share = np.bincount([s.label for s in samples if s.split == split], minlength=10) / 1_000
        assert (share / share.sum() > 0.08).all()


def test_the_bundled_ingredients_are_small_and_each_has_its_origin_and_licence():
    folder = Path(str(files("mnistm_dist") / "data" / "sample"))
    names = {file.name for file in folder.iterdir()} - {"SOURCES.md"}
    assert sum((folder / name).stat().st_size for name in names) < 4_000_000
    text = (folder / "SOURCES.md").read_text()
    assert all(f"`{name}`" in text for name in names)
    assert len([name for name in names if name.endswith(".png")]) >= 7
    for line in text.splitlines():
        if line.startswith("| `"):
            assert any(licence in line for licence in ("public domain", "CC0", "CC BY 2.0", "CC BY-SA 3.0")), line


@pytest.mark.skipif(not SHARED.exists(), reason="MNIST is not in ../shared/data")
def test_the_bundled_digits_are_the_first_10_000_of_mnist():
    whole = read_digits(SHARED / "mnist", "train")
    bundled = read_digits(files("mnistm_dist") / "data" / "sample", "train")
    for result, expected in zip(bundled, whole, strict=True):
        np.testing.assert_array_equal(result, expected[:10_000])


def test_a_blend_is_patch_minus_digit_in_absolute_value_as_a_plain_loop_does_it(photos, mnist):
    pool, digits = read_photos(photos, min_size=28), read_digits(mnist, "train")[0]
    decoded = [np.asarray(Image.open(photos / name)).astype(int) for name in ("a.png", "b.png", "c.PNG")]
    assert pool.sizes.tolist() == [[28, 28], [40, 50], [31, 90]]
    result = blend(digits, pool, seed=9, positions=np.arange(len(digits)))
    draws = uniform(9, np.arange(len(digits)), 3).astype(float)
    for digit, blended, (photo, top, left) in zip(digits, result, draws, strict=True):
        chosen = decoded[int(photo * 3)]
        y, x = int(top * (chosen.shape[0] - 27)), int(left * (chosen.shape[1] - 27))
        binarised = np.where(digit > 0, 255, 0)[..., None]
        np.testing.assert_array_equal(blended, np.abs(chosen[y : y + 28, x : x + 28] - binarised))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**63 - 1), start=st.integers(0, 2**40), cut=st.integers(0, 30))
def test_an_image_depends_on_seed_and_position_alone_not_on_its_chunk(photos, seed, start, cut):
    pool, digits = read_photos(photos, min_size=28), PARTS["train"].images[:30, ..., 0]
    positions = start + np.arange(30)
    parts = [blend(digits[at], pool, seed=seed, positions=positions[at]) for at in (slice(cut), slice(cut, None))]
    np.testing.assert_array_equal(blend(digits, pool, seed=seed, positions=positions), np.concatenate(parts))


def test_patches_come_from_every_photo_and_reach_every_edge(photos):
    pool = read_photos(photos, min_size=28)
    result = blend(np.zeros((3_000, 28, 28), np.uint8), pool, seed=0, positions=np.arange(3_000))
    for photo in (np.asarray(Image.open(photos / name)) for name in ("a.png", "b.png", "c.PNG")):
        for corner in (photo[:28, :28], photo[:28, -28:], photo[-28:, :28], photo[-28:, -28:]):
            assert (result == corner).all(axis=(1, 2, 3)).any()


def test_grey_photos_are_converted_to_rgb_and_small_or_broken_ones_are_skipped_with_a_note(tmp_path, mnist):
    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 256, (60, 60), np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(rng.integers(0, 256, (60, 60, 4), np.uint8)).save(tmp_path / "alpha.png")
    Image.fromarray(rng.integers(0, 256, (27, 90, 3), np.uint8)).save(tmp_path / "low.jpg")
    (tmp_path / "text.jpg").write_text("no photo")
    (tmp_path / "cut.png").write_bytes((tmp_path / "grey.png").read_bytes()[:900])
    Image.fromarray(rng.integers(0, 256, (60, 60, 3), np.uint8)).save(tmp_path / "changed.tif")
    changed = bytearray((tmp_path / "changed.tif").read_bytes())
    changed[changed.index(b"\x16\x01\x04\x00") + 2] = 10  # rows of a strip, given as a fraction: Pillow's TypeError
    (tmp_path / "changed.tif").write_bytes(changed)
    (tmp_path / "README.txt").write_text("not a photo")
    source = open_source("mnist+photos", mnist=str(mnist), photos=str(tmp_path))
    assert source.description.endswith("over 2 photos")
    notes = "\n".join(source.notes)
    assert len(source.notes) == 4
    assert "photo changed.tif left out: " in notes
    assert "photo low.jpg left out: 90 x 27 pixels, smaller than a digit of 28" in notes
    assert "photo cut.png left out: " in notes
    assert "photo text.jpg left out: cannot identify" in notes
    assert sum(1 for _ in source.samples()) == 72


def test_a_file_that_is_no_photo_is_not_run_and_a_pipe_is_not_read(tmp_path, mnist):
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 60\nshowpage\n")
    os.mkfifo(tmp_path / "pipe.png")
    (note,) = open_source("mnist+photos", mnist=str(mnist), photos=str(tmp_path)).notes
    assert note.startswith("photo program.jpg left out: cannot identify")
    with pytest.raises(UserError, match=r"a\.png: cannot be read"):
        open_source("mnist+photos", mnist=str(mnist), photos=str(tmp_path / "a.png"))


def test_mnist_of_two_image_sizes_or_without_pixels_is_refused(tmp_path, photos):
    both = noise({"train": 60, "test": 12})
    other = noise({"train": 60, "test": 12}, side=30)
    write_mnist(tmp_path, {"train": both["train"], "test": other["test"]}, suffix="")
    with pytest.raises(UserError, match="damaged or not MNIST"):
        open_source("mnist+photos", mnist=str(tmp_path), photos=str(photos))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 12, 0, 0))
    with pytest.raises(UserError, match=r"its data do not fit its shape \(12, 0, 0\)"):
        open_source("mnist+photos", mnist=str(tmp_path), photos=str(photos))


def test_the_sample_takes_more_blends():
    with pytest.raises(UserError, match="found 0 train, 2000 val images"):
        open_source("sample", blends=0)
    sample = open_source("sample", blends=2)
    assert sample.counts == {"train": 16_000, "val": 2_000}
    assert sum(1 for _ in sample.samples()) == 18_000


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ((), "no usable photo (no file named .bmp"),
        (("a.jpg", "b.jpg"), "no usable photo (photo a.jpg left out: cannot identify"),
    ],
)
def test_a_folder_without_a_usable_photo_is_refused(tmp_path, mnist, names, reason):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        open_source("mnist+photos", mnist=str(mnist), photos=str(tmp_path))
    assert reason in str(caught.value)
    with pytest.raises(UserError, match=r"none: cannot be read \(No such file"):
        open_source("mnist+photos", mnist=str(mnist), photos=str(tmp_path / "none"))


def test_a_gigapixel_photo_is_skipped_without_decoding(tmp_path, photos, mnist):
    (tmp_path / "a.png").write_bytes((photos / "b.png").read_bytes())
    bomb = bytearray((photos / "b.png").read_bytes())
    bomb[16:24] = (40_000).to_bytes(4, "big") * 2
    (tmp_path / "bomb.png").write_bytes(bomb)
    notes = open_source("mnist+photos", mnist=str(mnist), photos=str(tmp_path)).notes
    assert [note[:25] for note in notes] == ["photo bomb.png left out: "]


def test_a_full_disk_is_explained(photos):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written \(File too large\); set \$TMPDIR to another folder"):
            read_photos(photos, min_size=28)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_small_mnist_is_split_like_the_full_one(photos, mnist):
    source = open_source("mnist+photos", mnist=str(mnist), photos=str(photos))
    assert source.counts == {"train": 55, "val": 5 + 12}
    samples = list(source.samples())
    labels = np.concatenate([PARTS["train"].labels, PARTS["test"].labels])
    assert [sample.label for sample in samples] == labels.tolist()
    assert [(s.split, s.index) for s in samples[54:57]] == [("train", 54), ("val", 0), ("val", 1)]


def test_more_blends_give_each_training_digit_other_patches_and_keep_the_rest(tmp_path, mnist):
    photo = np.random.default_rng(4).integers(0, 256, (300, 300, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "of many places.png")

    def images(blends: int) -> dict[tuple[str, int], tuple[int, bytes]]:
        source = open_source("mnist+photos", mnist=str(mnist), photos=str(tmp_path), blends=blends)
        samples = list(source.samples())
        assert len(samples) == sum(source.counts.values())
        return {(s.split, s.index): (s.label, s.pixels.tobytes()) for s in samples}

    once, thrice = images(1), images(3)
    assert len(thrice) == 3 * 55 + 17
    assert once.items() <= thrice.items()
    for digit in range(55):
        blends = [thrice["train", digit + 55 * number] for number in range(3)]
        assert len({label for label, _ in blends}) == 1
        assert len({pixels for _, pixels in blends}) == 3
    assert len({pixels for _, pixels in thrice.values()}) == len(thrice)


def test_more_blends_are_packed_and_val_is_unchanged(tmp_path, photos, mnist):
    packed = []
    for blends in (1, 2):
        source = open_source("mnist+photos", mnist=str(mnist), photos=str(photos), blends=blends)
        packed.append(pack(source, tmp_path / f"set{blends}", num_shards=2))
        result = inspect(ShardSet.open(tmp_path / f"set{blends}"))
        assert [finding for finding in result if finding.status != OK] == []
    once, twice = (manifest.splits for manifest in packed)
    assert twice["train"].count == 2 * once["train"].count
    assert twice["val"].pixels_sha256 == once["val"].pixels_sha256
    assert twice["train"].pixels_sha256 != once["train"].pixels_sha256


@pytest.mark.skipif(not SHARED.exists(), reason="MNIST and photos are not in ../shared/data")
def test_mnist_gives_55_000_train_and_15_000_val():
    source = open_source("mnist+photos", mnist=str(SHARED / "mnist"), photos=str(SHARED / "photos"))
    assert source.counts == {"train": 55_000, "val": 15_000}
    assert (source.lineage, source.notes, source.val_size()) == ("regenerated", (), None)
