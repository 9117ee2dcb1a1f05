"""A run folder, read back for a report: whatever of it can be read, and in words what cannot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mnistm_dist.config import read_yaml
from mnistm_dist.errors import UserError, escape_control
from mnistm_dist.reporting import schema as run_fields
from mnistm_dist.reporting.metrics import Metrics
from mnistm_dist.reporting.predictions import Predictions, read_predictions

SPLITS = ("val", "test")
FILES = ("config.yaml", "environment.json", "state.json", "log.jsonl", "summary.json")
"""What makes a folder a run: at least one of these."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run folder holds."""

    path: Path
    name: str
    """Of the folder, made unique by `read_runs`."""
    config: Mapping[str, Any]
    """Flat: ``steps.epochs`` and the like."""
    environment: Mapping[str, Any]
    state: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    """Of ``log.jsonl``."""
    architecture: Sequence[Mapping[str, Any]]
    predictions: Mapping[str, Predictions]
    metrics: Mapping[str, Metrics]
    """Of each split: from its predictions, else from ``summary.json``."""
    missing: tuple[str, ...]
    """What could not be read, a sentence each."""


def read_runs(paths: Sequence[Path], version: str) -> list[RunRecord]:
    """Reads run folders; where two have one name, their paths become their names.

    Args:
        paths: the folders.
        version: of this package, to tell runs of another one.

    Raises:
        UserError: one of them is no run folder, or comes twice.
    """
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise UserError(f"{path}: named twice; name each run once")
        seen.add(path.resolve())
    runs = [read_run(path, version) for path in paths]
    names = [run.name for run in runs]
    return [replace(run, name=str(run.path)) if names.count(run.name) > 1 else run for run in runs]


def read_run(path: Path, version: str) -> RunRecord:
    """Reads one run folder.

    Raises:
        UserError: there is no such folder, or nothing of a run in it.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder; name the one that training wrote, such as runs/NAME")
    if not any((path / name).exists() for name in FILES):
        raise UserError(f"{path}: no run in it; a run folder holds {', '.join(FILES)}")
    missing: list[str] = []
    config = _flat(path / "config.yaml", missing)
    environment = _mapping(path / "environment.json", missing)
    state = _fitting(_mapping(path / "state.json", missing), run_fields.STATE, "state.json", missing)
    summary = _fitting(_summary(path, state, missing), run_fields.SUMMARY, "summary.json", missing)
    rows = _rows(path / "log.jsonl", missing)
    architecture = _architecture(path / "architecture.json", missing)
    predictions, metrics = _scores(path, summary, missing)
    if not any((path / "checkpoints").glob("step-*")):
        missing.append("There is no checkpoint: the model itself is not in this folder.")
    found = environment.get("mnistm_dist")
    if environment and found != version:
        missing.append(f"The run was written by version {found or 'unknown'} and is read by {version}.")
    return RunRecord(
        path=path,
        name=escape_control(path.resolve().name),
        config=config,
        environment=environment,
        state=state,
        summary=summary,
        rows=rows,
        architecture=architecture,
        predictions=predictions,
        metrics=metrics,
        missing=tuple(missing),
    )


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"schedule": {"epochs": 3}}`` as ``{"schedule.epochs": 3}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _flat(path: Path, missing: list[str]) -> dict[str, Any]:
    return {str(name): value for name, value in flatten(_mapping(path, missing)).items()}


def _fitting(found: Mapping[str, Any], kinds: run_fields.Kinds, name: str, missing: list[str]) -> Mapping[str, Any]:
    """A file's fields without those that hold something else than they may."""
    wrong = run_fields.wrong_fields(found, kinds)
    if wrong:
        missing.append(f"{name} does not hold what it should in {', '.join(wrong)}: left out.")
    return {name: value for name, value in found.items() if name not in wrong}


def _text(path: Path, missing: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        missing.append(f"{path.name} is not there.")
    except OSError as error:
        missing.append(f"{path.name} cannot be opened ({error.strerror}).")
    return None


def _mapping(path: Path, missing: list[str]) -> Mapping[str, Any]:
    text = _text(path, missing)
    if text is None:
        return {}
    try:
        found = read_yaml(text, path.name) if path.suffix == ".yaml" else json.loads(text)
    except (ValueError, RecursionError):
        missing.append(f"{path.name} is damaged and was left out.")
        return {}
    if not isinstance(found, Mapping):
        missing.append(f"{path.name} does not hold what it should and was left out.")
        return {}
    return found


def _summary(path: Path, state: Mapping[str, Any], missing: list[str]) -> Mapping[str, Any]:
    if not (path / "summary.json").exists() and state.get("state") in ("running", "preempted", "failed"):
        missing.append(f"summary.json is not there yet: the run is {state['state']}.")
        return {}
    return _mapping(path / "summary.json", missing)


def _rows(path: Path, missing: list[str]) -> list[Mapping[str, Any]]:
    text = _text(path, missing)
    rows: list[Mapping[str, Any]] = []
    lines = (text or "").splitlines()
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if (
            isinstance(row, Mapping)
            and row.get("step") is not None
            and (row.get("kind") != "evaluation" or row.get("epoch") is not None)
            and not run_fields.wrong_fields(row, run_fields.ROW)
        ):
            rows.append(row)
    bad = len(lines) - len(rows)
    if bad == 1 and not (text or "").endswith("\n"):
        missing.append("The last line of log.jsonl is cut: the run was killed while it wrote.")
    elif bad:
        missing.append(f"{bad:,} of {len(lines):,} lines of log.jsonl cannot be read and were left out.")
    return rows


def _architecture(path: Path, missing: list[str]) -> list[Mapping[str, Any]]:
    text = _text(path, missing)
    if text is None:
        return []
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(map(_is_layer, found)):
        missing.append(f"{path.name} is damaged and was left out.")
        return []
    return found


def _is_layer(row: object) -> bool:
    return (
        isinstance(row, Mapping)
        and all(row.get(name) is not None for name in run_fields.LAYER)
        and not run_fields.wrong_fields(row, run_fields.LAYER)
    )


def _scores(
    path: Path, summary: Mapping[str, Any], missing: list[str]
) -> tuple[dict[str, Predictions], dict[str, Metrics]]:
    predictions: dict[str, Predictions] = {}
    metrics: dict[str, Metrics] = {}
    for split in SPLITS:
        file = path / f"predictions_{split}.csv"
        try:
            if file.exists():
                predictions[split] = read_predictions(file)
                metrics[split] = predictions[split].measure()
                continue
        except UserError as error:
            missing.append(f"{file.name} was left out: {str(error).removeprefix(f'{file}: ')}.")
        if summary.get(split):
            try:
                metrics[split] = Metrics.from_json(summary[split])
            except UserError as error:
                missing.append(f"summary.json on {split} was left out: {error}.")
            else:
                missing.append(f"{file.name} is not there: calibration and comparisons of {split} are left out.")
    if not metrics:
        missing.append("There are no predictions: neither predictions_val.csv nor predictions_test.csv.")
    return predictions, metrics
