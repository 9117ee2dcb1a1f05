"""Train a model.

python -m mnistm_dist.train                                             one process, on a GPU or the CPU
accelerate launch --config_file accelerate_config.yaml --num_processes 8 -m mnistm_dist.train
sbatch slurm/train.sh --recipe fast --shards shards/official            a cluster

In Python, ``from mnistm_dist import train`` gives this module, and ``train(...)`` is `train_model`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mnistm_dist import __version__
from mnistm_dist.cli import flag_text, parse_train_flags
from mnistm_dist.config import Config, fields_of
from mnistm_dist.errors import UserError, is_first, run_cli

if TYPE_CHECKING:
    from mnistm_dist.reporting.metrics import CustomMetrics
    from mnistm_dist.training.models import ModelFunction


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

    return launch(request, {}, process_ends=__name__ == "__main__")[0]


def train_model(
    config: Config | Mapping[str, Any] | None = None,
    *,
    model: ModelFunction | str | None = None,
    metrics: CustomMetrics | None = None,
) -> dict[str, Any]:
    """Train as the command does: ``train({"shards": "shards/mine", "epochs": 3}, model=my_models.net)``.

    A script with it is started like the command: by itself, by torchrun or by accelerate launch.

    Args:
        config: the values of flags, by name, ``recipe`` included; or a whole configuration.
        model: a function, or a class, that takes the number of classes and returns a module. It must be importable by
            name, since evaluation and a resume build the model again. Or a name, as ``--model``.
        metrics: by name, functions of probabilities, float (N, C), and labels, int64 (N,). They are measured at each
            evaluation, on rank 0, and once before training, on one image of each class. ``accuracy`` and ``loss`` are
            taken.

    Returns:
        What ``summary.json`` holds, and ``run_dir``; on every rank.

    Raises:
        UserError: what the command would print in one line.
        SystemExit: with code 75, after a signal has stopped the run.
    """
    from mnistm_dist.run import launch
    from mnistm_dist.training.models import name_of

    fields = {"recipe": config.recipe, **fields_of(config)} if isinstance(config, Config) else dict(config or {})
    if taken := sorted({"accuracy", "loss"} & set(metrics or {})):
        raise UserError(f"metrics: {', '.join(taken)}: the package's own have this name; choose another")
    if model is not None:
        fields["model"] = model if isinstance(model, str) else name_of(model)
    request = parse_train_flags([f"--{name}={flag_text(value)}" for name, value in fields.items()])
    code, summary = launch(request, metrics or {}, process_ends=False)
    if code:
        sys.exit(code)
    return summary


class _CallableModule(ModuleType):
    """The module of a command that has the name of a function: calling it calls the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return train_model(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(run_cli(main))
