"""Batches: the same from memory and from disk with any number of workers, and damaged shards are named."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAIN
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_sets import damage_by_flip_with_times_put_back, flip_byte, png_with, sign_files, tiny_source

from mnistm_dist.config import DataConfig, StepsConfig
from mnistm_dist.data import shards as shards_module
from mnistm_dist.data.fetch import open_shards
from mnistm_dist.data.image_io import decode_png
from mnistm_dist.data.loader import Batch, Reader, evaluation_batches, train_batches
from mnistm_dist.data.manifest import Manifest
from mnistm_dist.data.order import FullOrder, Order, WindowedOrder, choose_reading, create_order
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.resident import open_resident
from mnistm_dist.data.shard_reader import SplitReader
from mnistm_dist.data.shards import Block, ShardSet
from mnistm_dist.data.streaming import open_streaming
from mnistm_dist.errors import UserError

OPEN = {"resident": open_resident, "streaming": open_streaming}


def opened(kind: str, folder: Path, cache_dir: Path, split: str = "train", workers: int = 2) -> Reader:
    shards = open_shards(str(folder), cache_dir=cache_dir)
    return OPEN[kind](shards, split, cache_dir=cache_dir, device="cpu", workers=workers)


def windowed(folder: Path, *, batch_size: int = 24, streams: int = 4, window: int = 16, seed: int = 5) -> WindowedOrder:
    counts = [shard.count for shard in ShardSet.open(folder).manifest.splits["train"].shards]
    return WindowedOrder(shard_counts=counts, seed=seed, batch_size=batch_size, streams=streams, window=window)


@dataclass(frozen=True)
class Truth:
    """The images of a packed set, read sample by sample."""

    images: np.ndarray
    labels: np.ndarray

    @staticmethod
    def of(folder: Path, split: str = "train") -> Truth:
        shards = ShardSet.open(folder)
        pngs = shards.read(split, range(shards.manifest.splits[split].count))
        return Truth(np.stack([decode_png(png, "a sample") for png in pngs]), shards.labels(split))

    def has(self, batch: Batch, order: Order) -> bool:
        """Return whether a batch holds the images of its positions."""
        ids = order.ids(batch.positions)
        return (
            np.array_equal(batch.ids, ids)
            and np.array_equal(batch.images.cpu().numpy(), self.images[ids])
            and np.array_equal(batch.labels.cpu().numpy(), self.labels[ids])
        )


@pytest.fixture(scope="module")
def truth(small_set) -> Truth:
    return Truth.of(small_set)


@pytest.mark.parametrize("kind", OPEN)
def test_gather_gives_the_images_and_labels_of_the_shards(kind, small_set, tmp_path):
    shards = ShardSet.open(small_set)
    for split, entry in shards.manifest.splits.items():
        reader, truth = opened(kind, small_set, tmp_path, split), Truth.of(small_set, split)
        ids = np.random.default_rng(1).permutation(entry.count)
        images, labels = reader.gather(ids)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert np.array_equal(images.numpy(), truth.images[ids])
        assert np.array_equal(labels.numpy(), truth.labels[ids])
        assert reader.size == entry.count


@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize("size", [(32, 32), (5, 7), (110, 120)])
def test_images_of_any_size_are_read(kind, size, tmp_path):
    pack(tiny_source(train=13, test=2, size=size), tmp_path / "set", num_shards=2, val_size=1)
    truth = Truth.of(tmp_path / "set")
    order = windowed(tmp_path / "set", batch_size=6, streams=2, window=3)
    reader = opened(kind, tmp_path / "set", tmp_path / "cache")
    for step in train_batches(reader, order, batch_size=6, micro_batch=6, stop_step=4):
        assert truth.has(step[0], order)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_both_readers_follow_the_order_at_any_world_size_workers_and_start(
    workers, world_size, small_set, truth, cache_dir
):
    order = windowed(small_set)
    readers = [opened(kind, small_set, cache_dir, workers=workers) for kind in OPEN]
    epoch = -(-TRAIN // 24)
    assert TRAIN % 24  # epochs end within a batch
    for start, stop in ((0, 2 * epoch + 1), (epoch - 1, epoch + 2), (1_000_003, 1_000_005)):
        for reader in readers:
            ranks = [
                list(
                    train_batches(
                        reader,
                        order,
                        batch_size=24,
                        micro_batch=3,
                        world_size=world_size,
                        rank=rank,
                        start_step=start,
                        stop_step=stop,
                    )
                )
                for rank in range(world_size)
            ]
            for step, shares in enumerate(zip(*ranks, strict=True), start=start):
                positions = np.concatenate([batch.positions for share in shares for batch in share])
                assert positions.tolist() == list(range(step * 24, (step + 1) * 24))
                assert {len(share) for share in shares} <= {8 // world_size, -(-8 // world_size)}
                assert all(truth.has(batch, order) for share in shares for batch in share)


def test_the_full_order_requires_the_resident_reader(small_set, truth, cache_dir):
    order = FullOrder(size=TRAIN, seed=3)
    resident = opened("resident", small_set, cache_dir)
    seen = [b for step in train_batches(resident, order, batch_size=40, micro_batch=20, stop_step=8) for b in step]
    assert all(truth.has(batch, order) for batch in seen)
    assert sorted(np.concatenate([batch.ids for batch in seen]).tolist()) == list(range(TRAIN))
    with pytest.raises(UserError, match="--order windowed, or --reader resident"):
        next(train_batches(opened("streaming", small_set, cache_dir), order, batch_size=4, micro_batch=4, stop_step=1))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_streaming_equals_resident_for_any_order(data, small_set, cache_dir):
    streams = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
    batch = streams * data.draw(st.integers(1, 90))
    window = data.draw(st.sampled_from([1, 2, 9, 50, 4096]))
    order = windowed(small_set, batch_size=batch, streams=streams, window=window, seed=data.draw(st.integers(0, 99)))
    start = data.draw(st.integers(0, 50))
    arguments = {"batch_size": batch, "micro_batch": batch, "start_step": start, "stop_step": start + 4}
    readers = [opened(kind, small_set, cache_dir) for kind in OPEN]
    for (a,), (b,) in zip(*(train_batches(reader, order, **arguments) for reader in readers), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.ids.tolist() == b.ids.tolist() == order.ids(a.positions).tolist()


@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_each_image_once_in_canonical_batches(kind, world_size, small_set, cache_dir):
    reader, truth = opened(kind, small_set, cache_dir, "val"), Truth.of(small_set, "val")
    ranks = [list(evaluation_batches(reader, batch_size=25, world_size=world_size, rank=r)) for r in range(world_size)]
    for rank, batches in enumerate(ranks):
        assert [batch.ids[0] // 25 for batch in batches] == list(range(rank, 4, world_size))
    batches = sorted((batch for rank in ranks for batch in rank), key=lambda batch: batch.ids[0])
    assert [batch.count for batch in batches] == [25, 25, 25, 22]
    assert np.concatenate([batch.ids[: batch.count] for batch in batches]).tolist() == list(range(97))
    for batch in batches:
        assert len(batch.images) == 25
        assert np.array_equal(batch.images.numpy(), truth.images[batch.ids])
        assert np.array_equal(batch.labels.numpy(), truth.labels[batch.ids])
    assert batches[-1].ids[22:].tolist() == [96, 96, 96]


class ReadingSpy:
    """Records what a streaming reader reads: the number of images, and the blocks that are still held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images_read = 0
        self._blocks: list[weakref.ref[Block]] = []
        read = SplitReader.read

        def followed(reader: SplitReader, ids: np.ndarray) -> Block:
            block = read(reader, ids)
            self.images_read += len(ids)
            self._blocks.append(weakref.ref(block))
            return block

        monkeypatch.setattr(SplitReader, "read", followed)

    def images_held(self) -> int:
        return sum(len(block.ids) for block in (ref() for ref in self._blocks) if block is not None)


