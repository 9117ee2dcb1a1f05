"""A run killed at any instant resumes, and ends like an uninterrupted one."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import error_of, launcher, output_of, part_of_the_sample
from processes import Started, alive, wait_until_gone
from safetensors.torch import load_file

from mnistm_dist import config as configuration
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.training.models import create_model
from mnistm_dist.training.run_dir import read_log, read_state

FLAGS = (
    *("--precision", "fp32"),
    *("--recipe", "fast", "--batch-size", "32", "--micro-batch", "16", "--image-size", "28", "--epochs", "4"),
    *("--checkpoint-every", "3", "--log-every", "4", "--threads", "1", "--tracker", "none", "--no-report"),
)
STEPS = 40


def final_model(run: Path) -> bytes:
    return (run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors").read_bytes()


def learning(run: Path) -> list[tuple]:
    """Return the losses and metrics of the log, without times and speeds."""
    names = ("step", "epoch", "train/loss", "train/learning_rate", "val/loss", "val/accuracy")
    return [
        tuple(row.get(n) for n in names)
        for row in read_log(run / "log.jsonl")
        if row["kind"] in ("train", "evaluation")
    ]


def started(environment: dict[str, str], cwd: Path, world_size: int, *flags: object) -> subprocess.Popen[str]:
    """Start a run by a real launcher, in its own process group."""
    command = [sys.executable, *launcher(world_size), "-m", "mnistm_dist.train", *map(str, flags)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process: subprocess.Popen[str] | Started, run: Path, step: int) -> None:
    """Wait until the log has the step. Fail if the process ends before."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(row["step"] >= step for row in read_log(run / "log.jsonl")):
            return
        time.sleep(0.02)
    if process.poll() is None:
        pytest.fail(f"step {step} did not come in two minutes")
    pytest.fail(process.command.stderr.read_text() if isinstance(process, Started) else process.stdout.read())


@pytest.fixture(scope="module")
def reference(small_set, cache_dir, tmp_path_factory) -> Path:
    """The uninterrupted run of one process; at two its parameters are the same (test_train.py)."""
    from mnistm_dist.train import main

    os.environ["MNISTM_DIST_CACHE"] = str(cache_dir)
    run = tmp_path_factory.mktemp("runs") / "reference"
    assert main(["--shards", str(small_set), "--run-dir", str(run), *FLAGS]) == 0
    return run


