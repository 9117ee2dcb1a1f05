"""``runs list`` and ``runs prune``, and several seeds in one launch."""

import json
import os
import statistics
import subprocess
import sys
import time

import pytest
from conftest import error_of, output_of
from run_folders import write_run

from mnistm_dist import report, runs
from mnistm_dist.run_lock import RunLock

SMALL = {"val_size": 60, "test_split": False, "epochs": 2, "steps_per_epoch": 4, "resume_at": None}
QUICK = ("--batch-size", 32, "--image-size", 16, "--max-steps", 4, "--threads", 1, "--tracker", "none")


@pytest.fixture
def folder(tmp_path):
    """Three runs: finished with three checkpoints, preempted, and killed before its first checkpoint."""
    for name, state, steps in (
        ("good", "finished", (2, 4, 8)),
        ("group/cut", "preempted", (4,)),
        ("dead", "running", ()),
    ):
        run = write_run(tmp_path / "runs" / name, seed=len(name), **SMALL)
        (run / "state.json").write_text(json.dumps({"state": state, "step": max(steps, default=1), "reason": None}))
        for path in (run / "checkpoints").iterdir():
            path.rmdir()
        for step in steps:
            (run / "checkpoints" / f"step-{step:08d}").mkdir()
            (run / "checkpoints" / f"step-{step:08d}" / "model.safetensors").write_bytes(bytes(1_000_000))
        summary = json.loads((run / "summary.json").read_text())
        summary["checkpoint"]["step"] = 4
        (run / "summary.json").write_text(json.dumps(summary))
        if state != "finished":
            (run / "summary.json").unlink()
    return tmp_path / "runs"


def test_a_list_has_every_run_with_its_result_so_far(folder, run_main):
    rows = json.loads(output_of(run_main(runs.main, "list", "--json")))
    assert [row["name"] for row in rows] == ["dead", "good", "group/cut"]
    assert [row["state"] for row in rows] == ["killed", "finished", "preempted"]
    # A killed run has not written its last step; its log has it.
    assert [row["step"] for row in rows] == [8, 8, 4]
    assert all(row.keys() == {"name", "recipe", "state", "step", "val_accuracy", "seconds"} for row in rows)
    summary = json.loads((folder / "good" / "summary.json").read_text())
    assert (rows[1]["val_accuracy"], rows[1]["seconds"]) == (summary["val"]["accuracy"], summary["train_seconds"])
    # Without a result: the last evaluation in the log.
    assert 0.4 < rows[2]["val_accuracy"] < 1


def test_a_run_counts_as_running_while_a_process_holds_it_and_as_killed_after_sigkill(folder, run_main):
    code = "import sys; from pathlib import Path; from mnistm_dist.run_lock import RunLock"
    code = f"{code}; lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(folder / "dead")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"held\n"
        assert "running" in output_of(run_main(runs.main, "list", "--filter", "dead"))
        owner.kill()
    assert (folder / "dead" / ".lock").exists()
    assert "killed" in output_of(run_main(runs.main, "list", "--filter", "dead"))
    output_of(run_main(report.main, folder / "dead"))
    assert " · killed · step 8" in (folder / "dead" / "report.html").read_text()


def test_a_list_is_sorted_and_filtered(folder, run_main):
    lines = output_of(run_main(runs.main, "list", folder, "--sort", "step")).splitlines()
    assert [line.split()[0] for line in lines] == ["name", "dead", "good", "group/cut"]
    assert "val accuracy" in lines[0]
    lines = output_of(run_main(runs.main, "list", "--filter", "preempted")).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["group/cut"]


def test_prune_says_what_it_would_free_and_frees_it_with_yes(folder, run_main):
    before = sorted(folder.rglob("*"))
    out = output_of(run_main(runs.main, "prune"))
    assert "runs/good/checkpoints/step-00000002" in out
    assert "runs/dead" in out
    assert "would be freed: run again with --yes" in out
    assert "group/cut" not in out
    assert sorted(folder.rglob("*")) == before
    assert " MB  freed" in output_of(run_main(runs.main, "prune", "--yes"))
    assert not (folder / "dead").exists()
    left = [path.name for path in sorted((folder / "good" / "checkpoints").iterdir())]
    assert left == ["step-00000004", "step-00000008"], "that of the result, and the last"
    assert (folder / "group" / "cut" / "checkpoints" / "step-00000004").exists()


