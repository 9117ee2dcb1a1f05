"""The benchmarks measure what they claim, at tiny sizes. No test measures speed."""

import json
import os
import subprocess

import pytest
import torch
from conftest import TRAIN
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import __main__ as command
from benchmarks import logs, measure, runs, steps
from benchmarks.loader import OtherReaders, loader
from benchmarks.measure import Contender
from benchmarks.options import Loader, Logs, Options, Ranks, Recipe, Rounds, Startup, Step
from mnistm_dist.errors import UserError, run_cli

# torchvision 0.29 deprecates the decoder with which WebDataset is measured.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")

ROW = {"name", "output", "images_per_second", "ratio", "against", "spread"}
TINY = {"batch_size": 16, "image_size": 16, "steps": 2, "threads": 1, "rounds": 1}


@pytest.fixture
def common(small_set, cache_dir, tmp_path, monkeypatch, environment):
    """The options of a benchmark of the small set, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    # The last is set by the command.
    for variable, value in {**environment, "WDS_SECURE": "1"}.items():
        monkeypatch.setenv(variable, value)
    threads = torch.get_num_threads()
    yield {"shards": str(small_set), "cache_dir": cache_dir}
    torch.set_num_threads(threads)


def checked(result: measure.Result) -> measure.Result:
    """Check the format of a result."""
    assert set(result) == {"rows", "conditions"}
    for row in result["rows"]:
        assert set(row) == ROW
        assert row["output"] in ("uint8", "model-ready")
        assert row["spread"] >= 0
    assert {"machine", "versions", "threads", "load_average_after", "set"} <= {*result["conditions"]}
    assert result["conditions"]["counts"]["train"] == TRAIN
    assert {*result["conditions"]["details"]} == {row["name"] for row in result["rows"]}
    return result


def pairs(result: measure.Result) -> set[tuple[str, str]]:
    """Return what was compared with what."""
    return {(row["name"], row["against"]) for row in result["rows"]}


def test_loader_compares_readers_in_two_groups(common):
    result = checked(loader(Loader(**common, rounds=1, seconds=0.01, images=40, batch_size=16)))
    groups = {"uint8": "WebDataset, to uint8", "model-ready": "WebDataset, as its docs show it"}
    assert all(row["against"] == groups[row["output"]] and row["ratio"] > 0 for row in result["rows"])
    assert {row["name"] for row in result["rows"]} >= {
        *("resident, uint8", "streaming, uint8", "first launch, uint8"),
        *("WebDataset, to uint8", "WebDataset, to uint8 by torchvision"),
        *("resident", "streaming", "WebDataset, as its docs show it", "ImageFolder and DataLoader"),
    }
    assert not list(common["cache_dir"].glob("bench-*"))


def test_the_other_readers_return_the_packed_images(common, tmp_path):
    options = Loader(**common, batch_size=16, images=40, image_size=16)
    readers = OtherReaders(options, measure.open_set(options), str(tmp_path)).by_output()
    for read in readers["model-ready"].values():
        batch = next(read())
        assert (batch.shape, batch.dtype) == ((16, 3, 16, 16), torch.float32)
    for read in readers["uint8"].values():
        batch = next(read())
        assert (batch.numel(), batch.dtype) == (16 * 3 * 28 * 28, torch.uint8)


def test_step_compares_a_bare_loop_with_a_plain_script_with_its_variants_and_with_a_loop_made_for_speed(common):
    result = checked(steps.step(Step(**common, **TINY, compile=False, only=("bare", "plain", "airbench"))))
    utilisation = result["conditions"]["model_flops_utilisation"]
    assert utilisation.keys() == {name for name, _ in pairs(result)}
    assert all(0 < share < 1 for share in utilisation.values())
    assert pairs(result) >= {
        ("airbench-style loop", "plain script"),
        ("plain script", "plain script"),
        ("bare loop", "plain script"),
        ("bare loop, one prepared batch", "bare loop"),
        ("bare loop, contiguous", "bare loop"),
    }


def test_logs_compares_a_trainer_that_logs_with_a_silent_one(common, capsys):
    pytest.importorskip("tensorboard", reason='needs pip install "mnistm-dist[trackers]"')
    result = checked(logs.logs(Logs(**common, **TINY, log_every=1)))
    assert pairs(result) == {("console and TensorBoard", "neither"), ("neither", "neither")}
    assert capsys.readouterr().out == "", "the console of the training is a terminal of its own"


@pytest.mark.slow
def test_step_measures_the_trainer_in_a_process_of_its_own(common):
    result = checked(steps.step(Step(**common, **TINY, compile=False, only=("trainer",))))
    assert pairs(result) == {("trainer", name) for name in ("bare loop", "airbench-style loop", "plain script")}
    assert result["conditions"]["details"]["trainer"]["peak_megabytes"][0] > 100


@pytest.mark.gpu
def test_step_measures_the_idle_time_and_the_memory_of_a_gpu(common):
    details = steps.step(Step(**common, **TINY))["conditions"]["details"]
    assert 0 <= details["bare loop"]["gpu_waits_share"][0] <= 1
    assert details["bare loop"]["kernels_per_step"][0] > 100
    assert details["trainer"]["gpu_peak_megabytes"][0] > 0


@pytest.mark.slow
def test_ranks_run_two_processes_and_measure_the_share_of_communication(common):
    result = checked(steps.ranks(Ranks(**common, **TINY, only=("2 processes", "plain"))))
    assert pairs(result) == {
        ("plain script, 2 threads", "plain script, 2 threads"),
        ("2 processes", "1 process"),
        ("2 processes", "plain script, 2 threads"),
        ("2 processes, reproducible", "2 processes"),
        ("bare loop, 2 processes", "2 processes"),
    }
    assert result["conditions"]["details"]["bare loop, 2 processes"]["communication_share"][0] < 1


@pytest.mark.slow
def test_startup_launches_with_an_empty_and_with_a_full_cache(common):
    before = sorted(common["cache_dir"].glob("sets/*"))
    result = checked(runs.startup(Startup(**common, rounds=1, batch_size=16, threads=1, recipe="debug")))
    assert pairs(result) == {("first launch", "first launch"), ("second launch", "first launch")}
    for extra in result["conditions"]["details"].values():
        assert extra["seconds_to_the_first_step"][0] >= extra["seconds_to_the_run_folder"][0] > 0
        assert extra["peak_megabytes"][0] > 100
    assert sorted(common["cache_dir"].glob("sets/*")) == before
    assert not list(common["cache_dir"].glob("bench-*"))


@pytest.mark.slow
def test_recipe_stops_at_the_accuracy_and_reads_an_existing_run(common, tmp_path):
    (tmp_path / "tiny.yaml").write_text("steps: {epochs: 30, batch_size: 32, image_size: [16]}")
    options = Recipe(**common, recipe=("tiny.yaml",), seeds=(3,), threads=1, runs=tmp_path / "kept", accuracy=0.01)
    result = checked(runs.recipe(options))
    (row,) = result["rows"]
    assert (row["name"], row["against"], row["ratio"]) == ("tiny.yaml", "tiny.yaml", 1)
    (run,) = result["conditions"]["details"]["tiny.yaml"]["runs"]
    assert (run["seed"], run["reached"], run["image_size"], run["images"]) == (3, True, 16, TRAIN)
    log = tmp_path / "kept" / "tiny-seed3" / "log.jsonl"
    written = log.read_bytes()
    assert max(row["step"] for row in runs.read_log(log.parent)) < 30 * TRAIN // 32
    assert runs.recipe(options)["conditions"]["details"] == result["conditions"]["details"]
    with pytest.raises(UserError, match=r"tiny-seed3: holds a run of tiny\.yaml, seed 3"):
        runs.train_to_accuracy(options, "other/tiny.yaml", 3, log.parent)
    assert log.read_bytes() == written


def test_the_pauses_between_launches_do_not_count(tmp_path):
    (tmp_path / "config.yaml").write_text("{recipe: x, steps: {seed: 4, batch_size: 32}, machine: {threads: 1}}")
    rows = [
        {"kind": "start", "step": 0, "time": 100.0},
        {"kind": "train", "step": 10, "time": 107.0},
        {"kind": "evaluation", "step": 10, "val/accuracy": 0.5, "image_size": 28, "time": 108.0},
        {"kind": "preempted", "step": 15, "time": 110.0},
        {"kind": "resume", "step": 15, "time": 5000.0},
        {"kind": "evaluation", "step": 20, "val/accuracy": 0.9, "image_size": 64, "time": 5005.0},
        {"kind": "train", "step": 30, "time": 9000.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr')
    reached = runs.read_run(tmp_path, accuracy=0.8, epoch_images=TRAIN)
    assert {**reached, "seconds": 15.0, "images": 640, "epochs": 2.0, "reached": True, "image_size": 64} == reached
    beyond = runs.read_run(tmp_path, accuracy=0.95, epoch_images=TRAIN)
    assert {**beyond, "reached": False, "accuracy": 0.9, "images": 960} == beyond
    row = runs.compare_recipes("x", [reached, beyond], [reached], "y")
    assert (row["ratio"], row["images_per_second"]) == (None, None)


def test_a_training_that_fails_is_an_error_with_its_message(common, tmp_path):
    with pytest.raises(UserError, match=r"exit code 2: .*nowhere"):
        runs.train(Options(**common), tmp_path / "run", "--recipe", "nowhere", until=lambda rows: False)


def test_the_memory_of_a_process_is_its_own():
    with subprocess.Popen(["sleep", "60"]) as process:
        peaks = [runs.memory_megabytes(pid)[0] for pid in (process.pid, os.getpid())]
        process.kill()
    assert 0 < peaks[0] < 50 < peaks[1]
    assert runs.memory_megabytes(process.pid)[0] == 0


def contender(name: str, values: list[float] | None = None, called: list[str] | None = None) -> Contender:
    """Return a contender whose rounds give ``values``, and which adds its name to ``called``."""
    rates = iter(values or [1.0] * 9)

    def one_round() -> measure.Measurement:
        (called if called is not None else []).append(name)
        return {"images_per_second": next(rates), "x": 2.0}

    return Contender(name=name, measure=one_round, against=("A",))


def test_rounds_are_interleaved_and_the_warm_up_does_not_count(common):
    called: list[str] = []
    contenders = [contender(name, [10.0, 2.0, 4.0], called) for name in "ABC"]
    result = checked(measure.run(Rounds(**common, rounds=2), contenders, warm_up=1, device="x"))
    assert "".join(called) == "ABCABCABC"
    assert result["conditions"]["details"]["B"] == {"images_per_second": [2.0, 4.0], "x": [2.0, 2.0]}
    assert result["conditions"]["device"] == "x"
    assert result["rows"][0] == {
        **{"name": "A", "output": "model-ready", "images_per_second": 3.0, "ratio": 1.0, "against": "A"},
        "spread": 0.6667,
    }


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.floats(0.1, 10))
def test_a_ratio_does_not_change_when_a_whole_round_is_slower(slowness, times):
    measured = {
        "A": [{"images_per_second": 100 / slow} for slow in slowness],
        "B": [{"images_per_second": 100 / slow * times} for slow in slowness],
    }
    a, b = measure.compare([contender("A"), contender("B")], measured)
    assert a["ratio"] == 1
    assert b["ratio"] == pytest.approx(times, abs=1e-4)
    assert a["spread"] >= 0


def test_only_selects_by_a_part_of_the_name_and_names_the_choices(common):
    contenders = [contender(name) for name in ("A", "fast")]
    (row,) = checked(measure.run(Rounds(**common, only=("as",)), contenders, warm_up=0))["rows"]
    assert (row["name"], row["ratio"]) == ("fast", None)
    with pytest.raises(UserError, match=r"'quick'.*A; fast"):
        measure.run(Rounds(**common, only=("fast", "quick")), contenders, warm_up=0)


def test_json_holds_the_rows_and_the_conditions(common, tmp_path, monkeypatch, capsys):
    pinned: list[list[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: pinned.append(cores))
    flags = ["--shards", common["shards"], "--cache-dir", str(common["cache_dir"]), "--json", "out.json"]
    only = "first launch,WebDataset, to uint8 by"
    assert command.main(["loader", *flags, "--rounds", "1", "--seconds", "0.1", "--only", only]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert set(document) == {"bench", "rows", "conditions"}
    assert document["bench"] == "loader"
    checked({"rows": document["rows"], "conditions": document["conditions"]})
    assert pinned == [document["conditions"]["cores"]]
    assert len(pinned[0]) == document["conditions"]["threads"] == 1
    out = capsys.readouterr().out
    assert all(row["name"] in out for row in document["rows"])


def test_a_gpu_that_does_not_work_is_one_line(common, monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run_cli(command.main, ["step", "--shards", common["shards"]]) == 2
    assert "cuda:0 on " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["speed"], "speed"),
        (["loader", "--rounds", "0"], "--rounds"),
        (["loader", "--seconds", "x"], "--seconds"),
        (["loader", "--shards", "nowhere"], "nowhere"),
        (["loader", "--json", "no/folder.json"], "no/folder.json"),
        (["recipe", "--accuracy", "97.5"], "97.5"),
        (["recipe", "--seeds", "a"], "--seeds"),
    ],
)
def test_a_user_error_names_the_flag_and_exits_with_2(flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None)
    monkeypatch.setenv("WDS_SECURE", "1")
    try:
        code = run_cli(command.main, flags)
    except SystemExit as error:
        code = error.code
    assert code == 2
    message = capsys.readouterr().err
    assert named in message
    assert "Traceback" not in message
    assert not list(tmp_path.iterdir())