def kill_and_resume(start, tmp_path, small_set, world_size: int, kills: int, seed: int) -> Path:
    """Kill a run's process group ``kills`` times, at random moments or during a save; then let it finish."""
    generator, run = random.Random(seed), tmp_path / f"killed-{world_size}-{seed}"
    flags = ("--shards", small_set, "--run-dir", run, "--resume", "auto", *FLAGS)
    done = 0
    for kill in range(kills):
        process = start("train", *flags, world_size=world_size)
        wait_for_step(process, run, done + 2)
        if kill % 2:
            # During a save: its folder has its temporary name.
            deadline = time.monotonic() + 10
            while not list((run / "checkpoints").glob(".step-*")) and time.monotonic() < deadline:
                pass
        else:
            time.sleep(generator.random() * 0.3)
        process.kill()
        steps = [int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")]
        done = max(steps, default=0)
        assert read_state(run)["state"] == "running"
    output_of(start("train", *flags, world_size=world_size).wait(200))
    return run


def test_a_run_killed_three_times_ends_byte_for_byte_like_an_uninterrupted_one(start, tmp_path, small_set, reference):
    run = kill_and_resume(start, tmp_path, small_set, 1, kills=3, seed=0)
    assert final_model(run) == final_model(reference)
    assert learning(run) == learning(reference)
    assert (run / "predictions_test.csv").read_bytes() == (reference / "predictions_test.csv").read_bytes()


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("world_size", [1, 2])
def test_twenty_kills_do_not_change_the_result(start, tmp_path, small_set, world_size):
    whole = kill_and_resume(start, tmp_path, small_set, world_size, kills=0, seed=0)
    for seed in range(1, 6):
        run = kill_and_resume(start, tmp_path, small_set, world_size, kills=4, seed=seed)
        assert final_model(run) == final_model(whole), seed
        assert learning(run) == learning(whole), seed


@pytest.mark.parametrize(("first", "then"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_run_resumes_on_another_number_of_processes(start, run_command, tmp_path, small_set, reference, first, then):
    run = tmp_path / "run"
    flags = ("--shards", small_set, "--run-dir", run, "--resume", "auto", *FLAGS)
    process = start("train", *flags, world_size=first)
    wait_for_step(process, run, 12)
    process.kill()
    output_of(run_command("train", *flags, world_size=then))
    assert [row["world_size"] for row in read_log(run / "log.jsonl") if row["kind"] in ("start", "resume")] == [
        first,
        then,
    ]
    trained = [row[:4] for row in learning(run) if row[4] is None]
    assert trained == [row[:4] for row in learning(reference) if row[4] is None]
    left = load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")
    right = load_file(reference / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")
    assert all(torch.equal(left[name], right[name]) for name, _ in create_model(10, 0).named_parameters())


def interrupted(environment, tmp_path, small_set, world_size: int, number: signal.Signals, **extra: str) -> Path:
    """Send a signal to the launcher of a run, and wait until no process of it is left."""
    run = tmp_path / "run"
    flags = ("--shards", small_set, "--run-dir", run, *FLAGS)
    process = started({**environment, **extra}, tmp_path, world_size, *flags)
    wait_for_step(process, run, 8)
    asked = time.monotonic()
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    wait_until_gone(run, 15 - (time.monotonic() - asked))
    assert process.returncode == (75 if world_size == 1 else 1), out[-3000:]
    state = read_state(run)
    assert (state["state"], state["reason"]) == ("preempted", number.name)
    return run


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)),
    ],
)
def test_a_signal_saves_and_exits_with_75_and_the_run_resumes(
    environment, run_command, tmp_path, small_set, reference, number
):
    run = interrupted(environment, tmp_path, small_set, 1, number)
    output_of(run_command("train", "--resume", run))
    assert final_model(run) == final_model(reference)
    assert learning(run) == learning(reference)


@pytest.mark.parametrize("extra", [["--max-steps", "2"], ["--expect-world-size", "3"]], ids=["finished", "refused"])
def test_a_training_called_from_python_restores_the_signal_handlers(small_set, run_main, extra):
    from mnistm_dist.train import main

    listened = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in listened]
    done = run_main(main, "--shards", small_set, "--run-dir", "run", *FLAGS, *extra)
    assert done.returncode == (2 if "--expect-world-size" in extra else 0), done.stderr
    assert [signal.getsignal(number) for number in listened] == before


@pytest.mark.slow
def test_sigterm_to_the_launcher_of_two_saves_and_no_process_is_left(environment, tmp_path, small_set):
    run = interrupted(environment, tmp_path, small_set, 2, signal.SIGTERM)
    saved = max((run / "checkpoints").glob("step-*"))
    assert read_state(run)["step"] == int(saved.name[5:])


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_sigterm_to_the_launcher_ten_times(environment, tmp_path, small_set):
    for attempt in range(10):
        (tmp_path / str(attempt)).mkdir()
        interrupted(environment, tmp_path / str(attempt), small_set, 2, signal.SIGTERM)


