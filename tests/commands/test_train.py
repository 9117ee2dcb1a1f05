"""``train``: the numbers of a plain loop, the same bits at 1 and 2 processes, a complete run folder."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TEST, TRAIN, VAL, error_of, output_of
from safetensors.torch import load_file
from torch.nn import functional

from mnistm_dist import predict, report, train
from mnistm_dist.cli import parse_train_flags
from mnistm_dist.data.order import FullOrder
from mnistm_dist.data.resident import open_resident
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.training.models import create_model
from mnistm_dist.training.resume import choose_start
from mnistm_dist.training.run_dir import read_log

QUICK = ("--tracker", "none", "--threads", "1", "--no-report")
"""Without W&B and figures; one thread per process, so that 1 and 2 processes can be compared."""


def losses(run) -> list[float]:
    return [row["train/loss"] for row in read_log(run / "log.jsonl") if row["kind"] == "train"]


def newest_model(run) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").iterdir()) / "model.safetensors")


def test_baselines_first_steps_are_those_of_a_plain_loop(run_command, small_set, cache_dir, tmp_path):
    flags = ("--recipe", "baseline", "--batch-size", 32, "--max-steps", 3, "--log-every", 1, *QUICK)
    output_of(run_command("train", "--shards", small_set, "--run-dir", "run", *flags))

    shards = ShardSet.open(small_set)
    data = open_resident(shards, "train", cache_dir=cache_dir, device="cpu", workers=1)
    split = shards.manifest.splits["train"]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (split.mean, split.std))
    model = create_model(10, seed=0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.95, 0.999), weight_decay=5e-4)
    ids = FullOrder(size=split.count, seed=0).ids(np.arange(96)).reshape(3, 32)
    plain = []
    torch.set_num_threads(1)
    for step in range(3):
        images = (data.images[ids[step]].permute(0, 3, 1, 2).float() / 255 - mean) / std
        images = functional.interpolate(images, (64, 64), mode="bilinear", align_corners=False)
        loss = functional.cross_entropy(model(images), data.labels[ids[step]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plain.append(loss.item())
    assert losses(tmp_path / "run") == pytest.approx(plain, abs=1e-5)


def test_two_processes_are_bit_for_bit_one_with_two_micro_batches(run_command, small_set, tmp_path):
    """Parameters and losses after 8 steps; BatchNorm's running statistics are over rank 0's half of the images."""
    flags = (
        "--recipe",
        "fast",
        "--batch-size",
        32,
        "--micro-batch",
        16,
        "--image-size",
        28,
        "--max-steps",
        8,
        "--log-every",
        1,
    )
    for world_size in (1, 2):
        out = output_of(
            run_command(
                "train", "--shards", small_set, "--run-dir", f"w{world_size}", *flags, *QUICK, world_size=world_size
            )
        )
        assert json.loads((tmp_path / f"w{world_size}" / "summary.json").read_text())["world_size"] == world_size
        assert "32 = 2 x 16" in out
    one, two = newest_model(tmp_path / "w1"), newest_model(tmp_path / "w2")
    parameters = [name for name, _ in create_model(10, 0).named_parameters()]
    assert all(torch.equal(one[name], two[name]) for name in parameters)
    assert len(losses(tmp_path / "w1")) == 8
    assert losses(tmp_path / "w1") == losses(tmp_path / "w2")


def test_a_run_leaves_a_complete_folder(run_command, small_set, tmp_path):
    out = output_of(
        run_command(
            "train",
            "--shards",
            small_set,
            "--run-dir",
            "run",
            "--batch-size",
            32,
            "--image-size",
            "28,32",
            "--epochs",
            2,
            *QUICK,
            "--report",
        )
    )
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert names >= {
        *(
            "config.yaml",
            "environment.json",
            "state.json",
            "log.jsonl",
            "summary.json",
            "report.html",
            "learning_curve.png",
        ),
        *(
            f"{kind}_{split}.{ending}"
            for split in ("val", "test")
            for kind, ending in (("confusion_matrix", "png"), ("mistakes", "png"), ("predictions", "csv"))
        ),
    }
    assert ".lock" not in names
    assert json.loads((run / "state.json").read_text()) == {"state": "finished", "step": 20, "reason": None}
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["epochs"], summary["parameters"], summary["recipe"]) == (20, 2, 692_106, "fast")
    for split, size in (("val", VAL), ("test", TEST)):
        scores = summary[split]
        matrix = np.array(scores["confusion_matrix"])
        assert scores["total"] == matrix.sum() == size
        assert scores["correct"] == np.trace(matrix)
        assert scores["accuracy"] == scores["correct"] / size
    rows = read_log(run / "log.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [10, 20]
    assert [row["image_size"] for row in rows if row["kind"] == "evaluation"] == [28, 32]
    best = max(
        (row for row in rows if row["kind"] == "evaluation"), key=lambda row: (row["val/accuracy"], -row["step"])
    )
    assert summary["checkpoint"]["step"] == best["step"]
    assert summary["val"]["accuracy"] == best["val/accuracy"]
    for part in ("world size", "precision", "threads", "692,106", f"{TRAIN:,} train", "20 steps, 2 epochs"):
        assert part in out, part
    for part in (r"optimizer +muon", r"learning rate +0\.00565685, one-cycle", r"seed +0", r"tracker +none"):
        assert re.search(part, out), part
    for part in ("run run\n", "recipe fast", "python -m mnistm_dist.predict run IMAGE"):
        assert out.count(part) <= 1, f"said twice: {part}"
    assert [row["epoch"] for row in rows if row["kind"] == "evaluation"] == [1, 2], "counted as in the console"
    trained = [row for row in rows if row["kind"] == "train"]
    assert all(0.05 < row["train/peak_memory_gb"] <= summary["peak_memory_gb"] for row in trained)
    pictures = list((run / "mistakes" / "test").glob("*.png"))
    assert 0 < len(pictures) == min(36, summary["test"]["total"] - summary["test"]["correct"])


def test_a_model_that_gives_one_answer_ends_with_a_warning(run_command, small_set, tmp_path, monkeypatch):
    wild = ("--optimizer", "sgd", "--learning-rate", 1000, "--lr-schedule", "constant", "--max-grad-norm", 0.1)
    flags = ("--batch-size", 32, "--image-size", 16, "--max-steps", 2, "--ema-decay", 0, "--log-every", 1, *wild)
    out = output_of(run_command("train", "--shards", small_set, "--run-dir", "a run", *flags, *QUICK))
    assert "warning: the " in out.splitlines()[-1]
    assert "use a smaller --learning-rate, or train for more steps" in out.splitlines()[-1]
    # Quoted for a shell, and accepted.
    assert "python -m mnistm_dist.train --resume 'a run' --max-steps none\n" in out
    monkeypatch.chdir(tmp_path)
    start = choose_start(parse_train_flags(["--resume", "a run", "--max-steps", "none"]))
    assert start is not None
    assert start[1].step == 2
    assert "python -m mnistm_dist.report 'a run'" in out


def test_a_dry_run_estimates_memory_and_time_and_writes_nothing(run_command, small_set, tmp_path):
    flags = ("--batch-size", 32, "--image-size", "16,32", "--epochs", 2, "--run-dir", "run", *QUICK)
    out = output_of(run_command("train", "--shards", small_set, "--dry-run", *flags))
    assert "  order: full" in out, "the configuration, resolved"
    for part in (r"dry run: run is not written", r"training +20 steps, 2 epochs", r"peak memory +\d\.\d\d GB"):
        assert re.search(part, out), part
    assert re.search(r"time +about \d+(\.\d)? s of training and evaluation", out)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "runs").exists()


def test_the_printed_configuration_is_a_recipe(run_main, tmp_path):
    flags = ("--epochs", 3, "--image-size", "32,48")
    done = run_main(train.main, "--print-config", *flags)
    assert done.returncode == 0
    (tmp_path / "own.yaml").write_text(done.stdout)
    again = run_main(train.main, "--print-config", "--recipe", "own.yaml")
    assert again.stdout == done.stdout.replace("recipe: fast", "recipe: own.yaml")
    assert "epochs: 3" in done.stdout


def test_without_a_test_split_the_last_step_is_evaluated(run_command, small_set, tmp_path, monkeypatch):
    from conftest import part_of_the_sample

    from mnistm_dist.data.packing.writer import pack

    pack(part_of_the_sample({"train": 64, "val": 31}), tmp_path / "set")
    output_of(
        run_command(
            "train",
            "--shards",
            "set",
            "--run-dir",
            "run",
            "--batch-size",
            32,
            "--image-size",
            28,
            "--epochs",
            3,
            *QUICK,
        )
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["checkpoint"]["step"], summary["checkpoint"]["chosen"]) == (6, "last")
    assert "test" not in summary


def test_the_debug_recipe_runs_the_sanity_checks(run_command, small_set, tmp_path):
    out = output_of(
        run_command(
            "train", "--recipe", "debug", "--shards", small_set, "--run-dir", "run", "--threads", 1, "--no-report"
        )
    )
    assert "one batch overfitted" in out
    assert abs(losses(tmp_path / "run")[0] - math.log(10)) < 0.7


def test_the_norm_in_the_log_is_that_of_before_the_clipping(run_command, small_set, tmp_path):
    quick = ("--image-size", 28, "--batch-size", 32, "--max-steps", 1, "--threads", 1, "--no-report")
    norms = {}
    for clip in (0, 0.001):
        output_of(
            run_command("train", "--shards", small_set, "--run-dir", f"run-{clip}", "--max-grad-norm", clip, *quick)
        )
        rows = [row for row in read_log(tmp_path / f"run-{clip}" / "log.jsonl") if row["kind"] == "train"]
        norms[clip] = rows[0]["train/gradient_norm"]
    assert norms[0] == pytest.approx(norms[0.001], rel=1e-5)
    assert norms[0] > 0.1


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.soak)]
)
def test_a_compiled_step_learns_the_same(run_command, small_set, tmp_path, world_size):
    quick = ("--image-size", 28, "--batch-size", 32, "--micro-batch", 8, "--max-steps", 12, "--log-every", 1, *QUICK)
    for flag in ("--compile", "--no-compile"):
        flags = ("--shards", small_set, "--run-dir", flag[2:], flag, *quick)
        output_of(run_command("train", *flags, world_size=world_size, timeout=900))
    assert losses(tmp_path / "compile") == pytest.approx(losses(tmp_path / "no-compile"), rel=1e-2)
    scores = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("compile", "no-compile")]
    assert scores[0]["val"]["log_loss"] == pytest.approx(scores[1]["val"]["log_loss"], rel=0.05)


def test_max_steps_cuts_the_run_and_not_its_schedule(run_command, small_set, tmp_path):
    flags = ("--shards", small_set, "--batch-size", 32, "--image-size", 28, "--epochs", 2, "--log-every", 1, *QUICK)
    output_of(run_command("train", "--run-dir", "whole", *flags))
    output_of(run_command("train", "--run-dir", "cut", "--max-steps", 7, *flags))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")[:7]
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert (summary["steps"], summary["val"]["total"], summary["test"]["total"]) == (7, VAL, TEST)


@pytest.mark.slow
def test_without_shards_the_bundled_sample_is_packed_first(run_command, tmp_path):
    flags = ("--recipe", "debug", "--max-steps", 2, *QUICK, "--run-dir")
    output_of(run_command("train", *flags, "first"))
    manifest = (tmp_path / "shards" / "sample" / "manifest.json").read_bytes()
    output_of(run_command("train", *flags, "second"))
    assert (tmp_path / "shards" / "sample" / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--shards", "nowhere"], "nowhere"),
        (["--shards", "shards/sample"], "shards/sample"),
        (["--learning-rat", "0.1"], "Perhaps you meant: --learning-rate"),
        (["--recipe", "fats"], "did you mean fast?"),
        (["--batch-size", 33, "--micro-batch", 16], "33"),
        (["--batch-size", 32, "--micro-batch", 12], "12"),
        (["--batch-size", 1], "micro_batch"),
        (["--recipe", "slow"], "slow"),
        (["--epochs", "x"], "--epochs"),
        (["--precision", "bf16"], "emulated"),
        (["--expect-world-size", 2], "world size: found 1"),
        (["--stop-signals", "SIGKILL"], "SIGKILL"),
        (["--resume", "auto"], "--run-dir"),
        (["--resume", "nowhere"], "nowhere"),
        (["--cache-dir", "/proc/none"], "/proc/none"),
        (["--run-dir", "/proc/none"], "/proc/none"),
        (["--order", "full", "--reader", "streaming"], "windowed"),
    ],
)
def test_a_user_error_is_one_line_and_makes_no_run_folder(run_main, small_set, tmp_path, flags, named):
    if "--shards" not in flags:
        flags = ["--shards", small_set, *flags]
    assert named in error_of(run_main(train.main, *flags))
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "shards").exists()


def test_a_path_that_is_missing_is_named_with_the_nearest_one(run_main, tmp_path):
    (tmp_path / "sets" / "official").mkdir(parents=True)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert "(did you mean sets/official?)" in error_of(run_main(train.main, "--shards", "sets/offical"))
    assert "(did you mean runs/first?)" in error_of(run_main(report.main, "runs/fist"))
    assert "(did you mean runs/first?)" in error_of(run_main(predict.main, "runs/fist", "image.png"))


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_was(run_main, small_set, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine")
    assert "not empty" in error_of(run_main(train.main, "--shards", small_set, "--run-dir", "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_damaged_shard_is_refused_by_name_though_the_cache_is_warm(run_main, small_set, tmp_path):
    shutil.copytree(small_set, tmp_path / "set")
    flags = ("--shards", "set", "--cache-dir", "cache", "--batch-size", 8, "--image-size", 16, "--max-steps", 1, *QUICK)
    output_of(run_main(train.main, *flags, "--run-dir", "first"))
    shard = tmp_path / "set" / "train-000003.tar"
    data = shard.read_bytes()
    for content in (data[: len(data) // 1024 * 512], data[:700] + bytes([data[700] ^ 1]) + data[701:], None):
        shard.unlink()
        if content is not None:
            shard.write_bytes(content)
        assert "train-000003.tar" in error_of(run_main(train.main, *flags, "--run-dir", "second"))
        shard.write_bytes(data)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("order", "data", "world_size"),
    [
        ("full", "resident", 2),
        ("windowed", "streaming", 2),
        *(
            pytest.param(*reading, world_size, marks=pytest.mark.slow)
            for reading in (("full", "resident"), ("windowed", "resident"), ("windowed", "streaming"))
            for world_size in (1, 2, 4)
            if (*reading, world_size) not in (("full", "resident", 2), ("windowed", "streaming", 2))
        ),
    ],
)
def test_training_consumes_the_images_that_plan_prints(run_command, small_set, tmp_path, order, data, world_size):
    """The ranks record what they consume, across the end of an epoch: 320 is no multiple of the batch size 48."""
    flags = (
        "--order",
        order,
        "--reader",
        data,
        "--shuffle-streams",
        4,
        "--shuffle-window",
        16,
        "--batch-size",
        48,
        "--micro-batch",
        12,
    )
    run = ("--max-steps", 9, "--image-size", 16, "--seed", 3, "--run-dir", "run")
    recording = {"world_size": world_size, "before": "injected:record_batches"}
    output_of(run_command("train", "--shards", small_set, *flags, *run, *QUICK, **recording))
    shards = ShardSet.open(small_set)
    consumed = [
        [json.loads(line) for line in (tmp_path / f"consumed-{rank}.jsonl").read_text().splitlines()]
        for rank in range(world_size)
    ]
    assert [step for step, _ in consumed[0]] == list(range(9))
    for step in (0, 5, 6, 8):
        arguments = ("run", "--step", step, "--world-size", world_size, "--json")
        result = json.loads(output_of(run_command("plan", *arguments)))
        assert result["ranks"] == [shards.keys("train", steps[step][1]) for steps in consumed]


def test_a_non_finite_loss_names_the_step_its_images_and_the_last_good_checkpoint(run_command, small_set, tmp_path):
    wild = ("--optimizer", "sgd", "--learning-rate", "1e20", "--lr-schedule", "constant", "--checkpoint-every", 1)
    flags = ("--batch-size", 32, "--image-size", 16, "--epochs", 1, "--max-steps", 9, "--run-dir", "run")
    line = error_of(run_command("train", "--shards", small_set, *flags, *wild, *QUICK))
    step = int(line.split("loss of step ")[1].split()[0])
    shards = ShardSet.open(small_set)
    first = FullOrder(size=TRAIN, seed=0).ids(np.arange(step * 32, step * 32 + 1))
    assert shards.keys("train", first)[0] in line
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert checkpoints[-1] in line
    assert int(checkpoints[-1][5:]) <= step
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "failed"
