"""Experiment trackers beside a run: they never stop, delay or slow training.

1. `Tracker` is the interface, and the no-op twin: on ranks other than 0, and with ``--tracker none``.
2. `WandbTracker` logs to Weights & Biases, `AccelerateTracker` to any tracker that Accelerate has a class for.
3. `BackgroundTracker` runs a tracker in a thread of its own, with a bounded queue and a bounded end.

A tracker holds a copy: the run folder is complete without it.
"""

import importlib
import netrc
import os
import queue
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import methodcaller
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from mnistm_dist.config import TrackerName
from mnistm_dist.reporting.runs import flatten

PROJECT = "mnistm-dist"  # W&B project, unless WANDB_PROJECT names another
# Our own step metric: steps done, over all launches of a run. W&B's own counter drops repeated steps.
STEP = "step"
# Timeouts of W&B at the start, after which the run is offline, and of the uploads at its end.
INIT_SECONDS, FINISH_SECONDS = 10.0, 8.0
# Most time that a run waits for its tracker to end: a launcher or Slurm kills a process that takes 30 s to exit.
END_SECONDS = 20.0
QUEUE_SIZE = 20_000  # entries that may wait for a tracker; further ones are dropped, and counted

# The names of the columns, and the rows.
Table = tuple[list[str], list[list[Any]]]


class Tracker:
    """Logs a run somewhere; this class does nothing."""

    name = "none"
    """As the header of a run shows it."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log scalars, which must not be changed afterwards; ``step``: steps done."""

    def log_results(
        self, summary: Mapping[str, Any], figures: Mapping[str, Path], tables: Mapping[str, Table], step: int
    ) -> None:
        """Log the results of a finished run.

        Args:
            summary: values of the run as a whole.
            figures: image files, which must exist until the run ends.
            tables: tables of texts and numbers.
            step: steps done.
        """

    def log_checkpoint(self, folder: Path, aliases: Sequence[str] = ()) -> None:
        """Upload a checkpoint."""

    def finish(self, exit_code: int, state: str) -> None:
        """End the run.

        Args:
            exit_code: of the process; a tracker shows others than 0 as failed.
            state: as in ``state.json``: ``finished``, ``preempted`` or ``failed``.
        """


class BackgroundTracker(Tracker):
    """A tracker with a thread of its own.

    A subclass implements `open`, `close` and the methods that log; they hand their work to `submit`.

    Args:
        say: shows one line; called from the thread, too.
        init: arguments of the library, for `open`.
    """

    failures: tuple[type[Exception], ...] = (Exception,)
    """What `open` and the work may raise: whatever the library of a tracker raises."""
    hint = "the run folder is complete"
    """What to do after a failure."""

    def __init__(self, say: Callable[[str], None], **init: Any) -> None:
        self.say, self.init = say, init
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(QUEUE_SIZE)
        self._dropped, self._failed = 0, False
        # A daemon: a tracker that hangs cannot hold the process.
        self._thread = threading.Thread(target=self._serve, name="tracker", daemon=True)
        self._thread.start()

    def open(self) -> Any:
        """Connect, and return what the work gets. Called in the thread."""

    def close(self, opened: Any, exit_code: int, state: str) -> None:
        """End the run; see `Tracker.finish`. Called in the thread."""

    def submit(self, work: Callable[[Any], None] | None) -> None:
        """Call ``work`` in the thread, or drop it if the queue is full; None ends the thread."""
        try:
            if self._thread.is_alive():
                self._queue.put_nowait(work)
        except queue.Full:
            self._dropped += 1

    def finish(self, exit_code: int, state: str) -> None:
        self.submit(lambda opened: self.close(opened, exit_code, state))
        self.submit(None)
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            self.say(f"the tracker did not end in time; {self.hint}")
        if self._dropped:
            self.say(f"the tracker was too slow for {self._dropped:,} entries, which are only in log.jsonl")

    def _serve(self) -> None:
        with self._report_failure():
            opened = self.open()
            for work in iter(self._queue.get, None):
                with self._report_failure():
                    work(opened)

    @contextmanager
    def _report_failure(self) -> Iterator[None]:
        try:
            yield
        except self.failures as error:
            if not self._failed:
                self.say(f"the tracker failed ({one_line(error)}); training continues; {self.hint}")
            self._failed = True


class WandbTracker(BackgroundTracker):
    """Logs to Weights & Biases.

    Args:
        say: shows one line; called from the thread, too.
        init: arguments of ``wandb.init``. The mode ``offline`` stands for a missing API key; with None, the run is as
            WANDB_MODE says, and offline if the server cannot be reached.
    """

    name = "W&B"

    def open(self) -> Any:
        # Its crash reports go over the network, and would delay the exit of the process while a server stalls.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",  # capturing our output would cost time, and log the control codes of the bars
            save_code=False,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        )
        reason = "no API key: set WANDB_API_KEY or run wandb login" if self.init["mode"] else ""
        try:
            run = wandb.init(**self.init, settings=settings)
        except self.failures as error:
            reason = one_line(error)
            run = wandb.init(**{**self.init, "mode": "offline"}, settings=settings)
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        self.hint = f"to upload this run later: wandb sync {run.settings.sync_dir}"
        self.say(f"W&B is offline{reason and f' ({reason})'}; {self.hint}" if run.offline else f"W&B: {run.url}")
        return wandb

    def close(self, opened: Any, exit_code: int, state: str) -> None:
        try:
            opened.summary.update({"state": state})
            if state == "preempted":
                opened.run.mark_preempting()
            opened.finish(exit_code=exit_code)
        finally:
            # Not at the exit of the interpreter, where nothing would catch its errors.
            opened.teardown()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.submit(lambda wandb: wandb.log({**values, STEP: step}))

    def log_results(
        self, summary: Mapping[str, Any], figures: Mapping[str, Path], tables: Mapping[str, Table], step: int
    ) -> None:
        self.submit(lambda wandb: wandb.summary.update(dict(summary)))
        self.submit(
            lambda wandb: wandb.log(
                {
                    STEP: step,
                    **{name: wandb.Image(str(path)) for name, path in figures.items()},
                    **{name: wandb.Table(columns=head, data=rows) for name, (head, rows) in tables.items()},
                }
            )
        )

    def log_checkpoint(self, folder: Path, aliases: Sequence[str] = ()) -> None:
        self.submit(
            lambda wandb: wandb.log_artifact(
                str(folder), name=f"checkpoint-{wandb.run.id}", type="model", aliases=[*aliases, folder.name]
            )
        )


