"""Images and models of one's own: packed, trained, killed, resumed, reported, predicted, exported; and from Python."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import own_models
import pytest
from conftest import ROOT, VAL, error_of, output_of
from PIL import Image
from test_resume import wait_for_step

from mnistm_dist import __version__, load_model, train
from mnistm_dist.config import build, load, read_recipe
from mnistm_dist.errors import UserError
from mnistm_dist.evaluate import main as evaluate
from mnistm_dist.reporting.runs import read_run
from mnistm_dist.training.run_dir import read_log

QUICK = ("--batch-size", 8, "--image-size", 32, "--threads", 1, "--tracker", "none")
CLASSES = {"cat": (200, 120, 40), "dog": (40, 90, 200), "fish": (30, 180, 90)}


@pytest.fixture
def photos(tmp_path):
    """A folder for each of three classes, of JPEGs in many sizes."""
    random = np.random.default_rng(0)
    for name, colour in CLASSES.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(20):
            height, width = random.integers(40, 120, 2)
            pixels = np.clip(np.array(colour) + random.normal(0, 30, (height, width, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.jpg")
    return tmp_path / "photos"


def test_own_photos_and_an_own_model_are_packed_trained_reported_predicted_and_exported(run_command, tmp_path, photos):
    output_of(run_command("pack", "photos", "--resize", 32, "--out", "set"))
    flags = ("--recipe", "images", "--model", "own_models:small", "--epochs", 6, "--learning-rate", 0.02)
    out = output_of(
        run_command("train", "--shards", "set", "--run-dir", "run", *flags, *QUICK, "--ema-decay", 0, world_size=2)
    )
    assert "own_models:small, 1,443 parameters" in out
    assert "million per image, forward at 32 px" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["model"], summary["parameters"]) == ("own_models:small", 1443)
    assert summary["flops_per_image"] == 2 * (15 * 15 * 8 * 27 + 7 * 7 * 16 * 72 + 16 * 3)
    output_of(run_command("report", "run"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "own_models:small" in page
    assert all(name in page for name in CLASSES)
    rows = json.loads(output_of(run_command("predict", "run", "photos/dog", "--json")))
    assert [row["predicted"] for row in rows].count(1) > 15
    formats = ["torch", "onnx"] if importlib.util.find_spec("onnxruntime") else ["torch"]
    for name in formats:
        assert "compared" in output_of(run_command("export", "run", "--to", name, "--out", name))
    output_of(run_command("evaluate", "run"))
    assert load_model(tmp_path / "run").classes == tuple(CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--model", "torchvision:resnet18", "--ema-decay", 0.9),
        ("--model", "own_models:small", "--ema-decay", 0),
        ("--model", "own_models:Odd", "--optimizer", "muon"),
        ("--model", "torchvision:efficientnet_b0", "--reproducible", "--micro-batch", 8),
    ],
    ids=lambda flags: flags[1],
)
def test_two_processes_that_are_killed_and_resumed_end_byte_for_byte_like_whole_ones(start, tmp_path, small_set, flags):
    flags = ("--shards", small_set, "--batch-size", 32, "--image-size", 32, "--threads", 1, "--tracker", "none", *flags)
    flags = (*flags, "--max-steps", 8, "--checkpoint-every", 3, "--log-every", 1, "--no-report")
    output_of(start("train", *flags, "--run-dir", "whole", world_size=2).wait(600))
    process = start("train", *flags, "--run-dir", "killed", world_size=2)
    wait_for_step(process, tmp_path / "killed", 5)
    process.kill()
    output_of(start("train", "--resume", "killed", world_size=2).wait(600))
    launches = [row["step"] for row in read_log(tmp_path / "killed" / "log.jsonl") if row["kind"] == "resume"]
    assert launches[0] >= 3
    for file in ("checkpoints/step-00000008/model.safetensors", "predictions_test.csv"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def recall_of_5(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return (probabilities.argmax(axis=1)[labels == 5] == 5).mean()


def fields(small_set) -> dict[str, object]:
    return {
        **{"shards": small_set, "run_dir": "run", "batch_size": 32, "image_size": [28, 32], "epochs": 2},
        **{"threads": 1, "tracker": "none", "seed": 3, "compile": False},
    }


def test_train_in_python_is_the_command_with_metrics_of_ones_own(tmp_path, monkeypatch, small_set):
    monkeypatch.chdir(tmp_path)
    metrics = {"recall_of_5": recall_of_5, "nothing": lambda probabilities, labels: float("nan")}
    summary = train(fields(small_set), model=own_models.small, metrics=metrics)
    run = tmp_path / "run"
    assert summary == {**json.loads((run / "summary.json").read_text()), "run_dir": "run"}
    config = load(run / "config.yaml")
    assert (config.network.model, config.steps.image_size, config.steps.seed) == ("own_models:small", (28, 32), 3)
    record = read_run(run, __version__)
    predictions = record.predictions["val"]
    expected = recall_of_5(predictions.probabilities, predictions.labels)
    assert len(predictions.labels) == VAL
    assert summary["val"]["custom"] == {"recall_of_5": expected, "nothing": None}
    evaluated = [row for row in read_log(run / "log.jsonl") if row["kind"] == "evaluation"]
    assert [row["val/recall_of_5"] for row in evaluated if row["step"] == summary["checkpoint"]["step"]] == [expected]
    page = (run / "report.html").read_text()
    assert "recall_of_5" in page
    # Finished: nothing to do, and the same answer.
    assert train({**fields(small_set), "resume": "auto"}, model="own_models:small") == summary
    # The command has no metrics of one's own: those of this checkpoint stay.
    assert evaluate(["run"]) == 0
    assert json.loads((run / "summary.json").read_text())["val"]["custom"] == summary["val"]["custom"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, "--epoch=3; Perhaps you meant: --epochs"),
        ({"epochs": "many"}, "--epochs: found 'many'; should be a valid integer"),
        ({"model": "own_models:smal"}, "did you mean small"),
    ],
)
def test_what_is_wrong_in_python_is_an_error_in_one_line(tmp_path, monkeypatch, small_set, given, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        train({**fields(small_set), **given})
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be imported by its name"):
        train(fields(small_set), model=lambda classes: own_models.small(classes))
    with pytest.raises(UserError, match="metrics: accuracy: the package's own have this name"):
        train(fields(small_set), metrics={"accuracy": recall_of_5})
    with pytest.raises(ZeroDivisionError):
        train(fields(small_set), metrics={"bad": lambda probabilities, labels: 1 / 0})
    assert not (tmp_path / "run").exists()


def test_a_whole_configuration_is_accepted(tmp_path, monkeypatch, small_set):
    monkeypatch.chdir(tmp_path)
    given = {"shards": str(small_set), "max_steps": 1, "report": False, "tracker": "none", "threads": 1}
    config = build("debug", read_recipe("debug") | given)
    summary = train(config)
    assert (summary["recipe"], summary["steps"]) == ("debug", 1)
    assert summary["run_dir"].startswith("runs/debug-")


SCRIPT = """
import json, os, sys
from mnistm_dist import train
import own_models

