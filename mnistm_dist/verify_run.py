"""Verify a run: its files against one another and against the packed set, then a part of it by training it again.

1. Each checkpoint has its hashes. config.yaml, environment.json, architecture.json and log.jsonl have the hashes that
   the checkpoints hold of them. Configuration and packed set are those that the last checkpoint was trained with.
2. If the run is finished, summary.json is what last checkpoint, configuration and predictions give, and what the log
   has at its step. The predictions have the keys and labels of the packed set.
3. From one checkpoint to another, training gives the losses, evaluations and weights that the run has. The results,
   evaluated again, are the same.

1 and 2 show damage, not origin: who changes a file can change a hash as well. 3 proves that the later checkpoint
follows from the earlier one, and the results from theirs. Figures and report.html are not checked: `report` draws them
anew.
"""

import dataclasses
import hashlib
import json
import random
import secrets
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mnistm_dist.config import LEARNING, Config, replace
from mnistm_dist.errors import UserError, is_first
from mnistm_dist.replay import opened, train_again
from mnistm_dist.reporting.console import Console
from mnistm_dist.reporting.predictions import read_predictions
from mnistm_dist.results import evaluate_checkpoint, summary_fields
from mnistm_dist.training.checkpoint import (
    MODEL,
    TRAINING,
    Checkpoint,
    checkpoint_dir,
    choose_checkpoint,
    complete,
    learning_values,
)
from mnistm_dist.training.environment import DECIDES_BITS, describe_environment
from mnistm_dist.training.resume import CONSEQUENCES
from mnistm_dist.training.run_dir import (
    CONFIG_NAME,
    LOG_NAME,
    launches,
    read_log,
    read_state,
    read_summary,
    step_losses,
)
from mnistm_dist.training.setup import EVALUATED_SPLITS, RunSetup
from mnistm_dist.training.train_state import TrainState
from mnistm_dist.training.trainer import Trainer

EXIT_FINDINGS = 1
# On another kind of machine: the largest relative difference of a mean loss.
LOSS_BOUND = 0.05
# Fields of summary.json that follow from nothing else, or, as FLOPs, from the version of torch.
MEASURED = ("world_size", "device", "peak_memory_gb", "save_seconds", "data", "flops_per_image")
# What a row of the log has of its own step.
OF_ONE_STEP = ("train/gradient_norm", "train/learning_rate", "val/loss", "val/accuracy")
LONGEST_VALUE = 32  # characters of a value that a finding shows
MOST_STEPS = 10  # that an error names


def verify_run(run_dir: Path, config: Config, which: str, seed: int | None) -> int:
    """Print a line for each finding, and what was proved; return the exit code. Nothing is written to the run folder.

    Args:
        run_dir: the run folder.
        config: its configuration.
        which: the steps to train again, as of `choose_stretch`; or none.
        seed: of a random choice; None: drawn.

    All ranks take part.
    """
    console, findings = Console(enabled=is_first()), list[str]()
    kept = {checkpoint.step: checkpoint for checkpoint in reversed(list(complete(run_dir, findings.append)))}
    if not kept:
        raise UserError("; ".join([*findings, f"{run_dir}: no complete checkpoint, so there is nothing to verify"]))
    last = max(kept)
    # Trained as the last checkpoint was, whatever config.yaml says now.
    with opened(replace(config, **_learned(kept[last])), console) as run:
        on_main, of_run = run.world.run_on_main, dataclasses.replace(run, path=run_dir, config=config)
        state = train_again(run, kept[last], last, console).state
        findings += on_main(lambda: list(examine(of_run, state, list(kept.values()))))
        finished = read_state(run_dir).get("state") == "finished"
        results = "results" if finished else "packed set (no results: the run is not finished)"
        agreement = f"files: {len(kept)} checkpoints, log, configuration and {results} agree"
        console.line("\n".join(f"finding: {finding}" for finding in findings) or agreement)
        if which != "none":
            drawn = run.world.broadcast_object(secrets.randbelow(10**6) if seed is None else seed)
            first, stop = on_main(lambda: choose_stretch([0, *kept], which, drawn))
            told = f" (drawn with --seed {drawn})" if which == "random" else ""
            console.line(f"replay: from step {first} to step {stop} of {last}{told}")
            trainer = train_again(run, kept.get(first), stop, console)
            why = on_main(lambda: why_inexact(run, run_dir, first, kept[stop]))
            replayed = on_main(lambda: list(compare(run_dir, trainer, kept, first, console, exact=not why)))
            replayed += compare_results(of_run, trainer, kept, console, exact=not why)
            how = f"within {LOSS_BOUND:.0%}, not in all bits:\n  {why}" if why else "to the last bit"
            agreement = f"replay: steps {first} to {stop} and the results agree {how}"
            console.line("\n".join(f"finding: {finding}" for finding in replayed) or agreement)
            findings += replayed
    return EXIT_FINDINGS if findings else 0


