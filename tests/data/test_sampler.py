"""Claims about `mnistm_dist.OrderedSampler`: exact epochs, any number of processes, a start at any step."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from mnistm_dist import OrderedSampler
from mnistm_dist.data.order import FullOrder

SIZE, BATCH, EPOCHS = 101, 12, 3  # a prime number of samples


def global_batches(world_size: int, start_step: int = 0, seed: int = 0) -> list[list[int]]:
    ranks = [
        OrderedSampler(SIZE, BATCH, epochs=EPOCHS, seed=seed, rank=rank, world_size=world_size, start_step=start_step)
        for rank in range(world_size)
    ]
    return [[index for part in parts for index in part] for parts in zip(*ranks, strict=True)]


@given(
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 26), max_size=3),
    seed=st.integers(0, 5),
)
@settings(max_examples=50, deadline=None)
def test_launches_on_any_world_sizes_continue_one_sequence(worlds: list[int], cuts: list[int], seed: int) -> None:
    whole = global_batches(1, seed=seed)
    edges = [0, *sorted(cuts), len(whole)]
    launches = [
        global_batches(worlds[i % len(worlds)], start, seed)[: stop - start]
        for i, (start, stop) in enumerate(pairwise(edges))
    ]
    assert [batch for launch in launches for batch in launch] == whole


def test_each_epoch_has_each_sample_once_and_the_order_is_that_of_training() -> None:
    indices = np.array(global_batches(3)).ravel()
    assert np.array_equal(indices, FullOrder(size=SIZE, seed=0).ids(np.arange(len(indices))))
    for epoch in range(EPOCHS):
        assert sorted(indices[epoch * SIZE : (epoch + 1) * SIZE]) == list(range(SIZE))


def test_torchs_own_sampler_repeats_samples_and_changes_with_the_world_size() -> None:
    def epoch(world_size: int) -> list[list[int]]:
        samplers = [DistributedSampler(range(SIZE), world_size, rank, seed=0) for rank in range(world_size)]  # type: ignore[arg-type]
        loaders = [DataLoader(range(SIZE), BATCH // world_size, sampler=each) for each in samplers]  # type: ignore[arg-type]
        return [[int(i) for part in parts for i in part] for parts in zip(*loaders, strict=True)]

    seen = [index for batch in epoch(3) for index in batch]
    assert len(seen) == SIZE + 1  # padded: a sample is repeated
    assert [sorted(batch) for batch in epoch(1)] != [sorted(batch) for batch in epoch(3)]


@pytest.mark.parametrize("workers", [0, 1])
def test_it_is_the_batch_sampler_of_a_loader(workers: int) -> None:
    data = TensorDataset(torch.arange(SIZE))
    sampler = OrderedSampler(SIZE, BATCH, epochs=1, start_step=2)
    batches = [batch.tolist() for (batch,) in DataLoader(data, batch_sampler=sampler, num_workers=workers)]
    assert batches == global_batches(1)[2 : 2 + len(sampler)]
    assert len(batches) == len(sampler) == 7


def test_a_batch_that_the_processes_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="12 is not a multiple of the 5 processes"):
        OrderedSampler(SIZE, BATCH, epochs=1, world_size=5)


def test_it_imports_torch_and_numpy_only() -> None:
    code = (
        "import json, sys, torch, numpy; before = set(sys.modules); from mnistm_dist import OrderedSampler\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pydantic", "accelerate", "tyro", "yaml", "webdataset", "PIL"} & set(json.loads(done.stdout))


SCRIPT = Path(__file__).parents[2] / "docs" / "sampler.md"


@pytest.mark.slow
def test_the_loop_of_the_docs_continues_on_another_world_size(tmp_path: Path) -> None:
    """The script of docs/sampler.md, stopped in mid-epoch on two processes and continued on three, is that of one."""
    text = SCRIPT.read_text().partition("```python\n")[2].partition("```")[0]
    script = tmp_path / "train.py"
    script.write_text(text)

    def run(world_size: int, folder: str, steps: int) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        # What was written decides, not the exit code: on a busy machine torch once aborted in a rank that had finished.
        subprocess.run([*launcher, script, str(steps)], cwd=tmp_path / folder, timeout=300)

    run(1, "whole", 20)
    for world_size, steps in ((2, 7), (3, 20)):
        run(world_size, "parts", steps)
    seen = [(tmp_path / folder / "seen.txt").read_text().split("\n") for folder in ("whole", "parts")]
    assert seen[0] == seen[1]
    assert len(seen[0]) == 20 + 1
