"""Weights & Biases beside a run, through Accelerate's tracker; it never stops, delays or slows the training.

1. `open_tracker` decides whether and how, and starts a thread that alone talks to W&B. It connects
   (`mnistm_dist.reporting.wandb_connection`), online or else offline, and says in one line how to upload later; the
   training does not wait for it.
2. `Tracker.log` and its sisters put work on a queue; `Tracker.finish` says how the run ended, and waits no longer than
   `FINISH_SECONDS` for what is not uploaded by then.

Only rank 0 opens a tracker; the others, and a run without W&B, have a `NullTracker`. What W&B holds is a copy: the run
folder is the truth.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mnistm_dist.reporting.wandb_connection import FINISH_SECONDS, INIT_SECONDS, STEP, choose_mode, connect, one_line

if TYPE_CHECKING:
    from accelerate.tracking import WandBTracker

GRACE_SECONDS = 2.0
"""What W&B may take beyond `FINISH_SECONDS` to notice that they are over."""
LONGEST_QUEUE = 20_000
"""Pieces of work that wait for W&B at most; what comes then is dropped, and the number is told at the end."""

Work = Callable[["WandBTracker"], None]


class NullTracker:
    """A tracker that does nothing: on every rank but 0, and where W&B is not wanted."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Logs scalars at a step."""

    def log_images(self, images: Mapping[str, Path], step: int) -> None:
        """Logs image files, which must stay where they are until the run ends."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Logs a table of texts and numbers."""

    def log_checkpoint(self, folder: Path, aliases: Sequence[str] = ()) -> None:
        """Uploads a checkpoint's folder as an artifact of type ``model``."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Sets values that hold for the run as a whole."""

    def finish(self, exit_code: int, state: str) -> None:
        """Ends the run in W&B.

        Args:
            exit_code: of the process; W&B shows what is not 0 as failed.
            state: as in ``state.json``: ``finished``, ``preempted`` or ``failed``.
        """


