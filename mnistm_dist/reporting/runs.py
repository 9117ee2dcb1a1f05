"""Run folders as a report reads them: everything in them that can be read, what is missing, and how they differ.

The schemas list the fields that a report shows. Every field is optional, so that a run that is not finished, or of
another version, is reported as far as possible.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Required, TypeVar

import yaml
from pydantic import BaseModel, FiniteFloat, NonNegativeInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from mnistm_dist.errors import UserError, escape_control, near_path, os_error_reason
from mnistm_dist.reporting.metrics import Metrics
from mnistm_dist.reporting.predictions import Predictions, read_predictions
from mnistm_dist.run_lock import is_held_elsewhere

SPLITS = ("val", "test")
# A folder that holds one of these is a run folder.
FILES = ("config.yaml", "environment.json", "state.json", "log.jsonl", "summary.json")
SEED, WORLD_SIZE = "steps.seed", "launch.world_size"
# Fields that, like most of ``run``, do not change what is learnt; packed sets are compared by their identity.
PLACES = ("data.cache_dir", "data.workers", "data.shards")
T = TypeVar("T")


class State(BaseModel):
    """How a run stands: ``state.json``, with the step of the log."""

    state: str = "unknown"
    """As in the file, or ``killed``: running, and no process holds the folder."""
    step: NonNegativeInt | None = None
    reason: str | None = None


class Data(BaseModel):
    """``data`` in ``summary.json``: the packed set."""

    path: str | None = None
    lineage: str | None = None
    identity: str | None = None
    counts: dict[str, NonNegativeInt] = {}
    """Images of each split."""
    pixels_sha256: dict[str, str] = {}


class EvaluatedCheckpoint(BaseModel):
    """``checkpoint`` in ``summary.json``: the checkpoint that was evaluated."""

    step: NonNegativeInt
    chosen: str | None = None
    averaged: bool = False
    image_size: NonNegativeInt | None = None


class Summary(BaseModel):
    """``summary.json``."""

    recipe: str | None = None
    world_size: NonNegativeInt | None = None
    steps: NonNegativeInt | None = None
    epochs: FiniteFloat | None = None
    train_seconds: FiniteFloat | None = None
    evaluate_seconds: FiniteFloat | None = None
    save_seconds: FiniteFloat | None = None
    peak_memory_gb: FiniteFloat | None = None
    images_per_second: FiniteFloat | None = None
    model: str | None = None
    parameters: NonNegativeInt | None = None
    checkpoint: EvaluatedCheckpoint | None = None
    data: Data | None = None
    val: Metrics | None = None
    test: Metrics | None = None


class Layer(BaseModel):
    """A row of ``architecture.json``."""

    name: str
    layer: str
    output_shape: list[NonNegativeInt]
    """Of one image: channels, height, width."""
    parameters: NonNegativeInt
    flops: NonNegativeInt = 0
    """Of one image's forward pass."""


# A line of ``log.jsonl``.
Row = TypedDict(
    "Row",
    {
        "kind": Required[str],
        "step": Required[NonNegativeInt],
        # Unix seconds.
        "time": FiniteFloat,
        "epoch": NonNegativeInt,
        "image_size": NonNegativeInt | None,
        "val/loss": FiniteFloat | None,
        "val/accuracy": FiniteFloat | None,
        # NaN is valid: the row of the step at which a run failed has it.
        "train/loss": float | None,
        "train/learning_rate": FiniteFloat | None,
        "train/images_per_second": FiniteFloat | None,
        "train/gradient_norm": FiniteFloat | None,
        "train/peak_memory_gb": FiniteFloat | None,
        "train/image_size": NonNegativeInt | None,
    },
    total=False,
)


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


