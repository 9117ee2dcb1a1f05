"""Check the files of a run folder against one another and against the packed set, without training.

1. Each checkpoint has its hashes; what it holds beside its tensors is what configuration, log and packed set give.
2. config.yaml, environment.json, architecture.json and log.jsonl have the hashes that the checkpoints hold of them.
3. The losses in the log follow one another without a gap, up to the last checkpoint.
4. summary.json is what checkpoint, configuration, log and predictions give; these have the packed set's keys and labels.

A hash in the same folder shows damage, not origin: who changes a file can change its hash as well. What only training
can give, weights and losses, is checked by training again (replay.py). Figures and report.html are not checked:
`report` draws them anew.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mnistm_dist.errors import UserError
from mnistm_dist.reporting.predictions import read_predictions
from mnistm_dist.results import choose_checkpoint, read_summary, summary_fields, summary_sha256
from mnistm_dist.training.checkpoint import Checkpoint, checkpoint_dir
from mnistm_dist.training.resume import CONSEQUENCES
from mnistm_dist.training.run_dir import LOG_NAME, launches, read_log, read_state, step_losses
from mnistm_dist.training.setup import EVALUATED_SPLITS, RunSetup
from mnistm_dist.training.train_state import TrainState

# A file, values that it holds, what they should be, and by what.
Claim = tuple[str, Mapping[str, Any], Mapping[str, Any], str]
# Fields of summary.json that neither a checkpoint nor the log has; its own hash covers them.
MEASURED = {"world_size", "device", "peak_memory_gb", "save_seconds"}
LONGEST_VALUE = 60  # characters of a value that a finding shows


def examine(run: RunSetup, state: TrainState, kept: list[Checkpoint]) -> list[str]:
    """Return a line for each thing that does not fit. Nothing is written.

    Args:
        run: with the folder and the configuration of the run.
        state: that of its last intact checkpoint.
        kept: its complete checkpoints, in the order of their steps.
    """
    if not kept:
        return [f"{run.path}: no complete checkpoint"]
    findings = []
    for check in (check_checkpoints, check_log, check_summary, check_predictions):
        try:
            for subject, stored, expected, source in check(run, state, kept):
                findings += [
                    f"{subject}: {name} is {_short(stored.get(name))}; by {source} it is {_short(value)}"
                    for name, value in expected.items()
                    if stored.get(name) != value
                ]
        except UserError as error:
            findings.append(str(error))
    return findings


def check_checkpoints(run: RunSetup, _state: TrainState, kept: list[Checkpoint]) -> Iterator[Claim]:
    """Compare what checkpoints hold beside their tensors, and the files that they have hashed."""
    rows = read_log(run.path / LOG_NAME)
    losses = step_losses(rows)
    evaluations = {row["step"]: row.get("val/accuracy") for row in rows if row["kind"] == "evaluation"}
    for checkpoint in kept:
        name, step, scalars = checkpoint.path.name, checkpoint.step, checkpoint.scalars
        # Each launch writes config.yaml anew, perhaps with what a resume may change.
        newest = checkpoint is kept[-1] and all(row["step"] < step for row in launches(rows))
        free = {"device"} if newest else {"device", *CONSEQUENCES}
        expected = vars(run.scalars(step, scalars.history)) | {"scaler": scalars.scaler}
        expected["learning"] |= {field: scalars.learning.get(field) for field in free}
        yield name, vars(scalars), expected, "config.yaml and the packed set"
        pending, best = scalars.history.pending, scalars.history.best
        stored = {"step": step, "best": best and best.accuracy, **dict(enumerate(pending, start=step - len(pending)))}
        logged = {"best": best and evaluations.get(best.step)} | {s: losses[s] for s in stored.keys() & losses.keys()}
        yield name, stored, {"step": int(name.removeprefix("step-")), **logged}, LOG_NAME
        for file in checkpoint.run_files if newest else checkpoint.run_files.keys() & {LOG_NAME}:
            path, digest = run.path / file, checkpoint.run_files[file]
            # The log has grown since.
            content = path.read_bytes()[: digest.size] if path.is_file() else b""
            yield file, {"sha256": hashlib.sha256(content).hexdigest()}, {"sha256": digest.sha256}, name


def check_log(run: RunSetup, _state: TrainState, kept: list[Checkpoint]) -> Iterator[Claim]:
    """Compare the losses of the log with one another and with the last checkpoint, and the state with both."""
    rows, state, last = read_log(run.path / LOG_NAME), read_state(run.path) or {}, kept[-1]
    windows = [(row["step"], row["losses"], row) for row in rows if row.get("losses")]
    for step, losses, row in windows:
        yield f"{LOG_NAME}: step {step}", row, {"train/loss": sum(losses) / len(losses)}, "its losses"
    if state.get("state") in ("finished", "preempted"):
        ends = {"finished": run.schedule.last_step}.get(state["state"], last.step)
        yield "state.json", state, {"step": ends}, "config.yaml"
        yield last.path.name, {"step": last.step}, {"step": ends}, "state.json"
        counted = sum(len(losses) for _, losses, _ in windows) + len(last.scalars.history.pending)
        yield LOG_NAME, {"losses": counted}, {"losses": ends}, last.path.name


def check_summary(run: RunSetup, state: TrainState, kept: list[Checkpoint]) -> Iterator[Claim]:
    """Compare the summary with configuration, packed set, log and checkpoints."""
    summary, rows = read_summary(run.path), read_log(run.path / LOG_NAME)
    finished = (read_state(run.path) or {}).get("state") == "finished"
    if not summary and not finished:
        return
    yield "summary.json", summary, {"sha256": summary_sha256(summary)}, "its other fields"
    if finished:
        fields = {name: value for name, value in summary_fields(run, state).items() if name not in MEASURED}
        fields["data"] |= {"path": summary.get("data", {}).get("path")}
        launched = {"world_size": launches(rows)[-1].get("world_size")} if launches(rows) else {}
        yield "summary.json", summary, fields | launched, "configuration, log and last checkpoint"
    entry = summary.get("checkpoint", {})
    named = str(checkpoint_dir(run.path, entry.get("step", 0)))
    which = {"best on val": "best", "last": "last"}.get(entry.get("chosen"), named)
    checkpoint, expected = choose_checkpoint(run.path, which, has_test=True)
    yield "summary.json: checkpoint", entry, expected, "the checkpoints"
    for row in rows:
        if row["kind"] == "evaluation" and row["step"] == checkpoint.step:
            logged = {"accuracy": row.get("val/accuracy"), "log_loss": row.get("val/loss")}
            yield "summary.json: val", summary.get("val", {}), logged, LOG_NAME


def check_predictions(run: RunSetup, _state: TrainState, _kept: list[Checkpoint]) -> Iterator[Claim]:
    """Compare the metrics of the summary with the predictions, and these with the packed set."""
    summary = read_summary(run.path)
    for split in [name for name in EVALUATED_SPLITS if name in run.shards.manifest.splits]:
        path, labels = run.path / f"predictions_{split}.csv", run.shards.labels(split)
        if split not in summary and not path.is_file():
            continue
        predictions = read_predictions(path, run.shards.manifest.classes)
        digest = {"predictions_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        metrics = json.loads(json.dumps(predictions.metrics.to_json() | digest))
        yield f"summary.json: {split}", summary.get(split, {}), metrics, path.name
        stored = {"keys": list(predictions.keys), "labels": predictions.labels.tolist()}
        by_set = {"keys": run.shards.keys(split, np.arange(len(labels))), "labels": labels.tolist()}
        yield path.name, stored, by_set, f"the packed set {run.shards.root}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 4]} ..."
