"""Run folders of a seeded synthetic classifier: test data for everything that reads a run."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from mnistm_dist import __version__
from mnistm_dist import config as configuration
from mnistm_dist.errors import UserError
from mnistm_dist.reporting.metrics import Metrics, measure
from mnistm_dist.run_lock import LOCK_NAME, RunLock

CLASSES = tuple(str(digit) for digit in range(10))
Matrix = list[list[int]]
BATCH_SIZE = 100
START_TIME = 1_760_000_000.0
ARCHITECTURE = [
    {"name": name, "layer": layer, "output_shape": shape, "parameters": parameters}
    for name, layer, shape, parameters in (
        ("conv1", "Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)", [64, 32, 32], 9408),
        ("bn1", "BatchNorm2d(64)", [64, 32, 32], 128),
        ("maxpool", "MaxPool2d(kernel_size=3, stride=2, padding=1)", [64, 16, 16], 0),
        ("layer1.0", "BasicBlock(64 -> 64)", [64, 16, 16], 73984),
        ("layer1.1", "BasicBlock(64 -> 64)", [64, 16, 16], 73984),
        ("layer2.0", "BasicBlock(64 -> 128, stride 2)", [128, 8, 8], 230144),
        ("layer2.1", "BasicBlock(128 -> 128)", [128, 8, 8], 295424),
        ("avgpool", "AdaptiveAvgPool2d(1)", [128, 1, 1], 0),
        ("fc.0", "Linear(128, 64)", [64], 8256),
        ("fc.1", "BatchNorm1d(64)", [64], 128),
        ("fc.2", "GELU()", [64], 0),
        ("fc.3", "Linear(64, 10)", [10], 650),
    )
]


def metrics_of_matrix(matrix: Matrix) -> Metrics:
    """Return the metrics of predictions with this confusion matrix."""
    classes = tuple(str(i) for i in range(len(matrix)))
    return Metrics(classes=classes, confusion_matrix=tuple(map(tuple, matrix)), log_loss=0.1, calibration_error=0.0)


def synthetic_labels(count: int, seed: int, absent: tuple[int, ...] = ()) -> np.ndarray:
    """Return random digits, int64 (count,), none of them in ``absent``."""
    present = [digit for digit in range(10) if digit not in absent]
    return np.random.default_rng(seed).choice(present, size=count).astype(np.int64)


def synthetic_probabilities(labels: np.ndarray, accuracy: float, seed: int, always: int | None = None) -> np.ndarray:
    """Return probabilities, float64 (N, 10), six decimals, of about this accuracy; 4 and 9, 1 and 7 are confused."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.0, 1.0, (len(labels), 10))
    logits[np.arange(len(labels)), labels] += 6.0
    wrong = rng.random(len(labels)) >= accuracy
    alike = {4: 9, 9: 4, 1: 7, 7: 1, 3: 5, 5: 3}
    for i in np.flatnonzero(wrong):
        other = alike.get(int(labels[i]), int(rng.integers(10))) if rng.random() < 0.7 else int(rng.integers(10))
        logits[i, other] += 5.0 + rng.normal(0.0, 2.0)
    if always is not None:
        logits[:, always] += 30.0
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.round(powers / powers.sum(axis=1, keepdims=True), 6)


def synthetic_images(labels: np.ndarray, seed: int, size: int = 32) -> list[np.ndarray]:
    """Return uint8 (size, size, 3) each: noise over a colour, and one bar for each unit of the label."""
    rng = np.random.default_rng(seed)
    images = []
    for label in labels:
        image = rng.integers(0, 90, (size, size, 3)) + rng.integers(0, 100, 3)
        for bar in range(int(label)):
            image[2 + 3 * bar : 4 + 3 * bar, 4 : size - 4] = 255 - image[2 + 3 * bar : 4 + 3 * bar, 4 : size - 4]
        images.append(image.astype(np.uint8))
    return images


