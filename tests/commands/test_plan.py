"""``plan`` names the images that training uses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TRAIN, error_of, output_of
from PIL import Image

from mnistm_dist import config as configuration
from mnistm_dist import plan
from mnistm_dist.data.fetch import open_shards
from mnistm_dist.data.loader import open_reader, train_batches
from mnistm_dist.data.order import choose_reading, create_order


def run_folder(place: Path, shards: Path, **fields: object) -> Path:
    """A run folder that holds only its configuration, resolved as at the first launch."""
    config = configuration.replace(
        configuration.Config(), shards=str(shards), **{"batch_size": 48, "seed": 11, **fields}
    )
    manifest = open_shards(str(shards), cache_dir=place).manifest
    order, data, streams = choose_reading(config.data, manifest, batch_size=config.steps.batch_size, world_size=4)
    config = configuration.replace(config, order=order, reader=data, shuffle_streams=streams)
    place.mkdir(exist_ok=True)
    (place / "config.yaml").write_text(configuration.dump(config))
    return place


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("order", "reading"), [("full", "resident"), ("windowed", "resident"), ("windowed", "streaming")]
)
def test_plan_names_the_images_of_every_rank(world_size, order, reading, run_main, small_set, cache_dir, tmp_path):
    run = run_folder(
        tmp_path / "run", small_set, order=order, reader=reading, shuffle_streams=8, shuffle_window=20, micro_batch=6
    )
    config = configuration.load(run / "config.yaml")
    shards = open_shards(str(small_set), cache_dir=cache_dir)
    reader = open_reader(shards, "train", config.data, cache_dir=cache_dir, device="cpu", threads=2)
    step = 2 * TRAIN // 48  # an epoch ends within this step
    ranks = []
    for rank in range(world_size):
        (share,) = train_batches(
            reader,
            create_order(config.data, config.steps, shards.manifest),
            batch_size=48,
            micro_batch=6,
            world_size=world_size,
            rank=rank,
            start_step=step,
            stop_step=step + 1,
        )
        ranks.append(shards.keys("train", np.concatenate([batch.ids for batch in share])))
    result = json.loads(output_of(run_main(plan.main, run, "--step", step, "--world-size", world_size, "--json")))
    assert result == {"step": step, "epoch": step * 48 // TRAIN, "ranks": ranks}


def test_plan_of_shards_is_that_of_a_new_run_of_the_default_recipe(run_main, small_set, tmp_path):
    given = ["--shards", small_set, "--step", 3, "--json"]
    result = json.loads(output_of(run_main(plan.main, *given)))
    recipe = configuration.build("fast", configuration.read_recipe("fast"))
    assert len(result["ranks"][0]) == recipe.steps.batch_size
    chosen = json.loads(output_of(run_main(plan.main, *given, "--batch-size", 48, "--seed", 11)))
    run = run_folder(tmp_path / "run", small_set)
    assert json.loads(output_of(run_main(plan.main, run, "--step", 3, "--json"))) == chosen
    flags = ("--batch-size", 48, "--seed", 11, "--order", "windowed", "--world-size", 2)
    other = json.loads(output_of(run_main(plan.main, *given, *flags)))
    assert [len(keys) for keys in other["ranks"]] == [24, 24]
    assert [*other["ranks"][0], *other["ranks"][1]] != chosen["ranks"][0]


def test_without_json_it_prints_lines_of_80_columns(run_main, small_set):
    text = output_of(run_main(plan.main, "--shards", small_set, "--step", 1, "--batch-size", 12, "--world-size", 2))
    lines = text.splitlines()
    # Counted as in the console, the log and the report.
    assert lines[0] == f"step 2 of {-(-11 * TRAIN // 12)} (--step 1), epoch 1: 12 images, full order, seed 0"
    assert sum(line.startswith("rank ") for line in lines) == 2
    assert all(len(line) <= 80 for line in lines)


def test_saved_images_are_those_of_the_step(small_set, tmp_path, capsys):
    for name, extra in (("plain", {}), ("shifted", {"shift": 4.0, "invert": 1.0})):
        run = run_folder(tmp_path / name, small_set, image_size=(32,), batch_size=12, **extra)
        assert plan.main([str(run), "--step", "2", "--save", f"{tmp_path / name}.png"]) == 0
        assert f"images: {tmp_path / name}.png" in capsys.readouterr().out
    plain, shifted = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("plain", "shifted"))
    assert plain.shape == shifted.shape
    assert plain.shape[1] == 800
    assert (plain != shifted).mean() > 0.2
    again = tmp_path / "again.png"
    plan.main([str(tmp_path / "plain"), "--step", "2", "--world-size", "4", "--save", str(again)])
    assert np.array_equal(np.asarray(Image.open(again).convert("RGB")), plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "nowhere", "--step", "1"], "nowhere: no such folder"),
        (["nowhere", "--step", "1"], "nowhere/config.yaml: cannot be read"),
        ([".", "--step", "1", "--seed", "3"], "--seed: . has its own"),
        (["--step", "1"], "name a run folder, or a packed set with --shards"),
        (["--shards", "SET"], "--step"),
        (["--shards", "SET", "--step", "-1"], "--step: found '-1'; should be greater than or equal to 0"),
        (["--shards", "SET", "--step", "many"], "--step: found 'many'"),
        (["--shards", "SET", "--step", "1", "--batch-size", "0"], "--batch-size: found '0'"),
        (["--shards", "SET", "--step", "1", "--batch-size", "4", "--world-size", "5"], "for 5 processes"),
        (["--shards", "SET", "--step", "1", "--save", "batch.jpeg"], "--save: found 'batch.jpeg'"),
        (["--shards", "SET", "--step", "1", "--save", "no/such/folder/batch.png"], "no/such/folder/batch.png"),
        (["--shards", "pipe:cat", "--step", "1"], "https://"),
    ],
)
def test_a_user_error_is_one_line(arguments, message, run_main, small_set):
    assert message in error_of(run_main(plan.main, *(str(small_set) if a == "SET" else a for a in arguments)))
