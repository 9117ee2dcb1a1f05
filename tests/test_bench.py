"""The benches measure what they say, at tiny sizes; nothing here is about how fast anything is."""

import gzip
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import TRAIN, worked
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import other_formats, ranks, recipe, rounds
from benchmarks.launches import peak_megabytes
from benchmarks.rounds import Contender, Measured, Result
from benchmarks.setting import Setting, has_compiler
from mnistm_dist import bench
from mnistm_dist import config as configuration
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError
from mnistm_dist.reporting.console import Console
from mnistm_dist.training.diagnostics import traced
from mnistm_dist.training.run_dir import read_log

ROW = {"name", "output", "images_per_second", "ratio", "against", "spread"}
TINY = ("--batch-size", 16, "--image-size", 16, "--steps", 2, "--threads", 1)


@pytest.fixture
def measure(door, environment, small_set, tmp_path, monkeypatch, capsys):
    """Runs a bench on the small set and gives its document, whose schema is right.

    In a process of its own where the bench pins its cores or joins a world, else in this one.
    """

    def run(name: str, *flags: object) -> dict:
        arguments = [name, "--shards", str(small_set), "--json", "out.json", *map(str, flags)]
        if name in ("loader", "step"):
            out = worked(door("bench", *arguments, OMP_NUM_THREADS="1"))
        else:
            monkeypatch.chdir(tmp_path)
            for variable in ("PYTHONPATH", "MNISTM_DIST_CACHE", "WANDB_MODE"):
                monkeypatch.setenv(variable, environment[variable])
            assert bench.main(arguments) == 0
            out = capsys.readouterr().out
        document = json.loads((tmp_path / "out.json").read_text())
        assert set(document) == {"bench", "rows", "conditions"}
        assert document["bench"] == name
        for row in document["rows"]:
            assert set(row) == ROW
            assert row["output"] in ("uint8", "model-ready")
            assert row["spread"] >= 0
            assert row["name"] in out
        conditions = document["conditions"]
        assert {"machine", "cores", "versions", "threads", "load_average_before", "load_average_after"} <= {*conditions}
        assert conditions["counts"]["train"] == TRAIN
        assert len(conditions["details"]) == len({row["name"] for row in document["rows"]})
        return document

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def pairs(document: dict) -> set[tuple[str, str]]:
    """What was compared with what."""
    return {(row["name"], row["against"]) for row in document["rows"]}


def test_loader_compares_readers_in_two_groups_on_one_core(measure):
    document = measure("loader", "--rounds", 1, "--seconds", 0.01, "--images", 40, "--batch-size", 16)
    groups = {"uint8": "WebDataset, to uint8", "model-ready": "WebDataset, as its docs show it"}
    assert all(row["against"] == groups[row["output"]] and row["ratio"] > 0 for row in document["rows"])
    names = {output: {row["name"] for row in document["rows"] if row["output"] == output} for output in groups}
    assert names["uint8"] == {
        *("resident, uint8", "streaming, uint8", "first launch, uint8"),
        *("WebDataset, to uint8", "WebDataset, to uint8 by torchvision"),
    }
    assert names["model-ready"] == {
        *("resident", "streaming", "WebDataset, as its docs show it", "ImageFolder and DataLoader"),
        *other_formats.installed(),
    }
    assert (len(document["conditions"]["cores"]), document["conditions"]["threads"]) == (1, 1)


def test_step_compares_the_trainer_with_a_bare_loop_and_a_plain_script(measure):
    document = measure("step", *TINY, "--rounds", 2, "--no-compile")
    assert pairs(document) >= {
        ("plain script", "plain script"),
        ("bare loop", "plain script"),
        ("trainer", "bare loop"),
        ("trainer", "plain script"),
        ("bare loop, one prepared batch", "bare loop"),
        ("bare loop, contiguous", "bare loop"),
    }
    assert all(len(found["rounds"]) == 2 for found in document["conditions"]["details"].values())
    assert document["conditions"]["compile"] == "not asked for"
    # Of a training in a process of its own.
    assert document["conditions"]["trainer_peak_megabytes"] > 100


def test_the_peak_of_a_process_is_its_own():
    with subprocess.Popen(["sleep", "60"]) as process:
        peaks = [peak_megabytes(pid) for pid in (process.pid, os.getpid())]
        process.kill()
    assert 0 < peaks[0] < 50 < peaks[1]
    assert peak_megabytes(process.pid) == 0


@pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler here")
@pytest.mark.soak
def test_step_compiles_where_there_is_a_compiler(measure):
    document = measure("step", *TINY, "--rounds", 1, "--only", "compiled", "--no-memory")
    assert pairs(document) == {("bare loop, compiled", "bare loop")}
    assert document["rows"][0]["ratio"] is None


@pytest.mark.gpu
def test_step_tells_what_a_gpu_waits_for_and_holds(measure):
    found = measure("step", *TINY, "--rounds", 1, "--no-memory")["conditions"]["details"]
    assert 0 <= found["bare loop"]["gpu_waits_share"] <= 1
    assert found["trainer"]["gpu_peak_megabytes"] > 0


