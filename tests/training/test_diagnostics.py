"""``--profile-steps`` traces some steps after a warm-up."""

import gzip
import json

import pytest
from conftest import error_of, output_of

from mnistm_dist import train
from mnistm_dist.training import diagnostics
from mnistm_dist.training.diagnostics import profile_steps


def test_profile_writes_a_trace_of_some_steps_after_a_warm_up(run_command, small_set, tmp_path):
    flags = ("--shards", small_set, "--recipe", "fast", "--batch-size", 16, "--image-size", 16, "--max-steps", 10)
    output_of(
        run_command("train", *flags, "--threads", 1, "--tracker", "none", "--run-dir", "run", "--profile-steps", 2)
    )
    traces = tmp_path / "run" / "profile"
    assert {path.name for path in traces.iterdir()} == {"operators-step-00000005.txt", "trace-step-00000005.json.gz"}
    assert "convolution" in (traces / "operators-step-00000005.txt").read_text()
    with gzip.open(traces / "trace-step-00000005.json.gz") as file:
        steps = {event["name"] for event in json.load(file)["traceEvents"] if "ProfilerStep" in event.get("name", "")}
    assert steps == {"ProfilerStep#5", "ProfilerStep#6"}


@pytest.mark.parametrize(("steps", "ranks_folder"), [(0, True), (3, False)])
def test_without_steps_or_a_folder_nothing_is_traced(tmp_path, steps, ranks_folder):
    folder = tmp_path / "profile" if ranks_folder else None
    with profile_steps(folder, steps=steps, first_step=0) as step_traced:
        for _ in range(20):
            step_traced()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("limit", "named"), [("INITIAL_LOSS_TOLERANCE", "the initial loss is"), ("OVERFIT_LOSS", "cannot be overfitted")]
)
def test_a_failed_sanity_check_is_one_line(run_main, tiny_set, monkeypatch, limit, named):
    monkeypatch.setattr(diagnostics, "OVERFIT_STEPS", 2)
    monkeypatch.setattr(diagnostics, limit, -1.0)
    flags = ("--recipe", "debug", "--batch-size", 8, "--image-size", 16, "--run-dir", "run", "--tracker", "none")
    assert named in error_of(run_main(train.main, "--shards", tiny_set, *flags, "--sanity-checks", "--threads", 1))
