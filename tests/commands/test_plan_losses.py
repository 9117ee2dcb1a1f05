"""``plan --losses`` gives the loss of each image of a step, by training the run again up to it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import error_of, output_of
from packed_sets import tiny_source
from PIL import Image

from mnistm_dist import plan
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.sources.base import Sample
from mnistm_dist.train import main as train
from mnistm_dist.training.run_dir import read_log, step_losses

FLAGS = (
    *("--recipe", "fast", "--batch-size", 16, "--image-size", 28, "--threads", 1, "--tracker", "none", "--no-report"),
    *("--precision", "fp32"),
)
WRONG = 5
"""The image of the set whose label is not that of its colour."""
STEPS = 36


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory) -> tuple[Path, str]:
    """A set of 48 images of four colours, which are the classes, one with a wrong label; and the key of this one."""

    def paint(sample: Sample) -> Sample:
        label = sample.index % 4
        pixels = sample.pixels // 4 + np.array([(180, 0, 0), (0, 180, 0), (0, 0, 180), (180, 180, 0)], np.uint8)[label]
        wrong = (sample.split, sample.index) == ("train", WRONG)
        return dataclasses.replace(sample, pixels=pixels, label=(label + wrong) % 4)

    out = tmp_path_factory.mktemp("mislabelled") / "set"
    pack(tiny_source(train=48, val=8, test=0, arrays=True, spoil=paint), out, num_shards=2)
    return out, f"{WRONG:08d}"


@pytest.fixture(scope="module")
def run(mislabelled, cache_dir, tmp_path_factory) -> Path:
    """A run on that set, long enough to fit the other images; read only."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    places = ("--shards", mislabelled[0], "--run-dir", folder, "--cache-dir", cache_dir)
    flags = (*FLAGS, "--micro-batch", 8, "--epochs", 12, "--invert", 0, "--log-every", 5, "--evaluate-every", 12)
    assert train(list(map(str, (*places, *flags)))) == 0
    return folder


def losses_of(done) -> dict:
    result = json.loads(output_of(done))
    assert [image["loss"] for image in result["images"]] == sorted((i["loss"] for i in result["images"]), reverse=True)
    assert sorted(image["key"] for image in result["images"]) == sorted(key for keys in result["ranks"] for key in keys)
    return result


def test_a_mislabelled_image_is_the_first_one(run_main, run, mislabelled):
    key = mislabelled[1]
    steps = {
        step: result
        for step in range(STEPS - 9, STEPS)
        if key in (result := json.loads(output_of(run_main(plan.main, run, "--step", step, "--json"))))["ranks"][0]
    }
    assert steps
    for step in steps:
        first, second, *_ = losses_of(run_main(plan.main, run, "--step", step, "--losses", "--json"))["images"]
        assert first["key"] == key
        assert first["loss"] > 2 * second["loss"]


@pytest.mark.parametrize("step", [0, 3, 4, 6, 34, 35])
def test_the_loss_of_the_step_is_that_of_the_log_to_the_last_bit(run_main, run, step):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = losses_of(run_main(plan.main, run, "--step", step, "--losses", "--json"))
    assert result["mean"] == result["logged"] == step_losses(read_log(run / "log.jsonl"))[step]
    assert result["mean"] == pytest.approx(np.mean([image["loss"] for image in result["images"]]), rel=1e-6)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_log_has_the_loss_of_every_step_and_its_rows_their_means(run):
    rows = [row for row in read_log(run / "log.jsonl") if row["kind"] == "train"]
    assert step_losses(rows).keys() == set(range(STEPS))
    assert all(row["train/loss"] == sum(row["losses"]) / len(row["losses"]) for row in rows)


def test_on_two_processes_it_is_the_same(run_command, run, small_set, tmp_path):
    places = ("--shards", small_set, "--run-dir", tmp_path / "two")
    output_of(run_command("train", *places, *FLAGS, "--max-steps", 6, world_size=2))
    done = run_command("plan", tmp_path / "two", "--step", 5, "--losses", "--json", world_size=2)
    result = losses_of(done)
    assert result["mean"] == result["logged"]


def test_it_says_from_where_it_trains_and_how_long_that_took(run_main, run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    done = run_main(plan.main, copy, "--step", 34, "--losses")
    assert "training from step 33 to step 34 again (step-00000033); the run took " in done.stderr
    done = run_main(plan.main, copy, "--step", 5, "--losses")
    assert "training from step 0 to step 5 again (the initial weights); the run took " in done.stderr
    first, second = done.stdout.splitlines()[1:3]
    assert first.startswith("loss ")
    assert ", in the log " in first
    assert len(second.split()) == 4


def test_pictures_come_in_the_order_of_their_losses(run_main, run, tmp_path):
    plain, sorted_ = tmp_path / "plain.png", tmp_path / "sorted.png"
    output_of(run_main(plan.main, run, "--step", 4, "--save", plain))
    output_of(run_main(plan.main, run, "--step", 4, "--losses", "--save", sorted_))
    images = [np.asarray(Image.open(path).convert("RGB")) for path in (plain, sorted_)]
    assert images[0].shape != images[1].shape or (images[0] != images[1]).any()


def test_a_step_without_a_finite_loss_can_be_looked_at(run_main, mislabelled, cache_dir, tmp_path):
    places = ("--shards", mislabelled[0], "--run-dir", tmp_path / "nan", "--cache-dir", cache_dir)
    flags = (*FLAGS, "--epochs", 20, "--optimizer", "sgd", "--learning-rate", 1e30, "--lr-schedule", "constant")
    error = error_of_failed(run_main(train, *places, *flags))
    step = int(error.partition("loss of step ")[2].split()[0])
    text = output_of(run_main(plan.main, tmp_path / "nan", "--step", step, "--losses"))
    assert "loss nan, in the log not found" in text


def error_of_failed(done) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


def test_without_a_run_it_is_refused(run_main, small_set):
    assert "--losses: trains a run again" in error_of(
        run_main(plan.main, "--shards", small_set, "--step", 1, "--losses")
    )