def test_streaming_holds_two_windows_of_each_stream_at_most(small_set, cache_dir, monkeypatch):
    order, spy = windowed(small_set, batch_size=16, streams=4, window=8), ReadingSpy(monkeypatch)
    most = 0
    reader = opened("streaming", small_set, cache_dir)
    for _ in train_batches(reader, order, batch_size=16, micro_batch=8, world_size=2, rank=1, stop_step=45):
        most = max(most, spy.images_held())
    # The two streams of the rank; decoding tasks of the steps ahead may still hold one older window of each.
    assert 0 < most <= 2 * 3 * 8
    epochs = 45 * 16 / TRAIN
    assert spy.images_read < (epochs + 0.5) * TRAIN / 2


def test_a_start_in_the_middle_reads_no_more_than_its_windows(small_set, cache_dir, monkeypatch):
    order, spy = windowed(small_set, batch_size=16, streams=4, window=8), ReadingSpy(monkeypatch)
    reader = opened("streaming", small_set, cache_dir)
    batches = train_batches(reader, order, batch_size=16, micro_batch=16, start_step=12, stop_step=13)
    assert len(list(batches)) == 1
    assert spy.images_read <= 4 * 2 * 8


Damage = Callable[[Path], None]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 512), "truncated|bytes instead of"),
    "one byte changed": (lambda path: flip_byte(path, 700), "changed"),
    "missing": (lambda path: path.unlink(), "No such file"),
    "another shard": (lambda path: shutil.copy(path.with_name("train-000001.tar"), path), "train-000002.tar"),
}