def test_ranks_run_two_processes_and_tell_the_share_of_communication(measure):
    document = measure("ranks", *TINY, "--rounds", 1, "--only", "2 processes,plain")
    assert pairs(document) == {
        ("plain script, 2 threads", "plain script, 2 threads"),
        ("2 processes", "1 process"),
        ("2 processes", "plain script, 2 threads"),
    }
    assert document["conditions"]["details"]["2 processes"]["communication_share"] < 1


@pytest.mark.parametrize(
    ("script", "raised", "words"),
    [
        ("exit 3", UserError, "ended with 3: it said nothing"),
        ("echo 'error: no such shards' >&2; exit 1", UserError, "2 processes ended with 1: no such shards"),
        ("echo '{\"world_size\": 1}' > $FOLDER/result.json", RuntimeError, "asked for 2 processes, .* started 1"),
    ],
)
def test_ranks_take_no_failed_launch_and_no_other_world_size(tmp_path, monkeypatch, script, raised, words):
    launcher = tmp_path / "launcher"
    launcher.write_text(f"#!/bin/sh\n{script}\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))
    monkeypatch.setenv("FOLDER", str(tmp_path / "launch"))
    with pytest.raises(raised, match=words):
        ranks.run_worker(configuration.build("x", {}), tmp_path / "launch", world_size=2, steps=1)


def test_startup_launches_with_an_empty_and_with_a_full_cache(measure, cache_dir, tmp_path):
    (tmp_path / "tiny.yaml").write_text("steps: {epochs: 99, image_size: [16]}")
    before = sorted(path.name for path in cache_dir.glob("sets/*"))
    document = measure("startup", "--rounds", 1, "--batch-size", 16, "--threads", 1, "--recipe", "tiny.yaml")
    assert pairs(document) == {("first launch", "first launch"), ("second launch", "first launch")}
    for found in document["conditions"]["details"].values():
        assert found["seconds_to_the_first_step"] >= found["seconds_to_the_run_folder"] > 0
        assert found["peak_megabytes"] > 100
    assert sorted(path.name for path in cache_dir.glob("sets/*")) == before
    assert not list(cache_dir.glob("bench-*"))


def test_recipe_trains_to_an_accuracy_and_reads_a_run_that_is_there(measure, small_set, cache_dir, tmp_path):
    (tmp_path / "tiny.yaml").write_text("steps: {epochs: 30, batch_size: 32, image_size: [16]}")
    document = measure(
        "recipe", "--recipe", "tiny.yaml", "--seeds", "3", "--threads", 1, "--runs", "kept", "--accuracy", 0.01
    )
    (row,) = document["rows"]
    assert (row["name"], row["against"], row["ratio"]) == ("tiny.yaml", "tiny.yaml", 1)
    (run,) = document["conditions"]["details"]["tiny.yaml"]["runs"]
    assert (run["seed"], run["reached"], run["image_size"], run["images"]) == (3, True, 16, TRAIN)
    # It was stopped when it had reached it, not after 30 epochs.
    log = tmp_path / "kept" / "tiny-seed3" / "log.jsonl"
    written = log.read_bytes()
    assert max(row["step"] for row in read_log(log)) < 30 * TRAIN // 32

    def again(name: str, seed: int) -> Result:
        setting = Setting(
            shards=str(small_set),
            cache_dir=cache_dir,
            rounds=1,
            threads=1,
            cores=(0,),
            batch_size=32,
            only=(),
            console=Console(enabled=False),
        )
        asked = {"against": None, "seeds": [seed], "accuracy": 0.01, "to_end": False}
        return recipe.bench(setting, [name], runs=tmp_path / "kept", **asked)

    assert again("tiny.yaml", 3).conditions["details"] == document["conditions"]["details"]
    with pytest.raises(UserError, match=r"tiny-seed3: holds a run of tiny\.yaml, seed 3"):
        again("other/tiny.yaml", 3)
    assert log.read_bytes() == written


def test_the_pauses_between_launches_do_not_count(small_set, tmp_path):
    config = configuration.build("x", {"batch_size": 32, "seed": 4, "threads": 1})
    (tmp_path / "config.yaml").write_text(configuration.dump(config))
    rows = [
        {"kind": "start", "step": 0, "time": 100.0},
        {"kind": "train", "step": 10, "time": 107.0},
        {"kind": "evaluation", "step": 10, "val/accuracy": 0.5, "image_size": 28, "time": 108.0},
        {"kind": "preempted", "step": 15, "time": 110.0},
        {"kind": "resume", "step": 15, "time": 5000.0},
        {"kind": "evaluation", "step": 20, "val/accuracy": 0.9, "image_size": 64, "time": 5005.0},
        {"kind": "train", "step": 30, "time": 9000.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shards = ShardSet.open(small_set)
    reached = recipe.read_run(tmp_path, shards, accuracy=0.8)
    assert (reached.reached, reached.seconds, reached.images, reached.image_size) == (True, 15.0, 640, 64)
    assert reached.epochs == 640 / TRAIN
    beyond = recipe.read_run(tmp_path, shards, accuracy=0.95)
    assert (beyond.reached, beyond.accuracy, beyond.images) == (False, 0.9, 960)
    row = recipe.row("x", [reached, beyond], [reached], "y")
    assert (row.ratio, row.images_per_second) == (None, None)


def test_rounds_are_interleaved_and_the_warm_up_does_not_count():
    called: list[str] = []

    def contender(name: str) -> Contender:
        def one_round() -> Measured:
            called.append(name)
            return Measured(images=len(called), seconds=1.0)

        return Contender(name=name, measure=one_round, against=("A",))

    told: list[tuple[int, int]] = []
    measured = rounds.interleave(
        [contender(name) for name in "ABC"], rounds=2, warm_up=1, tell=lambda done, total: told.append((done, total))
    )
    assert "".join(called) == "ABCABCABC"
    assert {name: [found.images for found in ones] for name, ones in measured.items()} == {
        "A": [4, 7],
        "B": [5, 8],
        "C": [6, 9],
    }
    assert told == [(done, 9) for done in range(1, 10)]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.floats(0.1, 10))
def test_a_ratio_is_not_moved_by_what_slows_a_whole_round(slowness, times):
    """Both contenders of a round are slowed alike, each round otherwise: the ratio stays."""
    ones = [Contender(name=name, measure=lambda: Measured(images=1, seconds=1), against=("A",)) for name in "AB"]
    measured = {
        "A": [Measured(images=100, seconds=slow) for slow in slowness],
        "B": [Measured(images=100, seconds=slow / times) for slow in slowness],
    }
    a, b = rounds.compare(ones, measured)
    assert a.ratio == 1
    assert b.ratio == pytest.approx(times, abs=1e-4)
    assert a.spread >= 0


def test_only_chooses_by_a_part_of_the_name_and_names_what_there_is():
    ones = [
        Contender(name=name, measure=lambda: Measured(images=1, seconds=1), against=("slow",))
        for name in ("slow", "fast")
    ]
    assert [one.name for one in rounds.choose(ones, ["as"])] == ["fast"]
    assert rounds.choose(ones, []) == ones
    with pytest.raises(UserError, match=r"'quick'.*slow; fast"):
        rounds.choose(ones, ["fast", "quick"])
    found = rounds.result(ones[1:], {"fast": [Measured(images=3, seconds=1, more={"x": 2.0})]}, device="cpu")
    assert found.rows[0].ratio is None
    assert found.conditions["details"] == {"fast": {"rounds": [3.0], "x": 2.0}}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["speed"], "speed"),
        (["loader", "--rounds", "0"], "--rounds"),
        (["loader", "--seconds", "x"], "--seconds"),
        (["loader", "--shards", "nowhere"], "nowhere"),
        (["loader", "--json", "no/folder.json"], "no/folder.json"),
        (["step", "--recipe", "slow"], "slow"),
        (["ranks", "--processes", "1,1"], "1,1"),
        (["recipe", "--accuracy", "97.5"], "0.975"),
        (["recipe", "--seeds", "a"], "--seeds"),
    ],
)
def test_a_mistake_is_one_line(flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "stay_on", lambda cores: cores)
    from mnistm_dist.errors import run_cli

    try:
        code = run_cli(bench.main, flags)
    except SystemExit as left:
        code = left.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert line.startswith("error: ")
    assert named in line
    assert not list(tmp_path.iterdir())