def log_rows(
    epochs: int, steps_per_epoch: int, final_accuracy: float, seed: int, resume_at: int | None
) -> list[dict[str, Any]]:
    """Return the rows of a log: one-cycle learning rate, the first third at 32 px, a resume at ``resume_at``."""
    rng = np.random.default_rng(seed)
    total = epochs * steps_per_epoch
    rows: list[dict[str, Any]] = [{"kind": "start", "step": 0, "world_size": 2, "time": START_TIME}]
    for step in range(1, total + 1):
        share, time = step / total, START_TIME + 0.3 * step
        size = 32 if share <= 1 / 3 else 64
        if step == resume_at:
            rows.append({"kind": "preempted", "step": step - 1, "world_size": 2, "time": time})
            rows.append({"kind": "resume", "step": step - 1, "world_size": 1, "time": time + 60})
        rows.append(
            {
                "kind": "train",
                "step": step,
                "epoch": (step - 1) // steps_per_epoch + 1,
                "train/loss": 0.12 + 2.2 * math.exp(-6 * share) + abs(rng.normal(0, 0.05)),
                "train/learning_rate": 4e-3 * math.sin(math.pi * share) ** 2,
                "train/images_per_second": 700.0 + rng.normal(0, 20),
                "train/gradient_norm": 1.0 + abs(rng.normal(0, 0.3)),
                "train/image_size": size,
                "time": time,
            }
        )
        if step % steps_per_epoch == 0:
            rows.append(
                {
                    "kind": "evaluation",
                    "step": step,
                    "epoch": step // steps_per_epoch,
                    "split": "val",
                    "val/loss": 0.1 + 1.8 * math.exp(-6 * share),
                    "val/accuracy": final_accuracy - 0.5 * math.exp(-6 * share),
                    "image_size": size,
                    "time": time,
                }
            )
    return rows


def write_predictions(path: Path, labels: np.ndarray, probabilities: np.ndarray, first_key: int = 8000) -> None:
    """Write ``key,label,predicted,p0,...,p9``, six decimals."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["key", "label", "predicted", *(f"p{i}" for i in range(10))])
        for i, (label, row) in enumerate(zip(labels, probabilities, strict=True)):
            cells = (f"{value:.6f}" for value in row)
            writer.writerow([f"{first_key + i:08d}", int(label), int(row.argmax()), *cells])


def write_run(
    folder: Path,
    *,
    accuracy: float = 0.97,
    seed: int = 0,
    learning_rate: float = 4e-3,
    val_size: int = 400,
    epochs: int = 6,
    steps_per_epoch: int = 20,
    test_split: bool = True,
    resume_at: int | None = 50,
    absent: tuple[int, ...] = (),
    always: int | None = None,
) -> Path:
    """Write the folder of a finished run, without checkpoint files, figures and report, and return it.

    The labels do not depend on the seed, as for runs on one packed set; the model does.
    """
    folder.mkdir(parents=True)
    config = configuration.replace(
        configuration.Config(),
        shards="shards/sample",
        shift=4.0,
        invert=0.5,
        learning_rate=learning_rate,
        label_smoothing=0.1,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        micro_batch=50,
        image_size=(32, 64, 64),
        seed=seed,
        precision="fp32",
        run_dir=str(folder),
    )
    (folder / "config.yaml").write_text(configuration.dump(config))
    environment = {
        "command": f"python -m mnistm_dist.train --recipe fast --seed {seed} --learning-rate {learning_rate}",
        "mnistm_dist": __version__,
        "python": "3.11.7",
        "torch": "2.14.1",
        "device": "cpu",
        "world_size": 2,
        "threads": 1,
        "host": "node-1",
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=2))
    (folder / "architecture.json").write_text(json.dumps(ARCHITECTURE))
    rows = log_rows(epochs, steps_per_epoch, accuracy, seed, resume_at)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = epochs * steps_per_epoch
    summary: dict[str, Any] = {
        "recipe": "fast",
        "world_size": 2,
        "micro_batch": 50,
        "precision": "fp32",
        "threads": 1,
        "steps": steps,
        "epochs": epochs,
        "train_seconds": 0.3 * steps,
        "images_per_second": 702.5,
        "parameters": sum(int(str(layer["parameters"])) for layer in ARCHITECTURE),
        "checkpoint": {"step": steps, "chosen": "best on val", "averaged": False, "image_size": 64},
        "data": {
            "lineage": "regenerated",
            "identity": "c0ffee" * 10 + "c0ff",
            "path": "shards/sample",
            "counts": {"train": 8000, "val": val_size},
            "pixels_sha256": {"train+val": "ab" * 32, "test": "cd" * 32},
        },
    }
    for split in ("val", "test") if test_split else ("val",):
        offset = 0 if split == "val" else 1
        labels = synthetic_labels(val_size, 100 + offset, absent)
        probabilities = synthetic_probabilities(labels, accuracy, 2 * seed + offset, always)
        write_predictions(folder / f"predictions_{split}.csv", labels, probabilities)
        summary[split] = measure(labels, probabilities, CLASSES).to_json()
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    (folder / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"state": "finished", "step": steps, "reason": ""}))
    return folder


def is_locked(run_dir: Path) -> bool:
    """Return whether a live run holds the folder. For an owner on another host this takes `LEASE_SECONDS`."""
    if not (run_dir / LOCK_NAME).exists():
        return False
    try:
        RunLock(run_dir).release()
    except UserError:
        return True
    return False
