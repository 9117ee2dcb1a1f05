"""Train a model.

python -m mnistm_dist.train                                             one process, on a GPU or the CPU
accelerate launch --config_file accelerate_config.yaml --num_processes 8 -m mnistm_dist.train
sbatch slurm/train.sh --recipe fast --shards shards/official            a cluster
"""

import sys

from mnistm_dist import __version__
from mnistm_dist.cli import parse_train_flags
from mnistm_dist.errors import is_first, run_cli


def main(argv: list[str]) -> int:
    """Train. Return the exit code: 0 finished, 2 user error, 75 saved and exited after a signal."""
    request = parse_train_flags(argv)
    from mnistm_dist.reporting.console import Console

    config = request.config
    what = f"resume {config.run.resume}" if config.run.resume else f"recipe {config.recipe}"
    # Of the configuration, stdout holds nothing else.
    Console(enabled=is_first() and not request.flags.print_config).line(f"mnistm_dist {__version__}: {what}")
    # After the flags and the first line: torch takes seconds to import.
    from mnistm_dist.run import launch

    return launch(request, process_ends=__name__ == "__main__")


if __name__ == "__main__":
    sys.exit(run_cli(main))
