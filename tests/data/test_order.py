"""The order: a pure function, complete, the same on every machine."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from mnistm_dist.config import StepsConfig
from mnistm_dist.data.hashing import derive_key, permute, uniform
from mnistm_dist.data.order import (
    FullOrder,
    Order,
    WindowedOrder,
    choose_micro_batch,
    micro_batch_share,
    step_positions,
)
from mnistm_dist.errors import UserError

SEEDS = st.integers(0, 2**63 - 1)
quick = settings(max_examples=60, deadline=None)


@st.composite
def full_orders(draw: st.DrawFn) -> tuple[Order, int, list[int]]:
    """An order, a batch and world sizes that divide it."""
    share, worlds = draw(st.integers(1, 9)), draw(st.sampled_from([[1, 2, 4], [1, 3], [1, 2, 3, 6], [1, 5]]))
    return FullOrder(size=draw(st.integers(1, 400)), seed=draw(SEEDS)), share * worlds[-1], worlds


@st.composite
def windowed_orders(draw: st.DrawFn) -> tuple[Order, int, list[int]]:
    """An order of shards of any sizes, a batch, and world sizes that divide its streams."""
    counts = draw(st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(any))
    worlds = draw(st.sampled_from([[1, 2, 4], [1, 3], [1, 2, 3, 6], [1, 5]]))
    streams = worlds[-1] * draw(st.integers(1, 3))
    batch = streams * draw(st.integers(1, 5))
    window = draw(st.sampled_from([1, 2, 5, 16, 100]))
    return (
        WindowedOrder(shard_counts=counts, seed=draw(SEEDS), batch_size=batch, streams=streams, window=window),
        batch,
        worlds,
    )


any_order = st.one_of(full_orders(), windowed_orders())


@quick
@given(any_order, st.integers(0, 1000))
def test_every_image_comes_once_per_epoch(given_order, epoch):
    order, _, _ = given_order
    positions = np.arange(epoch * order.size, (epoch + 1) * order.size)
    assert sorted(order.ids(positions)) == list(range(order.size))


@quick
@given(any_order, st.integers(0, 100_000))
def test_the_ranks_shares_make_the_same_global_batch_at_every_world_size(given_order, step):
    order, batch, worlds = given_order
    worlds = [*worlds, *range(1, min(batch, 7) + 1)]
    alone = step_positions(step, batch_size=batch)
    assert alone.tolist() == list(range(step * batch, (step + 1) * batch))
    for world in worlds:
        shares = [step_positions(step, batch_size=batch, world_size=world, rank=rank) for rank in range(world)]
        assert np.concatenate(shares).tolist() == alone.tolist()
        assert np.concatenate([order.ids(share) for share in shares]).tolist() == order.ids(alone).tolist()
        if isinstance(order, WindowedOrder) and order.streams % world == 0:
            streams = [set(order.stream(share).tolist()) for share in shares]
            assert sum(map(len, streams)) == len(set().union(*streams)) == order.streams


@quick
@given(any_order, st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_the_id_of_a_position_does_not_depend_on_the_others(given_order, positions):
    order, _, _ = given_order
    together = order.ids(np.array(positions))
    assert together.tolist() == [order.ids(np.array([position]))[0] for position in positions]


@quick
@given(windowed_orders(), st.integers(0, 50))
def test_a_window_has_the_samples_of_its_positions(given_order, epoch):
    """The samples of a window, place by place, are those of the order at its positions."""
    order, _, _ = given_order
    positions = np.arange(epoch * order.size, (epoch + 1) * order.size)
    ids, at = order.ids(positions), order.locate(positions)
    seen = 0
    for stream in range(order.streams):
        for window in range(order.windows_of(epoch, stream)):
            held = order.window_ids(epoch, stream, window)
            here = (at.streams == stream) & (at.windows == window)
            assert ids[here].tolist() == held[at.places[here]].tolist()
            assert at.offsets[here].tolist() == list(range(len(held)))
            assert 0 < len(held) <= order.window
            seen += len(held)
    assert seen == order.size


@quick
@given(windowed_orders(), st.integers(0, 50))
def test_segments_follow_one_another_and_fill_the_epoch(given_order, epoch):
    order, _, _ = given_order
    starts, counts = order.segment(epoch, np.arange(order.streams))
    assert [*starts.tolist(), order.size] == [0, *np.cumsum(counts).tolist()]
    positions = np.arange(epoch * order.size, (epoch + 1) * order.size)
    assert counts.tolist() == np.bincount(order.stream(positions), minlength=order.streams).tolist()


@pytest.mark.parametrize("kind", ["full", "windowed"])
def test_epochs_and_seeds_differ(kind):
    def order(seed: int) -> Order:
        if kind == "full":
            return FullOrder(size=640, seed=seed)
        return WindowedOrder(shard_counts=[10] * 64, seed=seed, batch_size=32, streams=4, window=64)

    epochs = order(0).ids(np.arange(4 * 640)).reshape(4, 640)
    others = [order(seed).ids(np.arange(640)) for seed in (1, 2, 2**63 - 1)]
    rows = [*epochs, *others]
    for i, a in enumerate(rows):
        for b in rows[:i]:
            # Two independent permutations agree in one place on average.
            assert (a == b).sum() < 15


def test_a_stream_mixes_shards_of_the_whole_set():
    order = WindowedOrder(shard_counts=[100] * 50, seed=3, batch_size=40, streams=8, window=250)
    firsts = {order.ids(np.arange(e * 5000, e * 5000 + 40))[0] // 100 for e in range(60)}
    assert len(firsts) > 25


@quick
@given(st.integers(1, 64), st.integers(1, 64), st.data())
def test_the_shares_of_any_number_of_processes_are_contiguous_and_as_equal_as_possible(count, micro, data):
    world = data.draw(st.integers(1, count))
    sizes = {"batch_size": count * micro, "micro_batch": micro, "world_size": world}
    shares = [micro_batch_share(**sizes, rank=rank) for rank in range(world)]
    assert [index for share in shares for index in share] == list(range(count))
    assert {len(share) for share in shares} <= {count // world, -(-count // world)}
    with pytest.raises(UserError, match="nearest that fit" if micro > 1 else f"{count + 1} of them"):
        micro_batch_share(batch_size=count * micro + 1, micro_batch=micro, world_size=count + 2, rank=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 256, "world_size": 2, "micro_batch": 48}, "micro_batch 32 and 64 or batch_size 240 and 288"),
        ({"batch_size": 128, "world_size": 6, "micro_batch": 32}, "4 of them for 6 processes; use --micro-batch 16 or"),
        ({"batch_size": 2, "world_size": 4, "micro_batch": 1}, "fewer processes"),
    ],
)
def test_the_nearest_values_that_fit_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        micro_batch_share(**arguments, rank=0)


@pytest.mark.parametrize(
    ("steps", "reproducible", "sizes"),
    [
        ({"batch_size": 128}, False, [128, 64, 32, 32, 16]),
        ({"batch_size": 128}, True, [16] * 5),
        ({"batch_size": 128, "max_world": 4}, False, [32] * 5),
        ({"batch_size": 128, "max_world": 16}, True, [8] * 5),
        ({"batch_size": 128, "max_world": 16, "micro_batch": 64}, True, [64] * 5),
    ],
)
def test_an_automatic_micro_batch_follows_the_processes_or_max_world(steps, reproducible, sizes):
    chosen = [
        choose_micro_batch(StepsConfig(**steps), world_size=world, reproducible=reproducible)
        for world in (1, 2, 3, 4, 5)
    ]
    assert chosen == sizes


def test_streams_must_divide_the_batch():
    with pytest.raises(
        UserError, match="streams 48 does not divide batch_size 256; the nearest that fit are 32 and 64"
    ):
        WindowedOrder(shard_counts=[10], seed=0, batch_size=256, streams=48, window=4)


@quick
@given(st.integers(1, 3000), SEEDS)
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@quick
@given(
    st.lists(st.tuples(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.integers(0, 2**62)), min_size=1, max_size=8)
)
def test_permute_takes_a_size_and_a_key_for_each_value(rows):
    sizes = np.array([size for size, _, _ in rows])
    keys = np.array([key for _, key, _ in rows], dtype=np.uint64)
    values = np.array([value % size for size, _, value in rows])
    each = [permute(np.array([v]), int(s), int(k))[0] for v, s, k in zip(values, sizes, keys, strict=True)]
    together = permute(values, sizes, keys)
    assert together.tolist() == each
    assert ((together >= 0) & (together < sizes)).all()


def p_value(counts: np.ndarray) -> float:
    """Return the p-value of Pearson's chi-square test that all cells are equally likely."""
    expected = counts.sum() / counts.size
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1))