def test_profile_writes_a_trace_of_some_steps_after_a_warm_up(door, small_set, tmp_path):
    flags = ("--shards", small_set, "--recipe", "fast", "--batch-size", 16, "--image-size", 16, "--max-steps", 10)
    worked(door("train", *flags, "--threads", 1, "--tracker", "none", "--run-dir", "run", "--profile-steps", 2))
    traces = tmp_path / "run" / "profile"
    assert {path.name for path in traces.iterdir()} == {"operators-step-00000005.txt", "trace-step-00000005.json.gz"}
    assert "convolution" in (traces / "operators-step-00000005.txt").read_text()
    with gzip.open(traces / "trace-step-00000005.json.gz") as file:
        steps = {event["name"] for event in json.load(file)["traceEvents"] if "ProfilerStep" in event.get("name", "")}
    assert steps == {"ProfilerStep#5", "ProfilerStep#6"}


@pytest.mark.parametrize(("steps", "ranks_folder"), [(0, True), (3, False)])
def test_without_steps_or_a_folder_nothing_is_traced(tmp_path, steps, ranks_folder):
    folder = tmp_path / "profile" if ranks_folder else None
    with traced(folder, steps=steps, first_step=0) as step_traced:
        for _ in range(20):
            step_traced()
    assert not list(tmp_path.iterdir())
