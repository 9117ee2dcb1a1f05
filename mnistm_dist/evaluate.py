"""Evaluate a trained run, exactly, with any number of processes.

    python -m mnistm_dist.evaluate runs/NAME
    accelerate launch --config_file accelerate_config.yaml --num_processes 4 \\
        -m mnistm_dist.evaluate runs/NAME

Writes into RUN, for each split: predictions_SPLIT.csv, mistakes_SPLIT.png,
confusion_matrix_SPLIT.png, the metrics in summary.json, and report.html anew.
While RUN is in use, results are printed only, unless --out names a folder for
them. On one kind of device the predictions are the same bytes at every world
size.
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

from tyro.conf import arg

from mnistm_dist.cli import command
from mnistm_dist.config import LocalFile, LocalPath, OrNone, ShardsPath, load, replace
from mnistm_dist.errors import errors_once_per_node, run_cli
from mnistm_dist.files import FolderBusy, explain_os_errors
from mnistm_dist.reporting.console import Console


@command
def main(
    run: Annotated[LocalPath, arg(metavar="RUN")],
    /,
    *,
    shards: OrNone[ShardsPath] = None,
    split: OrNone[Literal["val", "test"]] = None,
    checkpoint: LocalPath = "chosen",
    out: OrNone[LocalFile] = None,
) -> int:
    """Evaluate a checkpoint of a run.

    Args:
        run: A run folder.
        shards: Packed set. none: the one that the run was trained on.
        split: Evaluate only this split. none: all that the set has.
        checkpoint: best, last, or the path of a checkpoint. chosen: the one that the run has chosen.
        out: Folder to write to. none: RUN.
    """
    from mnistm_dist.reporting.html import write_report
    from mnistm_dist.results import evaluate_checkpoint, next_commands, write_summary
    from mnistm_dist.training import distributed
    from mnistm_dist.training.checkpoint import choose_checkpoint
    from mnistm_dist.training.hardware import native_or_fp32
    from mnistm_dist.training.run_dir import CONFIG_NAME, read_summary, require_run
    from mnistm_dist.training.setup import EVALUATED_SPLITS, open_evaluation

    run_dir = Path(run)
    with errors_once_per_node():
        require_run(run_dir)
        config = load(run_dir / CONFIG_NAME)
        config = replace(config, threads="auto", shards=shards or config.data.shards)
    here = native_or_fp32(config)
    with distributed.joined(here) as world, ExitStack() as stack:
        console = Console(enabled=world.is_main)
        stack.enter_context(console.library_warnings())
        if here != config:
            console.warn(f"precision: {config.machine.precision} is not native here; evaluating in fp32")
        folder = world.run_on_main(lambda: choose_folder(run_dir, out, console, stack))
        opened = open_evaluation(config, world, console, folder, split)
        has_test = "test" in opened.shards.manifest.splits
        chosen, entry = world.run_on_main(lambda: choose_checkpoint(run_dir, checkpoint, has_test=has_test))
        predictions = evaluate_checkpoint(opened, chosen, console)
        if world.is_main:
            summary = read_summary(run_dir)
            if summary.get("checkpoint") != entry or shards:
                # The numbers of the other split are of another checkpoint, or of another set.
                summary = {name: value for name, value in summary.items() if name not in EVALUATED_SPLITS}
            summary = write_summary(folder, summary | {"checkpoint": entry}, predictions, {})
            report = config.run.report and folder == run_dir
            if report:
                write_report([run_dir], run_dir / "report.html", predictions)
            shown = folder if folder in (run_dir, out) else None
            commands = next_commands(opened) if folder == run_dir else {}
            console.result(shown, summary, predictions, commands, report=report)
    return 0


def choose_folder(run_dir: Path, out: Path | None, console: Console, stack: ExitStack) -> Path:
    """Return the folder to write to: ``out``, or the run's, locked; a temporary one if another process holds the run's.

    ``stack`` releases it. Raises `UserError` if it cannot be written.
    """
    from mnistm_dist.run_lock import RunLock

    if out is not None:
        with explain_os_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        return out
    try:
        stack.enter_context(RunLock(run_dir))
    except FolderBusy:
        console.line(f"{run_dir}: in use by another process; results are printed only (--out FOLDER writes them)")
        return Path(stack.enter_context(TemporaryDirectory()))
    return run_dir


if __name__ == "__main__":
    sys.exit(run_cli(main))
