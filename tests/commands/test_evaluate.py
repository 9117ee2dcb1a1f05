"""Exact evaluation: every image once, the same file at every world size."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import VAL, error_of, output_of

from mnistm_dist import evaluate
from mnistm_dist.run_lock import RunLock
from mnistm_dist.training import checkpoint as checkpoints

FILES = ("predictions_val.csv", "predictions_test.csv")


@pytest.fixture(scope="module")
def run(small_set, cache_dir, tmp_path_factory) -> Path:
    """A run trained and evaluated by one process."""
    import os

    from mnistm_dist.train import main

    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--batch-size", "32", "--image-size", "28", "--epochs", "2", "--threads", "1", "--no-report"]
    os.environ["MNISTM_DIST_CACHE"] = str(cache_dir)
    assert main(["--shards", str(small_set), "--run-dir", str(folder), *flags]) == 0
    return folder


def test_the_predictions_are_the_same_bytes_at_every_world_size(run, run_command):
    """97 and 53 images, both prime, in one canonical batch each: at 2 and 3 processes some ranks have none."""
    before = {name: (run / name).read_bytes() for name in FILES}
    for world_size in (1, 2, 3):
        for name in FILES:
            (run / name).unlink()
        output_of(run_command("evaluate", run, world_size=world_size))
        assert {name: (run / name).read_bytes() for name in FILES} == before


def test_every_image_is_there_once_in_manifest_order(run, small_set):
    from mnistm_dist.data.shards import ShardSet

    shards = ShardSet.open(small_set)
    rows = [line.split(",") for line in (run / "predictions_val.csv").read_text().splitlines()]
    assert rows[0] == ["key", "label", "predicted", *(f"p{digit}" for digit in range(10))]
    assert [row[0] for row in rows[1:]] == shards.keys("val", range(VAL))
    assert [int(row[1]) for row in rows[1:]] == shards.labels("val").tolist()
    for row in rows[1:]:
        probabilities = [float(p) for p in row[3:]]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert probabilities.index(max(probabilities)) == int(row[2])


def test_a_checkpoint_and_a_split_can_be_chosen(run, run_command):
    out = output_of(run_command("evaluate", run, "--checkpoint", "last", "--split", "val"))
    assert "val" in out
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["checkpoint"]["step"], summary["checkpoint"]["chosen"]) == (20, "last")
    # The result on test was that of another checkpoint.
    assert ("val" in summary, "test" in summary) == (True, False)
    output_of(run_command("evaluate", run, "--checkpoint", "last", "--split", "test"))
    assert json.loads((run / "summary.json").read_text()).keys() >= {"val", "test"}
    output_of(run_command("evaluate", run, "--checkpoint", run / "checkpoints" / "step-00000010"))
    assert json.loads((run / "summary.json").read_text())["checkpoint"]["step"] == 10


def test_the_report_is_written_anew_with_the_results_of_one_checkpoint(trained_run, run_command, tmp_path):
    copy = shutil.copytree(trained_run, tmp_path / "run")
    (copy / "report.html").unlink()
    out = output_of(run_command("evaluate", copy, "--checkpoint", "last", "--split", "val"))
    assert f"report            {copy / 'report.html'}" in out
    page = (copy / "report.html").read_text()
    assert "Evaluated checkpoint: step 20 (last)" in page
    # The result on test is that of another checkpoint, unless that was the last one, too.
    chosen = json.loads((trained_run / "summary.json").read_text())["checkpoint"]["chosen"]
    assert ("Mistakes, test" in page, "predictions_test.csv: of another checkpoint" in page) == (False, True), chosen


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "nowhere"),
        (["RUN", "--checkpoint", "nowhere"], "nowhere"),
        (["RUN", "--shards", "nowhere"], "nowhere"),
        (["RUN", "--split", "train"], "--split"),
    ],
)
def test_a_user_error_is_one_line(run, run_command, arguments, named):
    assert named in error_of(run_command("evaluate", *(run if a == "RUN" else a for a in arguments)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has more precisions")
def test_a_run_in_a_precision_that_this_machine_lacks_is_scored_in_fp32(run, run_command, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    output = output_of(run_command("evaluate", copy, "--split", "val"))
    assert "warning" not in output
    predictions = (copy / "predictions_val.csv").read_bytes()
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("precision: fp32", "precision: bf16"))
    output = output_of(run_command("evaluate", copy, "--split", "val"))
    assert "warning: precision: bf16 is not native here; evaluating in fp32" in output
    assert (copy / "predictions_val.csv").read_bytes() == predictions


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_while_a_run_lives_results_are_printed_or_written_to_out_and_never_into_the_run(run, run_main, tmp_path):
    with RunLock(run):
        before = contents(run)
        out = output_of(run_main(evaluate.main, run, "--split", "val"))
        assert f"{run}: in use by another process; results are printed only" in out
        assert f"of {VAL} " in out
        assert "predictions_val.csv" not in out
        out = output_of(run_main(evaluate.main, run, "--split", "val", "--out", "new/folder"))
        assert "new/folder/predictions_val.csv" in out
        # The heartbeat of the lock is not a result.
        assert {**contents(run), ".lock": b""} == {**before, ".lock": b""}
    assert json.loads((tmp_path / "new" / "folder" / "summary.json").read_text())["val"]["total"] == VAL


def test_a_checkpoint_that_is_pruned_meanwhile_is_one_line(run, run_main, tmp_path, monkeypatch):
    copy, load_model = shutil.copytree(run, tmp_path / "run"), checkpoints.load_model

    def prune_first(path, model):
        shutil.rmtree(path)
        load_model(path, model)

    monkeypatch.setattr(checkpoints, "load_model", prune_first)
    named = copy / "checkpoints" / "step-00000010"
    for _ in ("before its weights are read", "before it is opened"):
        line = error_of(run_main(evaluate.main, copy, "--checkpoint", named, "--split", "val"))
        assert f"{named}" in line
        assert "No such file" in line
        assert "use another checkpoint" in line


def test_a_configuration_that_no_training_has_resolved_is_evaluated(run, run_main, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    text = (copy / "config.yaml").read_text()
    shards = next(line for line in text.splitlines() if line.startswith("  shards:"))
    (copy / "config.yaml").write_text(f"data:\n{shards}\n")
    output_of(run_main(evaluate.main, copy, "--split", "val"))