def test_prune_leaves_a_run_that_is_in_use(folder, run_main):
    lock = folder / "dead" / ".lock"
    with RunLock(folder / "dead"):
        os.utime(lock, (time.time(), time.time()))
        assert "runs/dead" not in output_of(run_main(runs.main, "prune", "--yes"))
    assert (folder / "dead" / "config.yaml").exists()


def test_only_run_folders_are_listed_and_pruned(folder, run_main):
    # A recipe of one's own, a model that was exported to the Hub, another project.
    (folder / "config.yaml").write_text("recipe: fast\n")
    for name, files in (
        ("hub", ("config.yaml", "state.json", "model.safetensors")),
        ("other", ("config.yaml", "a.py")),
    ):
        (folder / name).mkdir()
        for file in files:
            (folder / name / file).write_text("{}")
    # A run whose folder holds another one.
    good = folder / "good" / "config.yaml"
    write_run(folder / "dead" / "inner", seed=0, **SMALL)
    names = [row["name"] for row in json.loads(output_of(run_main(runs.main, "list", "--json")))]
    assert names == ["dead", "dead/inner", "good", "group/cut"]
    output_of(run_main(runs.main, "prune", "--yes"))
    assert all(path.exists() for path in (folder / "hub" / "state.json", folder / "other" / "a.py", good))
    assert (folder / "dead" / "inner" / "summary.json").exists()


def test_a_folder_that_is_missing_is_a_user_error(run_main):
    assert "nowhere: no such folder" in error_of(run_main(runs.main, "list", "nowhere"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_several_seeds_are_whole_runs_and_are_compared(run_command, small_set, tmp_path, world_size):
    flags = ("--shards", small_set, *QUICK, "--run-dir", "group")
    out = output_of(run_command("train", "--seeds", "0,1", *flags, world_size=world_size))
    accuracies = []
    for seed in (0, 1):
        run = tmp_path / "group" / f"seed-{seed}"
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["seed"], summary["world_size"]) == (seed, world_size)
        assert json.loads((run / "state.json").read_text())["state"] == "finished"
        command = json.loads((run / "environment.json").read_text())["command"]
        assert "--seeds" not in command
        assert command.endswith(f"--seed {seed} --run-dir group/seed-{seed}"), "it repeats this run alone"
        accuracies.append(100 * summary["val"]["accuracy"])
    assert f"val: mean {statistics.fmean(accuracies):.2f} % of 2 seeds, standard deviation" in out
    assert "seed-0, seed-1" in (tmp_path / "group" / "report.html").read_text()
    if world_size == 1:
        # The same run, bit for bit, as one of its own.
        output_of(run_command("train", "--seed", 1, *flags[:-1], "alone"))
        both = [(tmp_path / name / "predictions_val.csv").read_bytes() for name in ("group/seed-1", "alone")]
        assert both[0] == both[1]


def test_seeds_that_are_finished_are_skipped_at_a_resume(run_command, small_set, tmp_path):
    flags = ("--shards", small_set, *QUICK, "--no-report", "--run-dir", "group", "--resume", "auto")
    output_of(run_command("train", "--seeds", "0", *flags))
    model = tmp_path / "group" / "seed-0" / "checkpoints" / "step-00000004" / "model.safetensors"
    written = model.stat().st_mtime_ns
    out = output_of(run_command("train", "--seeds", "0,1", *flags))
    assert model.stat().st_mtime_ns == written
    assert "of 2 seeds" in out
    assert "of 2 seeds" in output_of(run_command("train", "--seeds", "0,1", *flags)), "nothing is left but to compare"


@pytest.mark.parametrize("flags", [("--seeds", "0,x", "--run-dir", "a"), ("--seeds", "0,1")])
def test_seeds_need_numbers_and_a_run_folder(run_main, small_set, tmp_path, flags):
    from mnistm_dist import train

    assert "should be numbers such as 0,1,2, with --run-dir RUN" in error_of(
        run_main(train.main, "--shards", small_set, *flags)
    )
    assert not (tmp_path / "a").exists()