def examine(run: RunSetup, state: TrainState, kept: Sequence[Checkpoint]) -> Iterator[str]:
    """Yield a line for each thing that does not fit.

    Args:
        run: with the folder and the configuration of the run.
        state: that of its last complete checkpoint.
        kept: its complete checkpoints, in the order of their steps.
    """
    rows, ended, last = read_log(run.path / LOG_NAME), read_state(run.path), kept[-1]
    # A later launch has written the files other than the log anew.
    newest = all(row["step"] < last.step for row in launches(rows))
    facts = _facts(rows)
    contents = {name: (run.path / name).read_bytes() for name in last.run_files if (run.path / name).is_file()}
    for checkpoint in kept:
        recorded, logged = _recorded(checkpoint), facts | {"step": int(checkpoint.path.name[-8:])}
        expected = {name: logged[name] for name in recorded if name in logged}
        yield from _differences(checkpoint.path.name, recorded, expected, f"its name and {LOG_NAME}")
        for name, digest in checkpoint.run_files.items():
            if name == LOG_NAME or (newest and checkpoint is last):
                found = {"sha256": hashlib.sha256(contents.get(name, b"")[: digest.size]).hexdigest()}
                yield from _differences(name, found, {"sha256": digest.sha256}, checkpoint.path.name)
    may_change = CONSEQUENCES.keys() if not (newest or run.config.machine.reproducible) else ()
    learned = {name: value for name, value in _learned(last).items() if name not in may_change}
    yield from _differences(CONFIG_NAME, learning_values(run.config, run.world.device), learned, last.path.name)
    of_set = {"identity": run.shards.manifest.identity}
    yield from _differences(f"shards {run.shards.root}", of_set, {"identity": last.scalars.shards}, last.path.name)
    # A run that was continued may still have the results of its earlier end.
    if ended.get("state") == "finished":
        summary = read_summary(run.path)
        fields = {name: value for name, value in summary_fields(run, state).items() if name not in MEASURED}
        yield from _differences(LOG_NAME, rows[-1] if rows else {}, {"step": last.step}, last.path.name)
        yield from _differences("state.json", ended, {"step": run.schedule.last_step}, "config.yaml")
        yield from _differences("summary.json", summary, fields, "configuration and last checkpoint")
        yield from examine_results(run, summary, rows)


