"""Packing: the same bytes on every machine, every image once, broken images refused."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_sets import label_of, names_in, pixels_of, png_with, tiny_source
from PIL import ExifTags, Image

from mnistm_dist.data.image_io import decode_png, encode_png, to_rgb
from mnistm_dist.data.packing.splits import count_shards, cut_splits
from mnistm_dist.data.packing.statistics import OFFICIAL_PIXELS, channel_histogram, find_lineage, moments_of
from mnistm_dist.data.packing.writer import pack, tar_member
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.data.sources.base import Sample, Source
from mnistm_dist.errors import UserError


def bytes_of(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def with_pngs(source: Source) -> Iterator[tuple[str, int, bytes]]:
    """Split, place and PNG bytes of every sample of a source."""
    for sample in source.samples():
        assert sample.encoded is not None
        yield sample.split, sample.index, sample.encoded


def test_stock_webdataset_reads_every_image_and_label(tmp_path: Path) -> None:
    import webdataset as wds

    manifest = pack(tiny_source(), tmp_path / "set", num_shards=4)
    for split, source_split in (("train", "train"), ("val", "train"), ("test", "test")):
        urls = [str(tmp_path / "set" / shard.name) for shard in manifest.splits[split].shards]
        dataset = wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "png", "cls")
        samples = list(dataset)
        assert len(samples) == manifest.splits[split].count
        for key, image, label in samples:
            index = int(key.lstrip("t"))
            assert np.array_equal(np.asarray(image), pixels_of(source_split, index))
            assert label == label_of(source_split, index)


def test_pngs_are_kept_byte_for_byte(tmp_path: Path) -> None:
    pack(tiny_source(), tmp_path / "set", num_shards=2)
    shards = ShardSet.open(tmp_path / "set")
    kept = {}
    for split in shards.manifest.splits:
        ids = range(shards.split(split).count)
        kept.update(zip(shards.keys(split, ids), shards.read(split, ids), strict=True))
    given_pngs = {f"{'t' if split == 'test' else ''}{i:08d}": png for split, i, png in with_pngs(tiny_source())}
    assert kept == given_pngs


def test_the_same_pngs_give_the_same_bytes_and_another_seed_another_order(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pack(tiny_source(), tmp_path / name, seed=seed)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    orders = [ShardSet.open(tmp_path / name).keys("train", range(21)) for name in ("a", "c")]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


DOT = bytes.fromhex(  # 2 x 2 pixels, written out: what an encoder makes depends on its version
    "89504e470d0a1a0a0000000d4948445200000002000000020802000000fdd49a730000001949444154780101"
    "0e00f1ff000a141e0a141e000a141e0a141e064e00f18eccbab90000000049454e44ae426082"
)


GOLDEN = {
    "manifest.json": "ad6375365d54",
    "test-000000.tar": "d1acc5d0089b",
    "test.index.npy": "5888e9676b3a",
    "train-000000.tar": "d777b78fecb7",
    "train-000001.tar": "0012105052b4",
    "train.index.npy": "2280c7920dd4",
    "val-000000.tar": "47e412afddbf",
    "val.index.npy": "8b5a637d1455",
}


def test_the_bytes_of_a_packed_set_are_golden(tmp_path: Path) -> None:
    source = tiny_source(train=12, test=3, spoil=lambda sample: replace(sample, encoded=DOT))
    pack(source, tmp_path / "set", num_shards=2)
    assert {name: digest[:12] for name, digest in bytes_of(tmp_path / "set").items()} == GOLDEN


def test_arrays_are_packed_to_the_same_pixels(tmp_path: Path) -> None:
    of_arrays = pack(tiny_source(arrays=True), tmp_path / "arrays")
    of_pngs = pack(tiny_source(), tmp_path / "pngs")
    assert of_arrays.pixels_sha256 == of_pngs.pixels_sha256
    png = ShardSet.open(tmp_path / "arrays").read("test", [0])[0]
    key = ShardSet.open(tmp_path / "arrays").keys("test", [0])[0]
    assert np.array_equal(decode_png(png, key), pixels_of("test", int(key[1:])))


def test_shards_are_balanced_and_their_neighbours_are_not_neighbours_in_the_source(tmp_path: Path) -> None:
    manifest = pack(tiny_source(train=211, test=50, size=(2, 2)), tmp_path / "set", num_shards=8)
    for split in manifest.splits.values():
        counts = [shard.count for shard in split.shards]
        assert max(counts) - min(counts) <= 1
    assert [len(split.shards) for split in manifest.splits.values()] == [8, 1, 2]
    numbers = np.array([int(key) for key in ShardSet.open(tmp_path / "set").keys("train", range(190))])
    assert (np.abs(np.diff(numbers)) == 1).mean() < 0.05


def test_keys_count_through_train_and_val_in_the_sources_order(tmp_path: Path) -> None:
    pack(tiny_source(train=20, val=6), tmp_path / "set")
    shards = ShardSet.open(tmp_path / "set")
    keys = {split: sorted(shards.keys(split, range(shards.split(split).count))) for split in shards.manifest.splits}
    assert keys["train"] == [f"{number:08d}" for number in range(20)]
    assert keys["val"] == [f"{number:08d}" for number in range(20, 26)]
    assert keys["test"] == [f"t{number:08d}" for number in range(7)]
    val = shards.keys("val", range(6))
    images = [decode_png(png, "here") for png in shards.read("val", range(6))]
    assert all(np.array_equal(image, pixels_of("val", int(key) - 20)) for key, image in zip(val, images, strict=True))


def test_the_manifest_has_the_hashes_moments_and_class_counts_of_the_images(tmp_path: Path) -> None:
    manifest = pack(tiny_source(), tmp_path / "set")
    train = np.stack([pixels_of("train", index) for index in range(23)])
    test = np.stack([pixels_of("test", index) for index in range(7)])
    assert manifest.pixels_sha256 == {
        "train+val": hashlib.sha256(train.tobytes()).hexdigest(),
        "test": hashlib.sha256(test.tobytes()).hexdigest(),
    }
    for name, images, labels in (
        ("train", train[:21], [label_of("train", i) for i in range(21)]),
        ("val", train[21:], [label_of("train", i) for i in range(21, 23)]),
        ("test", test, [label_of("test", i) for i in range(7)]),
    ):
        split = manifest.splits[name]
        assert split.pixels_sha256 == hashlib.sha256(images.tobytes()).hexdigest()
        assert split.class_counts == tuple(np.bincount(labels, minlength=10).tolist())
        assert np.allclose(split.mean, images.mean((0, 1, 2)) / 255, rtol=0, atol=1e-12)
        assert np.allclose(split.std, images.std((0, 1, 2)) / 255, rtol=0, atol=1e-12)
    assert (manifest.lineage, manifest.image_size, manifest.classes) == ("unknown", (32, 32), tuple("0123456789"))


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.integers(0, 255), min_size=1, max_size=50))
def test_mean_and_std_equal_numpys(values: list[int]) -> None:
    pixels = np.repeat(np.array(values, dtype=np.uint8)[:, None], 3, axis=1)
    means, stds = moments_of(channel_histogram(pixels))
    assert np.allclose(means, np.mean(values) / 255, rtol=0, atol=1e-12)
    assert np.allclose(stds, np.std(values) / 255, rtol=0, atol=1e-12)


def test_the_official_train_gives_55000_and_4001_others_a_tenth() -> None:
    def sizes(source: Source, val_size: int | None = None) -> list[int]:
        return [part.count for part in cut_splits(source, val_size).values()]

    assert sizes(tiny_source(59_001, 9_001)) == [55_000, 4_001, 9_001]
    assert sizes(tiny_source(59_001, 9_001), 9_001) == [50_000, 9_001, 9_001]
    assert sizes(tiny_source(59_000, 0)) == [53_100, 5_900]
    assert sizes(tiny_source(2, 0)) == [1, 1]
    assert sizes(tiny_source(30, 5, 7)) == [30, 7, 5]


@pytest.mark.parametrize(
    ("source", "val_size", "named"),
    [
        (tiny_source(10), 0, "val size 0 of 10"),
        (tiny_source(10), 10, "1 to 9"),
        (tiny_source(10), -1, "1 to 9"),
        (tiny_source(1), None, "at least 2"),
        (tiny_source(10, 0, 5), 3, "its own val split"),
        (tiny_source(0, 5), None, "no training images"),
    ],
)
def test_splits_that_cannot_be_cut_are_refused(
    tmp_path: Path, source: Source, val_size: int | None, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        pack(source, tmp_path / "set", val_size=val_size)
    assert names_in(tmp_path) == []


@given(train=st.integers(1, 10**8), other=st.integers(1, 10**8), shards=st.integers(1, 10**5))
def test_every_split_has_a_shard_and_every_shard_a_sample(train: int, other: int, shards: int) -> None:
    part = replace(cut_splits(tiny_source(20))["val"], count=other)
    whole = replace(part, count=train)
    assert 1 <= count_shards(part, whole, shards) <= other
    assert count_shards(whole, whole, shards) == min(shards, train)


def test_only_the_hashes_make_a_set_official() -> None:
    labels = {"train+val": np.zeros(3, dtype=np.int32)}
    other = {"train+val": "0" * 64}
    assert find_lineage(other, labels, None) == "unknown"
    assert find_lineage(other, labels, "official") == "unknown"
    assert find_lineage(other, labels, "regenerated") == "regenerated"
    assert find_lineage(OFFICIAL_PIXELS, labels, None) == "unknown", "its labels are not the official ones"


def spoiled(png: bytes) -> Callable[[Sample], Sample]:
    return lambda sample: replace(sample, encoded=png) if (sample.split, sample.index) == ("train", 5) else sample


GOOD = encode_png(pixels_of("train", 5))


def as_file(form: str, mode: str = "RGB", **options: object) -> bytes:
    """The image of `spoiled` in another format."""
    target = io.BytesIO()
    Image.fromarray(pixels_of("train", 5)).convert(mode).save(target, form, **options)
    return target.getvalue()


GREY = as_file("PNG", "L")
BAD_PNGS = {
    "bomb": png_with(50_000, 50_000, 8, 2),
    "text": b"I am no image, I am a text, and a long one",
    "empty": b"",
    "grey, one byte changed": GREY[:60] + bytes([GREY[60] ^ 1]) + GREY[61:],
    "a JPEG, cut": as_file("JPEG")[:-200],
    "a GIF bomb": b"GIF89a" + b"\xff" * 4 + bytes(20),
    "another size": png_with(28, 28, 8, 2),
    "cut": GOOD[:-20],
    "one byte changed": GOOD[:100] + bytes([GOOD[100] ^ 1]) + GOOD[101:],
}


@pytest.mark.parametrize("png", BAD_PNGS.values(), ids=BAD_PNGS)
def test_a_bad_image_is_named_and_leaves_nothing_behind(tmp_path: Path, png: bytes) -> None:
    with pytest.raises(UserError, match=r"noise: train/5\.png") as error:
        pack(tiny_source(spoil=spoiled(png)), tmp_path / "new" / "set")
    assert "\n" not in str(error.value)
    assert names_in(tmp_path) == []


def upright() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return as_file("JPEG", exif=exif, quality=95)


OTHER_FILES = {
    "JPEG RGB": as_file("JPEG", quality=95),
    "JPEG L": as_file("JPEG", "L"),
    "JPEG CMYK": as_file("JPEG", "CMYK"),
    "JPEG RGB turned": upright(),
    "WEBP RGB": as_file("WEBP", lossless=True),
    "PNG L": GREY,
    "PNG P": as_file("PNG", "P"),
    "PNG RGBA": as_file("PNG", "RGBA"),
    "PNG I;16": as_file("PNG", "I;16"),
    "PNG 1": as_file("PNG", "1"),
    "GIF P": as_file("GIF"),
    "BMP RGB": as_file("BMP"),
}


@pytest.mark.parametrize("form", OTHER_FILES)
def test_another_image_file_becomes_an_rgb_png_with_a_note(tmp_path: Path, form: str) -> None:
    data = OTHER_FILES[form]
    manifest = pack(tiny_source(spoil=spoiled(data)), tmp_path / "set")
    shards = ShardSet.open(tmp_path / "set")
    row = shards.keys("train", np.arange(manifest.splits["train"].count)).index("00000005")
    expected = to_rgb(Image.open(io.BytesIO(data)), form)
    assert np.array_equal(shards.images("train", [row])[0], expected)
    if form in ("WEBP RGB", "PNG RGBA", "BMP RGB"):
        assert np.array_equal(expected, pixels_of("train", 5))
    (note,) = manifest.notes
    assert note.startswith(f"converted to 8-bit RGB PNG: 1 {form.removesuffix(' turned')}; 0.0 MB became")


def test_resize_scales_the_short_side_and_crops_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    source = tiny_source(spoil=spoiled(encode_png(wide)))
    with pytest.raises(UserError, match=r"all images of a set have one size: add --resize N"):
        pack(source, tmp_path / "no")
    pack(source, tmp_path / "set", resize=32)
    shards = ShardSet.open(tmp_path / "set")
    keys = shards.keys("train", np.arange(len(shards.index("train"))))
    images = shards.images("train", np.arange(len(keys)))
    assert (images[keys.index("00000005")] == 200).mean() > 0.9
    same = keys.index("00000004")  # of this size already: its bytes are kept
    assert shards.read("train", [same]) == [encode_png(pixels_of("train", 4))]


def test_a_photo_larger_than_a_set_may_have_is_refused_with_the_flag_that_shrinks_it(tmp_path: Path) -> None:
    target = io.BytesIO()
    Image.new("RGB", (1500, 1100)).save(target, "JPEG")
    with pytest.raises(UserError, match=r"1100 x 1500 pixels; accepted are 1 to 1,024 a side: add --resize N"):
        pack(tiny_source(spoil=spoiled(target.getvalue())), tmp_path / "set")
    pack(tiny_source(spoil=spoiled(target.getvalue())), tmp_path / "set", resize=16)


def test_a_png_that_is_found_broken_only_when_decoded_is_named(tmp_path: Path) -> None:
    broken = png_with(32, 100, 8, 2)  # it holds 64 rows
    source = tiny_source(size=(100, 32), spoil=spoiled(broken))
    with pytest.raises(UserError, match=r"noise: train/5\.png: damaged or not an 8-bit RGB PNG"):
        pack(source, tmp_path / "set")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("label", [10, -1, 2**40])
def test_a_label_that_is_not_a_class_is_named(tmp_path: Path, label: int) -> None:
    with pytest.raises(UserError, match=rf"noise: .*label {label}"):
        pack(tiny_source(spoil=lambda sample: replace(sample, label=label)), tmp_path / "set")
    assert names_in(tmp_path) == []


def test_samples_that_are_missing_or_too_many_are_refused(tmp_path: Path) -> None:
    source = tiny_source()
    samples = list(source.samples())
    for given_samples in (samples[1:], [*samples, samples[3]], [*samples, replace(samples[0], index=99)]):
        with pytest.raises(UserError, match="noise"):
            pack(replace(source, read=lambda given=given_samples: iter(given)), tmp_path / "set")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("pixels", [np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3), np.float32)])
def test_arrays_of_another_kind_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises(UserError, match="accepted is uint8"):
        pack(tiny_source(arrays=True, spoil=lambda sample: replace(sample, pixels=pixels)), tmp_path / "set")


def test_progress_never_decreases_and_ends_at_the_number_of_images(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    pack(tiny_source(), tmp_path / "set", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (30, 30)
    assert {total for _, total in seen} == {30}


@settings(max_examples=50, deadline=None)
@given(key=st.from_regex(r"[a-z0-9]{1,90}", fullmatch=True), size=st.integers(0, 2000))
def test_tarfile_reads_a_tar_header_as_it_was_written(key: str, size: int) -> None:
    member = tar_member(f"{key}.png".encode(), bytes(size))
    info = tarfile.TarInfo.frombuf(member[:512], "ascii", "strict")
    assert (info.name, info.size, info.type) == (f"{key}.png", size, tarfile.REGTYPE)
    assert len(member) % 512 == 0
    assert (info.mode, info.uid, info.gid, info.mtime, info.uname, info.gname) == (0o644, 0, 0, 0, "", "")


def test_the_tar_program_lists_a_shard(tiny_set: Path) -> None:
    listed = subprocess.run(["tar", "tf", tiny_set / "val-000000.tar"], capture_output=True, text=True, check=True)
    assert sorted(listed.stdout.split()) == ["00000021.cls", "00000021.png", "00000022.cls", "00000022.png"]
    assert listed.stderr == ""
