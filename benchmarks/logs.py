"""The benchmark ``logs``: the trainer with its console in a terminal and TensorBoard, against one that logs nowhere.

CPU seconds tell the difference also on a machine that does other things; they count every thread, the tracker's too.
"""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import RawIOBase
from typing import TextIO

import numpy as np
import torch

from benchmarks.measure import STEPS, Contender, Measurement, Result, clock, default_device, open_training, rate, run
from benchmarks.options import Logs
from mnistm_dist.config import replace
from mnistm_dist.data.parallel import Progress
from mnistm_dist.errors import import_optional
from mnistm_dist.reporting.console import Console
from mnistm_dist.reporting.run_logger import RunLogger
from mnistm_dist.reporting.tracking import AccelerateTracker
from mnistm_dist.training import distributed
from mnistm_dist.training.initial_state import create_train_state
from mnistm_dist.training.preemption import StopRequest
from mnistm_dist.training.run_dir import RunDir
from mnistm_dist.training.setup import open_run
from mnistm_dist.training.trainer import Trainer, TrainLogger

BOTH, NEITHER = "console and TensorBoard", "neither"


class Silent:
    """A `TrainLogger` that does nothing."""

    @contextmanager
    def training(self, last_step: int, steps_done: int) -> Iterator[None]:
        yield

    def train_row(self, row: dict[str, object]) -> None:
        pass

    def evaluation_row(self, row: dict[str, object], labels: np.ndarray, probabilities: np.ndarray) -> None:
        pass

    @contextmanager
    def evaluating(self, split: str, count: int) -> Iterator[Progress]:
        yield lambda done, total: None

    def message(self, text: str) -> None:
        pass


def logs(options: Logs) -> Result:
    """Measure the training steps of the two. Raises `UserError`."""
    import_optional("tensorboard", "benchmarks logs", "trackers")
    torch.set_num_threads(options.threads)
    steps = options.steps or STEPS[default_device().type]
    contenders = [
        Contender(name=name, measure=partial(train_logged, options, steps, name == BOTH), against=(NEITHER,))
        for name in (NEITHER, BOTH)
    ]
    return run(
        options,
        contenders,
        warm_up=1,
        steps=steps,
        log_every=options.log_every,
        terminal="a pseudo terminal of this process, which reads it",
    )


def train_logged(options: Logs, steps: int, logged: bool) -> Measurement:
    """Train steps, with one checkpoint at the end, and return their rate. Tracker and console are opened before."""
    config, _, _ = open_training(options)
    with tempfile.TemporaryDirectory(prefix="mnistm_dist-bench-") as folder, terminal() as stream:
        config = replace(config, shards=options.shards, run_dir=f"{folder}/run", threads=options.threads)
        config = replace(config, max_steps=steps, log_every=options.log_every, epochs=10**6, evaluate_every=10**6)
        with distributed.joined(config, expect_world_size=1) as world:
            setup = open_run(config, world, Console(enabled=False))
            # Evaluations are no steps.
            del setup.readers["val"]
            state = create_train_state(
                setup.config, world, len(setup.shards.manifest.classes), setup.shares, resumed=False
            )
            with RunDir(setup.path, active=True) as run_dir:
                console, opened = Console(stream=stream), threading.Event()
                tracker = AccelerateTracker("tensorboard", console.line, {"run_name": "run", "logging_dir": folder}, {})
                tracker.submit(lambda _: opened.set())
                opened.wait(60)
                logger: TrainLogger = RunLogger(console, tracker, run_dir.log, ()) if logged else Silent()
                trainer = Trainer(setup, run_dir, state, logger, StopRequest(()))
                start = clock()
                trainer.fit()
                tracker.finish(0, "finished")
                return rate(steps * options.batch_size, start)


@contextmanager
def terminal() -> Iterator[TextIO]:
    """Give a stream that is a terminal, whose output is read and dropped."""
    os.environ["TERM"] = "xterm"
    reader, writer = os.openpty()
    with os.fdopen(reader, "rb", buffering=0) as output, os.fdopen(writer, "w") as stream:
        threading.Thread(target=drain, args=(output,), daemon=True).start()
        yield stream


def drain(output: RawIOBase) -> None:
    """Read a stream to its end."""
    # Of a terminal that was closed, Linux makes an error.
    with suppress(OSError, ValueError):
        while output.read(4096):
            pass