@pytest.mark.slow
def test_the_trainer_of_a_killed_launcher_saves_and_exits(environment, tmp_path, small_set):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "-m", "mnistm_dist.train"]
    process = subprocess.Popen(
        [*command, "--shards", small_set, "--run-dir", run, *FLAGS],
        cwd=tmp_path,
        env={**environment, "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_step(process, run, 8)
    process.kill()
    process.wait()
    wait_until_gone(run, 15)
    assert read_state(run)["state"] == "preempted"


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_on_all_ranks(environment, tmp_path, small_set):
    run = tmp_path / "run"
    process = started(environment, tmp_path, 2, "--shards", small_set, "--run-dir", run, *FLAGS)
    wait_for_step(process, run, 8)
    victim = next(pid for pid in alive(run) if b"RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1
    wait_until_gone(run, 35)
    assert read_state(run)["state"] in ("failed", "preempted")


def test_a_resume_of_a_finished_run_reports_that_it_is_finished(run_command, reference):
    done = run_command("train", "--resume", reference)
    assert "is finished" in output_of(done) + done.stderr
    assert "--max-steps" not in done.stderr


def test_a_run_that_max_steps_ended_reports_how_to_continue(run_command, small_set, tmp_path):
    output_of(run_command("train", "--shards", small_set, "--run-dir", "run", "--max-steps", 3, *FLAGS))
    done = run_command("train", "--resume", "run")
    assert "to train beyond its --max-steps: --resume run --max-steps none" in output_of(done) + done.stderr
    output_of(run_command("train", "--resume", "run", "--max-steps", 5))
    assert read_state(tmp_path / "run") == {"state": "finished", "step": 5, "reason": None}


@pytest.fixture
def preempted(tmp_path, reference) -> Path:
    """A copy of the reference run that can be resumed at its last step."""
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run" / "state.json").write_text('{"state": "preempted", "step": 40, "reason": "SIGTERM"}')
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--seed", "3"], "seed was 0, now 3"),
        (["--batch-size", "64"], "batch_size was 32, now 64"),
        (["--recipe", "baseline"], "optimizer was muon, now adam"),
    ],
)
def test_a_resume_of_another_run_is_refused_with_the_difference(run_main, preempted, flags, named):
    from mnistm_dist.train import main

    assert named in error_of(run_main(main, "--resume", preempted, *flags))


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("target", "flags", "named"),
    [
        (".", ["--epochs", "20"], "epochs was 4, now 20"),
        (".", ["--max-steps", "2"], "max_steps: 2, but"),
        (f"checkpoints/step-{STEPS:08d}", ["--max-steps", str(STEPS)], f"max_steps: {STEPS}, but"),
    ],
)
def test_flags_that_a_finished_run_cannot_follow_are_refused_and_change_nothing(
    run_main, reference, target, flags, named
):
    from mnistm_dist.train import main

    before = contents(reference)
    assert named in error_of(run_main(main, "--resume", reference / target, *flags))
    assert contents(reference) == before


def edit_config(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("learning_rate: 0.016", "learning_rate: 0.02", "learning_rate was 0.016, now 0.02"),
        ("  - 28\n", "  - 28\n  - 32\n", "image_size was [28], now [28, 32]"),
        ("order: full", "order: windowed", "order was full, now windowed"),
    ],
)
def test_an_edited_configuration_is_refused_with_both_values_and_nothing_is_changed(
    run_main, preempted, old, new, named
):
    from mnistm_dist.train import main

    edit_config(preempted, old, new)
    before = contents(preempted)
    assert named in error_of(run_main(main, "--resume", preempted))
    assert contents(preempted) == before


def edit_checkpoints(run: Path, **learning: object) -> None:
    for path in (run / "checkpoints").glob("*/state.json"):
        document = json.loads(path.read_text())
        document["scalars"]["learning"] |= learning
        path.write_text(json.dumps(document))


def test_a_resume_on_another_kind_of_device_may_change_the_precision_and_warns(run_main, preempted):
    from mnistm_dist.train import main

    edit_config(preempted, "precision: fp32", "precision: bf16")
    edit_checkpoints(preempted, precision="bf16")
    assert "precision was bf16, now fp32" in error_of(run_main(main, "--resume", preempted, "--precision", "fp32"))
    edit_checkpoints(preempted, device="NVIDIA H100")
    out = output_of(run_main(main, "--resume", preempted, "--precision", "fp32", "--threads", 2))
    for line in (
        "warning: precision: bf16 until now, fp32 from here on",
        "warning: device: NVIDIA H100 until now, cpu from here on",
        "warning: threads: 1 until now, 2 from here on",
    ):
        assert line in out


