"""Classify image files of any size and mode.

    python -m mnistm_dist.predict runs/NAME digit.png photos/
    python -m mnistm_dist.predict runs/NAME photos/ --csv > predictions.csv

Prints class, probability and file, a line each.
--csv: file,predicted,probability,p0,...; --json: [{"file": ..., "predicted": 3,
"probability": 0.99, "probabilities": [...]}, ...]. Folders are read with their
subfolders, in sorted order. Files that cannot be read are named on stderr and
skipped.

Exit codes: 0; 1 some files were skipped; 2 user error, or none could be read.
"""

import csv
import io
import json
import sys
from typing import Annotated, Any

from pydantic import PositiveInt
from tyro.conf import arg

from mnistm_dist.cli import command, write_result
from mnistm_dist.config import LocalPath
from mnistm_dist.errors import UserError, escape_control, run_cli

# Exit code if some files could not be read and others could.
EXIT_SKIPPED = 1


@command
def main(
    run: Annotated[LocalPath, arg(metavar="RUN")],
    images: Annotated[tuple[LocalPath, ...], arg(metavar="IMAGE|FOLDER")],
    /,
    *,
    json_output: Annotated[bool, arg(name="json")] = False,
    csv_output: Annotated[bool, arg(name="csv")] = False,
    checkpoint: LocalPath = "chosen",
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
    from mnistm_dist.inference import load_model, predict_files
    from mnistm_dist.reporting.console import Console

    skipped: list[str] = []
    model = load_model(run, checkpoint)
    files = [str(path) for path in find_pictures(images, skipped.append)]
    # stdout holds the result only; stderr, unless it is a terminal, the skipped files only.
    console = Console(enabled=sys.stderr.isatty(), stream=sys.stderr)
    with console.library_warnings(), console.progress("predicting", len(files)) as bar:
        rows = predict_files(model, files, batch_size, skipped, bar)
    if not rows:
        others = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        raise UserError(f"no image could be read: {skipped[0]}{others}")
    for line in skipped:
        print(f"skipped: {escape_control(line)}", file=sys.stderr)
    if json_output:
        write_result("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    elif csv_output:
        write_result(format_csv(rows, model.classes))
    else:
        lines = (f"{model.classes[row['predicted']]}  {row['probability']:.4f}  {row['file']}" for row in rows)
        write_result("".join(f"{escape_control(line)}\n" for line in lines))
    return EXIT_SKIPPED if skipped else 0


def format_csv(rows: list[dict[str, Any]], classes: tuple[str, ...]) -> str:
    """Return a header and a row per file, as in ``predictions_SPLIT.csv``."""
    from mnistm_dist.training.evaluation import DECIMALS

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "predicted", "probability", *(f"p{name}" for name in classes)])
    for row in rows:
        numbers = (f"{p:.{DECIMALS}f}" for p in (row["probability"], *row["probabilities"]))
        writer.writerow([row["file"], row["predicted"], *numbers])
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(run_cli(main))
