"""What a trained model sees in pictures: files of any size and mode, one by one or by the folder.

    python -m mnistm_dist.predict runs/NAME digit.png photos/
    python -m mnistm_dist.predict runs/NAME photos/ --csv > predictions.csv

A table, or a line for each file in a pipe: class, probability, file. --csv: file,predicted,probability,p0,...; --json:
[{"file": ..., "predicted": 3, "probability": 0.99, "probabilities": [...]}, ...]. Folders are walked in sorted order. A
file that cannot be read is named on stderr and passed over: exit code 1. Where none can be read: 2.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mnistm_dist.cli import ArgumentParser, integer, write_result
from mnistm_dist.errors import UserError, escape_control, run_cli

if TYPE_CHECKING:
    from mnistm_dist.inference import TrainedModel
    from mnistm_dist.reporting.console import Bar

EXIT_PASSED_OVER = 1
"""Exit code where some files could not be read and others could."""
DECIMALS = 6
"""Decimals of a written probability, as in ``predictions_SPLIT.csv``."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the model says of one file."""

    file: str
    probabilities: list[float]
    """Of each class, as they are written."""

    @property
    def predicted(self) -> int:
        """The first class of the largest written probability."""
        return self.probabilities.index(self.probability)

    @property
    def probability(self) -> float:
        """Its probability."""
        return max(self.probabilities)


def main(argv: list[str]) -> int:
    """Predicts. Exit codes: 0; 1 some files were passed over; 2 a person's mistake, or none could be read."""
    parser = ArgumentParser(prog="python -m mnistm_dist.predict", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("pictures", metavar="IMAGE|FOLDER", nargs="+", help="picture files, or folders of them")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="JSON on stdout, and nothing else")
    form.add_argument("--csv", action="store_true", help="CSV on stdout, and nothing else")
    parser.add_argument("--checkpoint", default="chosen", metavar="best|last|PATH", help="default: the run's choice")
    parser.add_argument(
        "--batch-size", type=integer(1, 2**31), default=250, metavar="N", help="images per forward pass (250)"
    )
    args = parser.parse_args(argv)

    from mnistm_dist.data.image_io import find_pictures
    from mnistm_dist.inference import load_model
    from mnistm_dist.reporting.console import Console

    complaints: list[str] = []
    files = [str(path) for path in find_pictures(args.pictures, complaints.append)]
    if not files:
        raise UserError(nothing_read(complaints))
    model = load_model(args.run, args.checkpoint)
    # stdout is the result's alone, and a log of stderr wants the complaints alone.
    console = Console(enabled=sys.stderr.isatty(), stream=sys.stderr)
    with console.library_warnings(), console.progress("predicting", len(files)) as bar:
        results = predict_files(model, files, args.batch_size, complaints, bar)
    if not results:
        raise UserError(nothing_read(complaints))
    for complaint in complaints:
        print(f"passed over: {escape_control(complaint)}", file=sys.stderr)
    if args.json:
        write_result(as_json(results))
    elif args.csv:
        write_result(as_csv(results, model.classes))
    elif sys.stdout.isatty():
        show_table(results, model.classes)
    else:
        write_result(
            "".join(f"{model.classes[r.predicted]}  {r.probability:.4f}  {escape_control(r.file)}\n" for r in results)
        )
    return EXIT_PASSED_OVER if complaints else 0


def nothing_read(complaints: list[str]) -> str:
    """One line for where no file could be read."""
    more = f" (and {len(complaints) - 1} more like it)" if len(complaints) > 1 else ""
    return f"no picture could be read: {escape_control(complaints[0])}{more}"


def predict_files(
    model: TrainedModel, files: list[str], batch_size: int, complaints: list[str], bar: Bar
) -> list[Result]:
    """Reads and classifies the files, ``batch_size`` at a time; what cannot be read is added to ``complaints``."""
    import torch

    results: list[Result] = []
    for start in range(0, len(files), batch_size):
        names, prepared = [], []
        for file in files[start : start + batch_size]:
            try:
                prepared.append(model.prepare(file))
            except UserError as error:
                complaints.append(str(error))
            else:
                names.append(file)
        if names:
            rows = model.classify(torch.cat(prepared), batch_size=batch_size).astype("float64").round(DECIMALS).tolist()
            results += [Result(file=name, probabilities=row) for name, row in zip(names, rows, strict=True)]
        bar.update(min(start + batch_size, len(files)))
    return results


def as_json(results: list[Result]) -> str:
    """A list of objects, one a line. File names that are no Unicode keep their bytes as lone surrogates."""
    rows = [
        {"file": r.file, "predicted": r.predicted, "probability": r.probability, "probabilities": r.probabilities}
        for r in results
    ]
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


def as_csv(results: list[Result], classes: tuple[str, ...]) -> str:
    """A head and a row per file, as in ``predictions_SPLIT.csv``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "predicted", "probability", *(f"p{name}" for name in classes)])
    for r in results:
        writer.writerow([r.file, r.predicted, *(f"{p:.{DECIMALS}f}" for p in (r.probability, *r.probabilities))])
    return text.getvalue()


def show_table(results: list[Result], classes: tuple[str, ...]) -> None:
    """A table in the terminal."""
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