def mean_confidence(probabilities, labels):
    return probabilities.max(axis=1).mean()

if __name__ == "__main__":
    summary = train(json.loads(sys.argv[1]), model=own_models.small, metrics={"confidence": mean_confidence})
    with open(f"summary-{os.environ['RANK']}.json", "w") as file:
        json.dump(summary, file)
"""


@pytest.mark.slow
def test_a_script_with_train_runs_under_torchrun(environment, tmp_path, small_set):
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    given = json.dumps({**fields(small_set), "shards": str(small_set)})
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [*launcher, "script.py", given],
        cwd=tmp_path,
        env={**environment, **paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summaries = [json.loads((tmp_path / f"summary-{rank}.json").read_text()) for rank in (0, 1)]
    assert summaries[0] == summaries[1]
    assert summaries[0]["world_size"] == 2
    assert 0 < summaries[0]["test"]["custom"]["confidence"] <= 1
    assert "val/confidence" in (tmp_path / "run" / "log.jsonl").read_text()


def test_importing_the_package_stays_light():
    code = (
        "import sys, mnistm_dist; print('tyro' in sys.modules, 'torch' in sys.modules)\n"
        "from mnistm_dist import train; print('torch' in sys.modules, callable(train), callable(mnistm_dist.train))\n"
        "from mnistm_dist.train import main; from mnistm_dist import train as again; print(callable(again))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False", "True", "True", "True"]


def test_a_missing_module_of_a_run_is_named(run_main, tmp_path, small_set):
    from mnistm_dist.predict import main as predict
    from mnistm_dist.train import main

    flags = ("--shards", small_set, "--run-dir", "run", "--max-steps", 1, *QUICK, "--no-report")
    assert run_main(main, *flags, "--model", "own_models:small").returncode == 0
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("own_models:small", "gone:small"))
    message = f"error: model gone:small: no module gone in {tmp_path}, nor installed; start the command in the folder"
    assert message in error_of(run_main(predict, "run", "picture.png"))


def test_an_unknown_model_is_refused_before_a_set_is_fetched(run_main):
    from mnistm_dist.train import main

    nowhere = ("--shards", "https://127.0.0.1:1/set", "--model", "torchvision:resnet19")
    assert "did you mean torchvision:resnet18?" in error_of(run_main(main, *nowhere))