class Tracker(NullTracker):
    """A tracker that hands everything to a thread of its own; made by `open_tracker`."""

    def __init__(self, connect: Callable[[], tuple[WandBTracker | None, str]], say: Callable[[str], None]) -> None:
        self._connect = connect
        self._say = say
        self._work: queue.Queue[Work | None] = queue.Queue(LONGEST_QUEUE)
        self._dropped = 0
        self._connected = False
        self._over = False
        self._listens = True
        self._place = ""
        # A daemon, so that a W&B that hangs for ever cannot hold the process.
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        row = {**values, STEP: step}
        self._put(lambda wandb_tracker: wandb_tracker.log(row))

    def log_images(self, images: Mapping[str, Path], step: int) -> None:
        files = {name: [str(path)] for name, path in images.items()}

        def work(wandb_tracker: WandBTracker) -> None:
            import wandb

            shown = {name: [wandb.Image(path) for path in paths] for name, paths in files.items()}
            wandb_tracker.log({**shown, STEP: step})

        self._put(work)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        def work(wandb_tracker: WandBTracker) -> None:
            import wandb

            wandb_tracker.log({name: wandb.Table(columns=list(columns), data=[*map(list, rows)]), STEP: step})

        self._put(work)

    def log_checkpoint(self, folder: Path, aliases: Sequence[str] = ()) -> None:
        def work(wandb_tracker: WandBTracker) -> None:
            import wandb

            run = wandb_tracker.tracker
            artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata={"folder": folder.name})
            artifact.add_dir(str(folder))
            run.log_artifact(artifact, aliases=list(aliases))

        self._put(work)

    def summary(self, values: Mapping[str, Any]) -> None:
        kept = dict(values)
        self._put(lambda wandb_tracker: wandb_tracker.tracker.summary.update(kept))

    def finish(self, exit_code: int, state: str) -> None:
        def work(wandb_tracker: WandBTracker) -> None:
            run = wandb_tracker.tracker
            run.summary.update({"state": state})
            if state == "preempted":
                run.mark_preempting()
            # Accelerate's own finish would end every run with exit code 0.
            run.finish(exit_code=exit_code)

        self._put(work)
        try:
            self._work.put_nowait(None)
        except queue.Full:
            self._dropped += 1
        self._thread.join(FINISH_SECONDS + GRACE_SECONDS + (0 if self._connected else INIT_SECONDS))
        self._over = True
        if self._thread.is_alive():
            self._say(f"W&B did not end in time; {self._how_to_sync()}")
        if self._dropped:
            self._say(f"W&B was too slow for {self._dropped:,} entries, which are only in log.jsonl")

    def _put(self, work: Work) -> None:
        if not self._listens:
            return
        try:
            self._work.put_nowait(work)
        except queue.Full:
            self._dropped += 1

    def _run(self) -> None:
        try:
            self._serve()
        except ImportError as error:
            self._tell(f"W&B is off (it cannot be imported: {one_line(error)}); the run folder holds everything")
        finally:
            self._listens = False

    def _serve(self) -> None:
        # W&B's reports on itself go over the network, and hold the end of the process while a server stalls.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        gone = (HandleAbandonedError, MailboxClosedError, ConnectionError)  # W&B's own process has died
        wandb_tracker, reason = self._connect()
        self._connected = True
        if wandb_tracker is None:
            self._tell(f"W&B is off ({reason}); the run folder holds everything")
            return
        run = wandb_tracker.tracker
        self._place = run.settings.sync_dir
        if run.offline:
            self._tell(f"W&B is offline{f' ({reason})' if reason else ''}; {self._how_to_sync()}")
        else:
            self._tell(f"W&B: {run.url}")
        try:
            while (work := self._work.get()) is not None and not self._over:
                self._do(work, wandb_tracker, (wandb.Error, OSError, ValueError, TypeError), gone)
            if not self._over:
                # Here, and not when the interpreter ends: there, nothing would catch what goes wrong.
                wandb.teardown()
        except gone:
            if not self._over:
                self._say("W&B's own process has died; the run goes on, and its folder holds everything")
                with suppress(*gone):
                    wandb.teardown()

    def _do(
        self,
        work: Work,
        wandb_tracker: WandBTracker,
        failures: tuple[type[Exception], ...],
        gone: tuple[type[Exception], ...],
    ) -> None:
        try:
            work(wandb_tracker)
        except gone:
            raise
        except TimeoutError:
            self._tell(f"W&B did not take everything in {FINISH_SECONDS:.0f} s; {self._how_to_sync()}")
        except failures as error:
            self._tell(f"W&B failed ({one_line(error)}); the run goes on, and its folder holds everything")

    def _tell(self, text: str) -> None:
        # Nobody listens to a run that has ended.
        if not self._over:
            self._say(text)

    def _how_to_sync(self) -> str:
        return (
            f"to upload this run later: wandb sync {self._place}" if self._place else "the run folder holds everything"
        )


def open_tracker(
    track: Literal["auto", "wandb", "none"],
    *,
    run_dir: Path,
    config: Mapping[str, Any],
    name: str,
    group: str | None,
    say: Callable[[str], None],
) -> NullTracker:
    """Starts tracking where it is wanted; returns at once.

    Args:
        track: ``auto`` is W&B where an API key or WANDB_MODE is set.
        run_dir: the run folder; W&B's own files go to ``wandb`` in it.
        config: the whole configuration.
        name: of the run.
        group: what the launches of one run have in common, so that W&B shows a chain of requeued jobs together.
        say: takes one line for the person who watches; called from another thread, too.
    """
    mode, reason = choose_mode(track, os.environ)
    if mode == "none":
        if reason:
            say(f"W&B is off: {reason}")
        return NullTracker()
    return Tracker(lambda: connect(mode, reason, run_dir, dict(config), name, group), say)
