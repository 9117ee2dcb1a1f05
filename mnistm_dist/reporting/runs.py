"""Read run folders for a report: everything in them that can be read, and a list of what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from mnistm_dist.errors import UserError, escape_control, os_error_reason
from mnistm_dist.reporting.metrics import Metrics
from mnistm_dist.reporting.predictions import Predictions, read_predictions
from mnistm_dist.reporting.schema import Layer, Row, State, Summary

SPLITS = ("val", "test")
FILES = ("config.yaml", "environment.json", "state.json", "log.jsonl", "summary.json")
"""A folder that holds one of these is a run folder."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of a run folder."""

    path: Path
    name: str
    """Name of the folder; `read_runs` makes it unique."""
    config: Mapping[str, Any]
    """Flat: ``steps.epochs`` etc."""
    environment: Mapping[str, Any]
    state: State
    summary: Summary
    rows: Sequence[Mapping[str, Any]]
    """Valid rows of ``log.jsonl``."""
    architecture: Sequence[Layer]
    predictions: Mapping[str, Predictions]
    metrics: Mapping[str, Metrics]
    """By split: from its predictions, or else from ``summary.json``."""
    missing: tuple[str, ...]
    """Sentences that say what could not be read."""


def read_runs(
    paths: Sequence[Path], version: str, predictions: Mapping[str, Predictions] | None = None
) -> list[RunRecord]:
    """Read run folders. Runs of equal names get their paths as names.

    Args:
        paths: the folders.
        version: version of this package; runs of another version are reported as such.
        predictions: of a single run, by split: predictions that need not be read again.

    Raises:
        UserError: a path is no run folder, or is given twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"{', '.join(map(str, paths))}: a run is given twice; name each run once")
    runs = [read_run(path, version, predictions) for path in paths]
    names = [run.name for run in runs]
    return [replace(run, name=str(run.path)) if names.count(run.name) > 1 else run for run in runs]


def read_run(path: Path, version: str, predictions: Mapping[str, Predictions] | None = None) -> RunRecord:
    """Read one run folder; the arguments are those of `read_runs`.

    Raises:
        UserError: the folder does not exist, or is no run folder.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder; name a folder that training wrote, such as runs/NAME")
    if not any((path / name).exists() for name in FILES):
        raise UserError(f"{path}: not a run folder; a run folder holds {', '.join(FILES)}")
    missing: list[str] = []
    state = _read(path / "state.json", State, missing) or State()
    summary = _read(path / "summary.json", Summary, missing) or Summary()
    config = flatten(_read(path / "config.yaml", dict[str, Any], missing) or {})
    environment = _read(path / "environment.json", dict[str, Any], missing) or {}
    rows = _rows(path / "log.jsonl", missing)
    architecture = _read(path / "architecture.json", list[Layer], missing) or []
    predictions = {**_predictions(path, missing, predictions or {}), **(predictions or {})}
    metrics = {split: predictions[split].metrics for split in predictions}
    for split in SPLITS:
        stored = getattr(summary, split)
        if split not in metrics and stored is not None:
            metrics[split] = stored
            missing.append(
                f"predictions_{split}.csv: not available; calibration and comparisons on {split} are left out."
            )
    if not metrics:
        missing.append("predictions_val.csv, predictions_test.csv: not found.")
    if not any((path / "checkpoints").glob("step-*")):
        missing.append("checkpoints: none; the model itself is not in this folder.")
    if environment and environment.get("mnistm_dist") != version:
        missing.append(f"written by version {environment.get('mnistm_dist')}, read by version {version}.")
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
        metrics={split: metrics[split] for split in SPLITS if split in metrics},
        missing=tuple(missing),
    )


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"steps": {"epochs": 3}}`` as ``{"steps.epochs": 3}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _text(path: Path, missing: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        missing.append(f"{path.name}: not found.")
    except OSError as error:
        missing.append(f"{path.name}: cannot be read ({os_error_reason(error)}).")
    return None


def _read(path: Path, schema: type[T], missing: list[str]) -> T | None:
    """Read a document. Invalid fields are left out, and named in ``missing``; without any valid field, return None."""
    text = _text(path, missing)
    if text is None:
        return None
    try:
        document = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        return TypeAdapter(schema).validate_python(document)
    except ValidationError as error:
        invalid = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
        if isinstance(document, dict) and invalid:
            missing.append(f"{path.name}: invalid fields left out: {', '.join(sorted(invalid))}.")
            return TypeAdapter(schema).validate_python({k: v for k, v in document.items() if k not in invalid})
    except (yaml.YAMLError, ValueError, RecursionError):
        pass
    missing.append(f"{path.name}: damaged, left out.")
    return None


def _rows(path: Path, missing: list[str]) -> list[Row]:
    lines = (_text(path, missing) or "").splitlines(keepends=True)
    adapter, rows = TypeAdapter(Row), []
    for line in lines:
        try:
            rows.append(adapter.validate_json(line))
        except ValidationError:
            continue
    invalid = len(lines) - len(rows)
    if invalid == 1 and not lines[-1].endswith("\n"):
        missing.append("log.jsonl: the last line is cut off (the run was killed while writing it).")
    elif invalid:
        missing.append(f"log.jsonl: {invalid:,} of {len(lines):,} lines are invalid and were left out.")
    return rows


def _predictions(path: Path, missing: list[str], known: Mapping[str, Predictions]) -> dict[str, Predictions]:
    predictions: dict[str, Predictions] = {}
    for split in SPLITS:
        file = path / f"predictions_{split}.csv"
        try:
            if split not in known and file.exists():
                predictions[split] = read_predictions(file)
        except UserError as error:
            missing.append(f"{file.name}{str(error).removeprefix(str(file))}.")
    return predictions