class AccelerateTracker(BackgroundTracker):
    """Logs by one of Accelerate's own tracker classes: scalars, the configuration, and, where it can, the figures.

    Args:
        name: its name in Accelerate, such as ``tensorboard``.
        say: shows one line; called from the thread, too.
        init: arguments of the class.
        config: the configuration, flat.
    """

    def __init__(
        self, name: str, say: Callable[[str], None], init: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        self.name, self._config = name, config
        super().__init__(say, **init)

    def open(self) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker = LOGGER_TYPE_TO_CLASS[self.name](**self.init)
        tracker.start()
        tracker.store_init_configuration(
            {name: v if isinstance(v, bool | int | float) else str(v) for name, v in self._config.items()}
        )
        return tracker

    def close(self, opened: Any, exit_code: int, state: str) -> None:
        if self.name == "mlflow" and exit_code:
            # Accelerate's class would end it as finished.
            importlib.import_module("mlflow").end_run("KILLED" if state == "preempted" else "FAILED")
        opened.finish()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.submit(methodcaller("log", dict(values), step=step))

    def log_results(
        self, summary: Mapping[str, Any], figures: Mapping[str, Path], tables: Mapping[str, Table], step: int
    ) -> None:
        values = {
            f"result/{split}_{name}": value
            for split in ("val", "test")
            if (scores := summary.get(split))
            for name, value in [("accuracy", scores["accuracy"]), *scores.get("custom", {}).items()]
        }
        self.log({name: value for name, value in values.items() if value is not None}, step)
        for name, path in figures.items():
            if self.name == "tensorboard":
                image = {name: np.asarray(Image.open(path).convert("RGB"))[None]}
                self.submit(methodcaller("log_images", image, step=step, dataformats="NHWC"))
            elif self.name == "mlflow":
                self.submit(methodcaller("log_artifact", str(path), "figures"))


def one_line(error: Exception) -> str:
    """Return the message of an error in one short line, without W&B's advice to wait longer."""
    text = textwrap.shorten(str(error).partition("Consider increasing")[0], 160, placeholder=" ...")
    return type(error).__name__ if text in ("", "<no message>") else text


def open_tracker(
    tracker: TrackerName,
    *,
    run_dir: Path,
    config: Mapping[str, Any],
    name: str,
    group: str | None,
    say: Callable[[str], None],
) -> Tracker:
    """Open the tracker that is asked for, and return at once.

    Args:
        tracker: ``auto`` is W&B if an API key or WANDB_MODE is set.
        run_dir: the run folder; W&B's own files go to its ``wandb``.
        config: the configuration.
        name: of the run.
        group: common to all launches of a run, so that W&B shows a chain of requeued jobs together.
        say: shows one line; called from another thread, too.
    """
    if tracker not in ("auto", "none", "wandb"):
        local: dict[str, Any] = {"run_name": name, "logging_dir": str(run_dir / tracker)}
        mlflow: dict[str, Any] = {"experiment_name": PROJECT, "run_name": name, "tags": {"group": group or name}}
        init = {"tensorboard": local, "aim": local, "mlflow": mlflow}.get(tracker, {"run_name": PROJECT})
        return AccelerateTracker(tracker, say, init, flatten(config))
    mode = choose_mode(tracker, os.environ)
    if mode == "none":
        return Tracker()
    return WandbTracker(
        say,
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=os.environ.get("WANDB_NAME", name),
        group=os.environ.get("WANDB_RUN_GROUP", group),
        dir=str(run_dir),
        job_type="train",
        config=dict(config),
        mode=mode,
    )


def choose_mode(tracker: TrackerName, environ: Mapping[str, str]) -> str | None:
    """Return the mode of W&B: ``none``, not at all; ``offline`` if there is no API key; or None: it uses WANDB_MODE and
    its own settings, which a mode would override."""
    wandb_mode, key = environ.get("WANDB_MODE", "").lower(), has_api_key(environ)
    if tracker == "none" or wandb_mode == "disabled" or (tracker == "auto" and not wandb_mode and not key):
        return "none"
    return None if key or wandb_mode in ("offline", "dryrun") else "offline"


def has_api_key(environ: Mapping[str, str]) -> bool:
    """Return whether W&B can log in without a prompt: by the environment, or by what ``wandb login`` wrote."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        entry = netrc.netrc(environ.get("NETRC") or Path(environ.get("HOME", "~"), ".netrc")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(entry and entry[2])