def read_run(
    path: Path,
    version: str,
    predictions: Mapping[str, Predictions] | None = None,
    splits: Sequence[str] = SPLITS,
) -> RunRecord:
    """Read one run folder; the arguments are those of `read_runs`, and ``splits``: those whose results are read.

    Raises:
        UserError: the folder does not exist, or is no run folder.
    """
    if not any((path / name).exists() for name in FILES):
        raise UserError(f"{path}: not a run folder{near_path(path)}; name one, which holds {', '.join(FILES)}")
    missing: list[str] = []
    rows = _rows(path / "log.jsonl", missing)
    state = _read(path / "state.json", State, missing) or State()
    summary = _read(path / "summary.json", Summary, missing) or Summary()
    if state.state == "running":
        # The file is written at the start and at the end of a launch.
        state.step = max(state.step or 0, *(row["step"] for row in rows), 0)
        if not is_held_elsewhere(path):
            # A run writes its summary, then its report, and then the state `finished`.
            state.state, state.step = ("finished", summary.steps) if summary.steps else ("killed", state.step)
    # The predictions of a split that a complete summary does not have are those of another checkpoint.
    scored = SPLITS if missing or not summary.checkpoint else tuple(name for name in SPLITS if getattr(summary, name))
    environment = _read(path / "environment.json", dict[str, Any], missing) or {}
    read: dict[str, Predictions] = {}
    metrics: dict[str, Metrics] = {}
    for split in splits:
        file, stored = path / f"predictions_{split}.csv", getattr(summary, split)
        results = (predictions or {}).get(split)
        if results is None and file.exists() and split not in scored:
            missing.append(f"{file.name}: of another checkpoint than summary.json, left out.")
        elif results is None and file.exists():
            try:
                results = read_predictions(file)
            except UserError as error:
                missing.append(f"{file.name}{str(error).removeprefix(str(file))}.")
        if results is not None:
            read[split], metrics[split] = results, results.metrics
        elif stored is not None:
            metrics[split] = stored
            missing.append(f"{file.name}: not available; calibration and comparisons on {split} are left out.")
    if not metrics:
        missing.append("predictions_val.csv, predictions_test.csv: not found.")
    if not any((path / "checkpoints").glob("step-*")):
        missing.append("checkpoints: none; the model itself is not in this folder.")
    if environment and environment.get("mnistm_dist") != version:
        missing.append(f"written by version {environment.get('mnistm_dist')}, read by version {version}.")
    return RunRecord(
        path=path,
        name=escape_control(path.resolve().name),
        config=flatten(_read(path / "config.yaml", dict[str, Any], missing) or {}),
        environment=environment,
        state=state,
        summary=summary,
        rows=rows,
        architecture=_read(path / "architecture.json", list[Layer], missing) or [],
        predictions=read,
        metrics=metrics,
        missing=tuple(missing),
    )


def overview(path: Path) -> dict[str, Any]:
    """Return recipe, state, step, accuracy on val and seconds of a run, for a list of many; None: not known."""
    run = read_run(path, "", splits=())
    summary, rows = run.summary, run.rows
    accuracies = [summary.val.accuracy] if summary.val else [row.get("val/accuracy") for row in rows]
    times = [row["time"] for row in rows if "time" in row] or [0.0]
    return {
        "recipe": run.config.get("recipe"),
        "state": run.state.state,
        "step": run.state.step,
        "val_accuracy": next((value for value in reversed(accuracies) if value is not None), None),
        "seconds": summary.train_seconds or times[-1] - times[0] or None,
    }


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"steps": {"epochs": 3}}`` as ``{"steps.epochs": 3}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _text(path: Path, missing: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        result = "not found" if isinstance(error, FileNotFoundError) else f"cannot be read ({os_error_reason(error)})"
        missing.append(f"{path.name}: {result}.")
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
            return TypeAdapter(schema).validate_python({k: v for k, v in document.items() if str(k) not in invalid})
    except (yaml.YAMLError, ValueError, RecursionError):
        pass
    missing.append(f"{path.name}: damaged, left out.")
    return None


def _rows(path: Path, missing: list[str]) -> list[Row]:
    lines = (_text(path, missing) or "").splitlines(keepends=True)
    adapter, rows = TypeAdapter(Row), []
    for line in lines:
        with contextlib.suppress(ValidationError):
            rows.append(adapter.validate_json(line))
    invalid = len(lines) - len(rows)
    if invalid == 1 and not lines[-1].endswith("\n"):
        missing.append("log.jsonl: the last line is cut off (the run was killed while writing it).")
    elif invalid:
        missing.append(f"log.jsonl: {invalid:,} of {len(lines):,} lines are invalid and were left out.")
    return rows


def differing_fields(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return the fields of the configurations that differ, with their values in the order of the runs.

    The world size and the identity of the packed set are compared too; where the runs are and how often they log are
    not. A field that a run does not have is None.
    """
    compared = [_compared_fields(run) for run in runs]
    values = {name: [other.get(name) for other in compared] for fields in compared for name in fields}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row[1:])}


def seed_groups(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Group the runs that differ only in their seed and world size, in the order of their first runs."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        fields = {**_compared_fields(run), SEED: None, WORLD_SIZE: None}
        groups.setdefault(str(sorted(fields.items())) if run.config else run.name, []).append(run)
    return list(groups.values())


def _compared_fields(run: RunRecord) -> dict[str, Any]:
    fields = {
        name: value
        for name, value in run.config.items()
        if name == "run.max_steps" or not (name.startswith("run.") or name in PLACES)
    }
    data = {f"data.{name}": getattr(run.summary.data, name, None) for name in ("identity", "lineage")}
    return {**fields, WORLD_SIZE: run.summary.world_size, **data}