def examine_results(run: RunSetup, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each thing in the summary and in the predictions that does not fit."""
    manifest, entry = run.shards.manifest, summary.get("checkpoint", {})
    by_set = {"identity": manifest.identity, "lineage": manifest.lineage, "pixels_sha256": manifest.pixels_sha256}
    yield from _differences("summary.json: data", summary.get("data", {}), by_set, "the packed set")
    named = str(checkpoint_dir(run.path, entry.get("step", 0)))
    try:
        which = {"best on val": "best", "last": "last"}.get(entry.get("chosen"), named)
        expected = choose_checkpoint(run.path, which, has_test=True)[1]
        yield from _differences("summary.json: checkpoint", entry, expected, "the checkpoints")
        for split in [name for name in EVALUATED_SPLITS if name in manifest.splits]:
            name, labels = f"predictions_{split}.csv", run.shards.labels(split)
            predictions = read_predictions(run.path / name, manifest.classes)
            metrics = json.loads(json.dumps(predictions.metrics.to_json()))
            yield from _differences(f"summary.json: {split}", summary.get(split, {}), metrics, name)
            stored = {"keys": list(predictions.keys), "labels": predictions.labels.tolist()}
            of_set = {"keys": run.shards.keys(split, np.arange(len(labels))), "labels": labels.tolist()}
            yield from _differences(name, stored, of_set, "the packed set")
    except UserError as error:
        yield str(error)
    for row in [row for row in rows if row["kind"] == "evaluation" and row["step"] == entry.get("step")]:
        logged = {"accuracy": row.get("val/accuracy"), "log_loss": row.get("val/loss")}
        yield from _differences("summary.json: val", summary.get("val", {}), logged, LOG_NAME)


def choose_stretch(steps: list[int], which: str, seed: int) -> tuple[int, int]:
    """Return the steps from which and to which to train again.

    Raise `UserError` for steps without a checkpoint.

    Args:
        steps: 0, for the initial weights, and those of the complete checkpoints.
        which: last or random (by ``seed``), between two neighbours; or one or two of the steps, such as 64:128.
        seed: of the random choice.
    """
    stretches = list(pairwise(steps))
    if which in ("last", "random"):
        return stretches[-1] if which == "last" else random.Random(seed).choice(stretches)
    named = [int(step) for step in which.split(":")]
    before = max((step for step in steps if step < named[-1]), default=0)
    first, stop = named if len(named) == 2 else (before, *named)
    if first >= stop or not {first, stop} <= set(steps):
        shown = list(map(str, steps))
        if len(shown) > MOST_STEPS:
            shown[MOST_STEPS // 2 : -MOST_STEPS // 2] = ["..."]
        raise UserError(f"--replay {which}: should be two of the steps {', '.join(shown)}, which have a checkpoint")
    return first, stop


def why_inexact(run: RunSetup, run_dir: Path, start: int, stop: Checkpoint) -> str:
    """Return why bits may differ here from those in ``run_dir``: what is different; an empty text if nothing is."""
    here, machine = describe_environment(run.world, []), run.config.machine
    names = [name for name in DECIDES_BITS if name != "world_size" or not machine.reproducible]
    rows = [row for row in launches(read_log(run_dir / LOG_NAME)) if row["step"] < stop.step]
    # The launch that trained the first of the steps, and later ones.
    rows = [row for i, row in enumerate(rows, 1) if i == len(rows) or rows[i]["step"] > start]
    different = [
        f"{name} was {row.get(name)}, here {here[name]}"
        for row in rows
        for name in names
        if row.get(name) != here[name]
    ]
    if run.world.device.type == "cuda" and not (machine.deterministic or machine.reproducible):
        different.append("GPU kernels without --deterministic")
    now, was = {"precision": run.world.precision, "micro_batch": run.config.steps.micro_batch}, stop.scalars.learning
    different += [f"{name} was {was.get(name)}, here {value}" for name, value in now.items() if was.get(name) != value]
    return "; ".join(dict.fromkeys(different))


def compare(
    run_dir: Path, trainer: Trainer, kept: Mapping[int, Checkpoint], start: int, console: Console, *, exact: bool
) -> Iterator[str]:
    """Yield a line for each thing that came out otherwise than in the run. Rank 0 only.

    ``kept``: the complete checkpoints of the run, by step. ``start``: the step from which it was trained again.
    """
    again = _facts(read_log(trainer.run.path / LOG_NAME))
    # The losses since the last row are in the checkpoint.
    logged = _recorded(kept[trainer.state.steps_done]) | _facts(read_log(run_dir / LOG_NAME))
    losses = [name for name in again if name.startswith("loss")]
    was, now = (float(np.mean([facts.get(name, np.inf) for name in losses])) for facts in (logged, again))
    if not (exact or abs(now - was) <= LOSS_BOUND * was):
        yield f"{LOG_NAME}: the mean loss is {was:.5f}, trained again it is {now:.5f}"
    if not exact:
        return
    expected = {name: value for name, value in again.items() if name in logged or name in losses}
    found = list(_differences(LOG_NAME, logged, expected, "training again"))
    yield from (f"{line}; {len(found)} values differ" for line in found[:1])
    for replayed in complete(trainer.run.path, console.warn):
        if checkpoint := kept.get(replayed.step):
            scalars = vars(replayed.scalars) | {"history": checkpoint.scalars.history}
            yield from _differences(checkpoint.path.name, vars(checkpoint.scalars), scalars, "training again")
            for name in (MODEL, TRAINING):
                if (checkpoint.path / name).read_bytes() != (replayed.path / name).read_bytes():
                    yield f"{checkpoint.path.name}: {name} has other bytes than training from step {start} gives"


def compare_results(
    run: RunSetup, trainer: Trainer, kept: Mapping[int, Checkpoint], console: Console, *, exact: bool
) -> list[str]:
    """Evaluate the checkpoint of the summary again; return a line for each split that comes out otherwise.

    ``kept``: the complete checkpoints, by step. All ranks take part.
    """
    summary = run.world.run_on_main(lambda: read_summary(run.path))
    checkpoint, findings = kept.get(summary.get("checkpoint", {}).get("step", 0)), list[str]()
    if checkpoint is None:
        return findings
    for split, predictions in evaluate_checkpoint(trainer.run, checkpoint, console).items():
        path, now = run.path / f"predictions_{split}.csv", predictions.metrics.log_loss
        was = summary.get(split, {}).get("log_loss", now)
        if exact and path.is_file() and path.read_bytes() != (trainer.run.path / path.name).read_bytes():
            findings.append(f"{path.name}: has other bytes than an evaluation of {checkpoint.path.name} gives")
        elif abs(now - was) > LOSS_BOUND * now:
            findings.append(f"{path.name}: the log loss is {was:.5f}, evaluated again it is {now:.5f}")
    return run.world.broadcast_object(findings)


def _learned(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the fields of the configuration that a checkpoint was trained with."""
    return {name: value for name, value in checkpoint.scalars.learning.items() if name in LEARNING}


def _facts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what a log has of single steps."""
    losses = {f"loss of step {step}": loss for step, loss in step_losses(list(rows)).items()}
    return losses | {f"{name} at step {row['step']}": row[name] for row in rows for name in OF_ONE_STEP if name in row}


def _recorded(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint has of single steps, named as by `_facts`."""
    best, pending = checkpoint.scalars.history.best, checkpoint.scalars.history.pending
    losses = {f"loss of step {checkpoint.step - len(pending) + i}": loss for i, loss in enumerate(pending)}
    return {"step": checkpoint.step, **losses, **({f"val/accuracy at step {best.step}": best.accuracy} if best else {})}


def _differences(subject: str, stored: Mapping[str, Any], expected: Mapping[str, Any], source: str) -> Iterator[str]:
    for name, value in expected.items():
        if stored.get(name) != value:
            found, given = (f"{v!r:.{LONGEST_VALUE}}" for v in (stored.get(name), value))
            yield f"{subject}: {name} is {found}; by {source} it is {given}"