@pytest.mark.parametrize("size", [2, 3, 5, 8, 10, 16, 30])
def test_over_many_keys_pairs_of_values_are_mapped_uniformly(size):
    """A chi-square test of every pair of values: no pair keeps a relation, even in the smallest permutations."""
    keys = derive_key(3, 9, np.arange(40_000))
    images = [permute(np.full(len(keys), value), size, keys) for value in range(size)]
    pairs = [(0, 1), (0, size - 1), *pairwise(range(min(size, 6)))]
    for a, b in pairs:
        table = np.bincount(images[a] * size + images[b], minlength=size * size).reshape(size, size)
        off_diagonal = table[~np.eye(size, dtype=bool)]
        assert table.trace() == 0
        assert p_value(off_diagonal) > 1e-5, (a, b)


@pytest.mark.parametrize("size", [1009, 55_000, 10**8])
def test_neighbours_are_not_neighbours_after_the_permutation(size):
    """Differences of the images of neighbours, over a keyed set of places, fall into equal parts of the range alike."""
    places = permute(np.arange(min(size - 1, 20_000)), size - 1, 77)
    gaps = (permute(places + 1, size, 5) - permute(places, size, 5)) % size
    assert p_value(np.bincount(gaps * 20 // size, minlength=20)) > 1e-5
    assert p_value(np.bincount(permute(places, size, 5) * 20 // size, minlength=20)) > 1e-5


def test_fixed_points_and_cycles_are_those_of_a_random_permutation():
    size, keys = 1000, range(300)
    images = [permute(np.arange(size), size, key) for key in keys]
    fixed = np.array([(image == np.arange(size)).sum() for image in images])
    assert 0.75 < fixed.mean() < 1.25  # Poisson with mean 1: a standard error of 0.06

    def cycles(image: np.ndarray) -> int:
        seen, count = np.zeros(size, dtype=bool), 0
        for start in range(size):
            if not seen[start]:
                count += 1
                while not seen[start]:
                    seen[start] = True
                    start = image[start]
        return count

    mean = np.mean([cycles(image) for image in images])
    assert abs(mean - sum(1 / i for i in range(1, size + 1))) < 0.6  # the harmonic number; a standard error of 0.14


def test_uniform_is_uniform_and_its_draws_and_seeds_are_independent():
    numbers = uniform(11, np.arange(20_000), 4)
    assert numbers.dtype == np.float32
    assert numbers.shape == (20_000, 4)
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    columns = [*numbers.T, uniform(12, np.arange(20_000), 1)[:, 0], numbers[1:, 0]]
    for column in columns:
        assert p_value(np.bincount((column * 50).astype(int), minlength=50)) > 1e-5
    for i, a in enumerate(columns):
        for b in columns[:i]:
            joint = (a[:19_999] * 8).astype(int) * 8 + (b[:19_999] * 8).astype(int)
            assert p_value(np.bincount(joint, minlength=64)) > 1e-5
    assert (uniform(11, np.array([7, 19_999]), 2) == numbers[[7, 19_999], :2]).all()


def test_golden_values():
    """The order and the random numbers do not depend on NumPy, Python or the machine, and never change."""
    numbers = uniform(0, np.array([0, 1, 10**12]), 2).astype(np.float64) * 2**24
    assert numbers.tolist() == [[12546036, 3398715], [5997234, 3655847], [356051, 6121277]]
    assert derive_key(-1, 5, np.array([0, 7])).tolist() == [0x2A04AF8762CE1B0E, 0xC4BD4A34DD1606EC]
    eight = np.arange(8)
    assert permute(eight, 10, 0).tolist() == [1, 4, 8, 2, 3, 5, 0, 6]
    assert permute(eight, 1000, 2**64 - 1).tolist() == [377, 768, 28, 533, 375, 32, 434, 667]
    assert permute(eight, 55_000, 42).tolist() == [30744, 38374, 9965, 37468, 34309, 13438, 52629, 21150]
    assert permute(eight[:3], 10**12, 42).tolist() == [988049664872, 847836949594, 991366401991]
    far = np.array([0, 1, 2, 54_999, 55_000, 10**13])
    assert FullOrder(size=55_000, seed=0).ids(far).tolist() == [43409, 15001, 3346, 30000, 30120, 21026]
    order = WindowedOrder(shard_counts=[860] * 60 + [850] * 4, seed=0, batch_size=256, streams=16, window=1024)
    assert order.ids(far).tolist() == [12415, 12783, 12181, 10330, 2152, 6009]
    order = WindowedOrder(shard_counts=[3, 4, 3], seed=1, batch_size=4, streams=2, window=3)
    assert order.ids(np.arange(20)).tolist() == [3, 5, 1, 0, 4, 8, 9, 2, 7, 6, 9, 8, 0, 2, 3, 5, 1, 7, 6, 4]


def test_the_plan_of_a_rank_is_ready_at_once_at_4096_ranks_and_100_million_samples():
    """In a fresh process: 100,000 shards, one rank's share of a step deep in the run, and of a whole epoch."""
    code = """
import time
import numpy as np
from mnistm_dist.data.order import FullOrder, WindowedOrder, step_positions
start = time.perf_counter()
batch, world = 32_768, 4096
orders = [FullOrder(size=10**8, seed=1),
          WindowedOrder(shard_counts=[1000] * 100_000, seed=1, batch_size=batch, streams=world, window=512)]
for order in orders:
    steps = range(10**7, 10**7 + -(-order.size // batch))
    of_rank = np.concatenate([step_positions(s, batch_size=batch, world_size=world, rank=4095) for s in steps])
    ids = order.ids(of_rank)
    assert len(ids) == 24_416 and 0 <= ids.min() and ids.max() < 10**8
seconds = time.perf_counter() - start
# Not getrusage: its peak counts that of the process that started this one.
(peak,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(seconds, int(peak.split()[1]) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 1
    assert megabytes < 200