@pytest.fixture
def own_set(small_set, tmp_path) -> Path:
    """A copy of the small set that a test may damage."""
    return Path(shutil.copytree(small_set, tmp_path / "set"))


@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize(("damage", "named"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_is_named_at_the_launch_even_with_a_warm_cache(kind, damage, named, own_set, tmp_path):
    opened(kind, own_set, tmp_path / "cache")
    damage(own_set / "train-000002.tar")
    with pytest.raises(UserError, match=named) as caught:
        opened(kind, own_set, tmp_path / "cache")
    assert "train-000002.tar" in str(caught.value)


@pytest.mark.parametrize(("damage", "named"), DAMAGES.values(), ids=DAMAGES)
def test_a_shard_that_changes_between_two_epochs_is_named(damage, named, own_set, tmp_path):
    order, reader = windowed(own_set), opened("streaming", own_set, tmp_path / "cache")
    batches = train_batches(reader, order, batch_size=24, micro_batch=24, stop_step=200)
    for _ in range(-(-TRAIN // 24)):
        next(batches)
    damage(own_set / "train-000002.tar")
    with pytest.raises(UserError, match=named) as caught:
        list(batches)
    assert "train-000002.tar" in str(caught.value)


def test_a_shard_that_was_replaced_by_its_copy_is_accepted(own_set, tmp_path):
    order, reader = windowed(own_set), opened("streaming", own_set, tmp_path / "cache")
    batches = train_batches(reader, order, batch_size=24, micro_batch=24, stop_step=40)
    next(batches)
    for path in own_set.glob("train-*.tar"):
        shutil.copy(path, tmp_path / "copy")
        (tmp_path / "copy").rename(path)
    assert len(list(batches)) == 39


def test_a_decoded_file_that_was_changed_is_decoded_again_even_if_mtime_was_restored(small_set, tmp_path):
    before = opened("resident", small_set, tmp_path / "cache").gather(np.arange(9))[0].clone()
    (path,) = (tmp_path / "cache").rglob("train.u8")
    path.chmod(0o644)
    damage_by_flip_with_times_put_back(path)
    assert torch.equal(opened("resident", small_set, tmp_path / "cache").gather(np.arange(9))[0], before)


@pytest.mark.parametrize(("offset", "size"), [(1_000, 0), (2**63 - 5, 4)])
def test_an_impossible_index_is_refused(own_set, tmp_path, offset, size):
    path = own_set / "train.index.npy"
    index = np.load(path)
    index["offset"], index["size"] = offset, size
    np.save(path, index)
    sign_files(own_set)
    with pytest.raises(UserError, match="index"):
        opened("resident", own_set, tmp_path / "cache").gather(np.arange(9))


def test_the_shards_folder_is_not_written(own_set, tmp_path):
    def state() -> list[tuple[str, int, int]]:
        return sorted(
            (path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in [own_set, *own_set.iterdir()]
        )

    before = state()
    for kind in OPEN:
        reader = opened(kind, own_set, tmp_path / "cache")
        list(train_batches(reader, windowed(own_set), batch_size=24, micro_batch=24, stop_step=3))
    assert state() == before


@pytest.mark.parametrize(
    "png",
    [
        png_with(28, 28, 8, 0),
        png_with(28, 28, 16, 2),
        png_with(28, 28, 8, 3),
        png_with(16, 28, 8, 2),
        png_with(30_000, 30_000, 8, 2),
        png_with(28, 28, 8, 2)[:60],
        b"not an image, but text",
        b"",
    ],
    ids=["grey", "16 bit", "palette", "another size", "bomb", "cut", "text", "empty"],
)
def test_a_broken_or_unexpected_png_is_named_with_file_and_member(png, small_set, cache_dir):
    reader = opened("streaming", small_set, cache_dir).reader
    good = reader.read(np.arange(3))
    data = np.concatenate([good.data, np.frombuffer(png, dtype=np.uint8)])
    offsets, sizes = np.append(good.offsets[:2], len(good.data)), np.append(good.sizes[:2], len(png))
    plain = shards_module._has_header(data, offsets, (28, 28))
    block = Block(ids=good.ids, data=data, offsets=offsets, sizes=sizes, plain=plain)
    out = torch.empty(3, 28, 28, 3, dtype=torch.uint8)
    with pytest.raises(UserError) as caught:
        reader.decode(block, [0, 1, 2], out)
    shards = ShardSet.open(small_set)
    assert str(caught.value).startswith(f"{small_set}/train-000000.tar: {shards.keys('train', [2])[0]}.png: ")


def with_train(manifest: Manifest, count: int) -> Manifest:
    """The manifest with ``count`` images in its train split, otherwise unchanged."""
    train = manifest.splits["train"].model_copy(update={"count": count})
    return manifest.model_copy(update={"splits": {**manifest.splits, "train": train}})


@pytest.mark.parametrize(
    ("asked", "train", "resolved"),
    [
        ({}, 55_000, ("full", "resident", 16)),
        ({}, 100_000_000, ("windowed", "streaming", 16)),
        ({"reader": "streaming"}, 55_000, ("windowed", "streaming", 16)),
        ({"reader": "resident"}, 100_000_000, ("windowed", "resident", 16)),
        ({"order": "windowed"}, 55_000, ("windowed", "resident", 16)),
        ({"order": "full"}, 100_000_000, ("full", "resident", 16)),
        ({"shuffle_streams": 64}, 55_000, ("full", "resident", 64)),
    ],
)
def test_order_and_reader_are_chosen_by_the_manifests_size(asked, train, resolved, small_set):
    manifest = with_train(ShardSet.open(small_set).manifest, train)
    config = DataConfig(**asked)
    assert choose_reading(config, manifest, batch_size=256, world_size=4) == resolved
    config = DataConfig(order=resolved[0], reader=resolved[1], shuffle_streams=resolved[2])
    order = create_order(config, StepsConfig(batch_size=256), manifest)
    assert isinstance(order, FullOrder if resolved[0] == "full" else WindowedOrder)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "streams"),
    [(256, 1, 16), (96, 6, 12), (4096, 64, 64), (100, 1, 10), (7, 1, 7), (34, 2, 2), (128, 3, 16)],
)
def test_automatic_streams_fit_batch_and_processes(batch_size, world_size, streams, small_set):
    manifest = ShardSet.open(small_set).manifest
    assert choose_reading(DataConfig(), manifest, batch_size=batch_size, world_size=world_size)[2] == streams


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"order": "full", "reader": "streaming"}, "reader streaming requires order windowed"),
        ({"order": "windowed", "shuffle_streams": 6}, "16 fits"),
        ({"order": "windowed", "shuffle_streams": 48}, "16 fits"),
    ],
)
def test_settings_that_do_not_fit_are_refused(asked, named, small_set):
    manifest = ShardSet.open(small_set).manifest
    with pytest.raises(UserError, match=named):
        choose_reading(DataConfig(**asked), manifest, batch_size=256, world_size=4)


def test_shards_without_a_train_split_are_refused(tiny_set):
    manifest = ShardSet.open(tiny_set).manifest
    manifest = manifest.model_copy(update={"splits": {"test": manifest.splits["test"]}})
    with pytest.raises(UserError, match="no train split, only test"):
        choose_reading(DataConfig(), manifest, batch_size=4, world_size=1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", OPEN)
def test_on_a_gpu_the_batches_are_the_same(kind, small_set, truth, tmp_path):
    order = windowed(small_set)
    reader = OPEN[kind](ShardSet.open(small_set), "train", cache_dir=tmp_path, device="cuda", workers=2)
    for step in train_batches(reader, order, batch_size=24, micro_batch=12, stop_step=30):
        for batch in step:
            assert batch.images.is_cuda
            assert batch.labels.is_cuda
            assert truth.has(batch, order)