def test_a_checkpoint_of_a_version_that_stored_less_is_resumed(run_main, preempted):
    from mnistm_dist.train import main

    for path in (preempted / "checkpoints").glob("*/state.json"):
        document = json.loads(path.read_text())
        del document["scalars"]["learning"]
        document["scalars"] |= {"micro_batch": 16, "threads": 1}
        path.write_text(json.dumps(document))
    output_of(run_main(main, "--resume", preempted))
    assert read_state(preempted)["state"] == "finished"


def test_later_checkpoints_and_their_results_are_set_aside_with_a_line(run_main, preempted, reference):
    """The set-aside folder is a run folder: it can be evaluated."""
    from mnistm_dist.evaluate import main as evaluate
    from mnistm_dist.train import main

    earlier, *later = sorted(path.name for path in (preempted / "checkpoints").iterdir())
    (preempted / "mistakes").mkdir()
    (preempted / "mistakes" / "val.png").write_bytes(b"pictures of the report")
    before = contents(preempted)
    out = output_of(
        run_main(main, "--resume", preempted / "checkpoints" / earlier, "--max-steps", int(earlier[5:]) + 1)
    )
    (aside,) = preempted.glob("set-aside-*")
    assert f"{', '.join(later)} and any results were moved to {aside}" in out
    moved = contents(aside)
    assert {name: before[name] for name in moved} == moved
    assert {
        *(f"checkpoints/{name}/state.json" for name in later),
        "summary.json",
        "log.jsonl",
        "mistakes/val.png",
    } <= moved.keys()
    assert not (preempted / "mistakes").exists()
    summary = json.loads((preempted / "summary.json").read_text())
    assert (summary["steps"], summary["checkpoint"]["step"]) == (int(earlier[5:]) + 1, int(earlier[5:]) + 1)
    assert max(row["step"] for row in read_log(preempted / "log.jsonl")) == int(earlier[5:]) + 1
    output_of(run_main(evaluate, aside))
    assert contents(aside) == moved


@pytest.mark.parametrize("torn", [True, False], ids=["all checkpoints torn", "none yet"])
def test_a_run_without_a_complete_checkpoint_starts_anew_with_its_own_configuration(run_main, preempted, torn):
    from mnistm_dist.train import main

    edit_config(preempted, "max_steps: null", "max_steps: 1")
    before = configuration.load(preempted / "config.yaml")
    for path in (preempted / "checkpoints").iterdir():
        if torn:
            (path / "model.safetensors").write_bytes(b"torn")
        else:
            shutil.rmtree(path)
    done = run_main(main, "--resume", preempted)
    assert ("were moved to" in output_of(done)) == torn
    after = configuration.load(preempted / "config.yaml")
    assert after == dataclasses.replace(before, run=after.run)
    assert json.loads((preempted / "summary.json").read_text())["steps"] == 1


@pytest.mark.slow
def test_a_missing_best_checkpoint_does_not_stop_the_run(run_command, tmp_path, reference):
    """It was pruned for a better one, which was damaged later."""
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    path = sorted(run.glob("checkpoints/step-*"))[-2]
    state = json.loads((path / "state.json").read_text())
    state["scalars"]["history"]["best"] = {"step": 7, "accuracy": 1.0, "image_size": 28}
    (path / "state.json").write_text(json.dumps(state))
    output_of(run_command("train", "--resume", path))
    assert json.loads((run / "summary.json").read_text())["checkpoint"]["step"] > state["step"]


def test_a_resume_on_other_shards_is_refused(run_main, preempted, tmp_path):
    from mnistm_dist.train import main

    pack(part_of_the_sample({"train": 320, "val": 31}), tmp_path / "other")
    assert "not the set that the run was started with" in error_of(
        run_main(main, "--resume", preempted, "--shards", "other")
    )


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_alive(start, run_command, tmp_path, small_set):
    run = tmp_path / "run"
    process = start("train", "--shards", small_set, "--run-dir", run, *FLAGS, "--epochs", 40)
    wait_for_step(process, run, 4)
    assert "held by a live run" in error_of(
        run_command("train", "--shards", small_set, "--run-dir", run, "--resume", "auto", *FLAGS, "--epochs", 40)
    )
    process.kill()
