"""Classify image files of any size and mode.

    python -m mnistm_dist.predict runs/NAME digit.png photos/
    python -m mnistm_dist.predict runs/NAME photos/ --csv > predictions.csv

Prints class, probability and file: a table in a terminal, lines in a pipe.
--csv: file,predicted,probability,p0,...; --json: [{"file": ..., "predicted": 3,
"probability": 0.99, "probabilities": [...]}, ...]. Folders are read with their
subfolders, in sorted order. Files that cannot be read are named on stderr and
skipped.

Exit codes: 0; 1 some files were skipped; 2 user error, or none could be read.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import PositiveInt
from tyro.conf import arg

from mnistm_dist.cli import command, write_result
from mnistm_dist.errors import UserError, escape_control, run_cli

if TYPE_CHECKING:
    from mnistm_dist.inference import TrainedModel
    from mnistm_dist.reporting.console import Bar

EXIT_SKIPPED = 1
"""Exit code if some files could not be read and others could."""
DECIMALS = 6
"""Decimals of a written probability, as in ``predictions_SPLIT.csv``."""


@dataclass(frozen=True, kw_only=True)
class FilePrediction:
    """The prediction for one file."""

    file: str
    probabilities: list[float]
    """Of each class, rounded to `DECIMALS`."""

    @property
    def predicted(self) -> int:
        """The class of the largest probability, the first one if several are equal."""
        return self.probabilities.index(self.probability)

    @property
    def probability(self) -> float:
        """The largest probability."""
        return max(self.probabilities)


@command
def main(
    run: Annotated[str, arg(metavar="RUN")],
    images: Annotated[tuple[str, ...], arg(metavar="IMAGE|FOLDER")],
    /,
    *,
    json_output: Annotated[bool, arg(name="json")] = False,
    csv_output: Annotated[bool, arg(name="csv")] = False,
    checkpoint: str = "chosen",
    batch_size: PositiveInt = 250,
) -> int:
    """Classify image files. Raises `UserError` if none can be read.

    Args:
        run: A run folder.
        images: Image files, or folders of them.
        json_output: Print JSON on stdout, and nothing else.
        csv_output: Print CSV on stdout, and nothing else.
        checkpoint: best, last, or the path of a checkpoint. chosen: the one that the run has chosen.
        batch_size: Images per forward pass.
    """
    if not images:
        raise UserError("IMAGE|FOLDER: at least one image file or folder is required")
    if json_output and csv_output:
        raise UserError("--json and --csv: choose one of them")

    from mnistm_dist.data.image_io import find_pictures
    from mnistm_dist.inference import load_model
    from mnistm_dist.reporting.console import Console

    skipped: list[str] = []
    files = [str(path) for path in find_pictures(list(images), skipped.append)]
    if not files:
        raise UserError(nothing_read(skipped))
    model = load_model(run, checkpoint)
    # stdout holds the result only; stderr, unless it is a terminal, the skipped files only.
    console = Console(enabled=sys.stderr.isatty(), stream=sys.stderr)
    with console.library_warnings(), console.progress("predicting", len(files)) as bar:
        results = predict_files(model, files, batch_size, skipped, bar)
    if not results:
        raise UserError(nothing_read(skipped))
    for line in skipped:
        print(f"skipped: {escape_control(line)}", file=sys.stderr)
    if json_output:
        write_result(format_json(results))
    elif csv_output:
        write_result(format_csv(results, model.classes))
    elif sys.stdout.isatty():
        show_table(results, model.classes)
    else:
        write_result(
            "".join(f"{model.classes[r.predicted]}  {r.probability:.4f}  {escape_control(r.file)}\n" for r in results)
        )
    return EXIT_SKIPPED if skipped else 0


def nothing_read(skipped: list[str]) -> str:
    """Return the error message if no file could be read."""
    others = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
    return f"no image could be read: {escape_control(skipped[0])}{others}"


def predict_files(
    model: TrainedModel, files: list[str], batch_size: int, skipped: list[str], bar: Bar
) -> list[FilePrediction]:
    """Read and classify the files, ``batch_size`` at a time. Files that cannot be read are added to ``skipped``."""
    import torch

    results: list[FilePrediction] = []
    for start in range(0, len(files), batch_size):
        names, prepared = [], []
        for file in files[start : start + batch_size]:
            try:
                prepared.append(model.prepare(file))
            except UserError as error:
                skipped.append(str(error))
            else:
                names.append(file)
        if names:
            rows = model.classify(torch.cat(prepared), batch_size=batch_size).astype("float64").round(DECIMALS).tolist()
            results += [FilePrediction(file=name, probabilities=row) for name, row in zip(names, rows, strict=True)]
        bar(min(start + batch_size, len(files)))
    return results


def format_json(results: list[FilePrediction]) -> str:
    """Return a JSON array, one object per line. Bytes of a file name that are not UTF-8 are lone surrogates."""
    rows = [
        {"file": r.file, "predicted": r.predicted, "probability": r.probability, "probabilities": r.probabilities}
        for r in results
    ]
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


def format_csv(results: list[FilePrediction], classes: tuple[str, ...]) -> str:
    """Return a header and a row per file, as in ``predictions_SPLIT.csv``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "predicted", "probability", *(f"p{name}" for name in classes)])
    for r in results:
        writer.writerow([r.file, r.predicted, *(f"{p:.{DECIMALS}f}" for p in (r.probability, *r.probabilities))])
    return text.getvalue()


def show_table(results: list[FilePrediction], classes: tuple[str, ...]) -> None:
    """Print a table in the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("file", overflow="fold")
    table.add_column("class", justify="right")
    table.add_column("probability", justify="right")
    for r in results:
        table.add_row(Text(escape_control(r.file)), Text(classes[r.predicted], "bold"), f"{r.probability:.4f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(run_cli(main))
