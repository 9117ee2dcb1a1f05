"""Claims about `mnistm_dist.reporting.console`: in a pipe, in a dumb terminal and in a real one (a pseudo-terminal)."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnistm_dist.reporting import console as console_module
from mnistm_dist.reporting.console import Console, bar_text
from mnistm_dist.reporting.metrics import Metrics
from mnistm_dist.reporting.predictions import Predictions

STORY = """
import sys, time, warnings
from pathlib import Path
from types import SimpleNamespace
from mnistm_dist.reporting.metrics import Metrics
from mnistm_dist.reporting.console import Console
console = Console()
with console.library_warnings():
    console.header("mnistm_dist", {"recipe": "fast", "run": "runs/" + "a-long-name-" * 8})
    with console.progress("decoding train", 8000) as bar:
        for done in range(0, 8001, 800):
            bar(done, 8000)
            time.sleep(0.002)
    with console.progress("train", 40, "steps") as bar:
        for step in range(1, 41):
            time.sleep(0.02)
            bar(step, note=f"loss {2.3 / step:.4f}  1,234 images/s")
            if step == 10:
                warnings.warn("a library warns " * 30)
                warnings.warn("a library warns " * 30)
                print("another library prints", file=sys.stderr)
            if step % 20 == 0:
                with console.progress("evaluating val", 2000) as inner:
                    inner(2000)
                console.evaluation({"epoch": step // 20, "step": step, "val/loss": 0.3,
                    "val/accuracy": 0.97, "image_size": 32 * (step // 20), "full_image_size": 64, "best": True})
    split = {"accuracy": 0.9712, "correct": 1942, "total": 2000, "interval95": [0.963, 0.977]}
    checkpoint = {"step": 40, "chosen": "best on val", "averaged": True, "image_size": 64}
    summary = {"val": split, "train_seconds": 222.0, "images_per_second": 709.2, "checkpoint": checkpoint}
    command = "python -m mnistm_dist.predict 'runs/a long name of a run that is wider than the terminal' IMAGE"
    metrics = Metrics(classes=("0", "1"), confusion_matrix=((900, 30), (28, 1042)), log_loss=0.1, calibration_error=0.0)
    predictions = SimpleNamespace(metrics=metrics)
    console.result(Path("runs/x"), summary, {"val": predictions}, {"predict": command}, report=True)
"""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
MOVE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def rows(raw: str) -> list[str]:
    """Return what the rows of a terminal showed at any time: a line ends where the cursor is moved."""
    return MOVE.sub("\n", COLOUR.sub("", raw)).split("\n")


def wrapped(raw: str) -> list[str]:
    """Return the rows of a terminal without links and commands, which are left whole so that they can be copied."""
    return [row for row in rows(raw) if "file://" not in row and "python -m" not in row]


def environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
    return {**kept, "PYTHONUNBUFFERED": "", **extra}


def in_terminal(columns: int = 80, **extra: str) -> str:
    """Return what the story writes to a pseudo-terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-c", STORY]
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment(TERM="xterm-256color", **extra)
    ) as process:
        os.close(slave)
        pieces = []
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # Linux: the last writer has closed it
                break
            if not piece:
                break
            pieces.append(piece)
        assert process.wait() == 0
    os.close(master)
    return b"".join(pieces).decode()


def in_pipe(**extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", STORY], capture_output=True, text=True, env=environment(**extra))


def test_a_pipe_gets_plain_lines_with_the_time_and_no_control_codes() -> None:
    done = in_pipe(TERM="xterm-256color", FORCE_COLOR="1")
    lines = done.stdout.splitlines()
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert all(re.match(r"\d\d:\d\d:\d\d", line) for line in lines), lines
    assert done.stderr == "another library prints\n"
    text = [line[9:] for line in lines]
    assert text[0] == "mnistm_dist"
    assert any(
        re.fullmatch(r"decoding train: 8,000/8,000 images in 0\.\d s \([\d,]+ images/s\)", line) for line in text
    )
    assert "train: 40/40 steps" in done.stdout
    assert "evaluating val" not in done.stdout, "a bar within another leaves no line"
    assert sum("a library warns" in line for line in text) == 1
    head = text.index("epoch      step  train loss  val loss  val accuracy")
    assert text[head + 1] == "    1        20                0.3000       97.00 %  best at 32 px"
    assert text[head + 2].endswith("97.00 %  best")
    assert text[-3] == "written  report            runs/x/report.html"
    assert text[-1].startswith("next     predict           python -m mnistm_dist.predict 'runs/a long name")
    text = text[:-3]
    assert "  val         1,942 of 2,000 correct: 97.10 % (95 % interval 96.30 to 97.70 %)" in text
    assert "  checkpoint  step 40 (best on val), averaged weights, 64 px" in text
    assert "  training    3:42, 709 images/s" in text
    paragraphs = [line for line in text if not line.startswith("  ") and "a library" not in line]
    assert max(map(len, paragraphs)) <= 71, "80 columns with the time"


@pytest.mark.parametrize("length", range(1, 60, 4))
def test_a_number_and_its_percent_sign_stay_on_one_line(length: int) -> None:
    stream = io.StringIO()
    metrics = Metrics(
        classes=("a" * length, "b"), confusion_matrix=((90, 10), (2, 2)), log_loss=0.1, calibration_error=0.0
    )
    predictions = Predictions(
        keys=(), labels=np.zeros(0), predicted=np.zeros(0), probabilities=np.zeros((0, 2)), classes=metrics.classes
    )
    # The cached property.
    vars(predictions)["metrics"] = metrics
    Console(stream=stream).result(None, {}, {"val": predictions}, {}, report=False)
    lines = [line[9:] for line in stream.getvalue().splitlines()]
    assert "50.00 %" in "".join(lines)
    assert not any(line.startswith("%") for line in lines)


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_dumb_terminal_gets_plain_lines_too(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console = Console(stream=stream)
    console.header("title", {"a": "b"})
    with console.progress("work", 3) as bar:
        bar(3)
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().splitlines()[0].endswith(" title")


def test_a_terminal_of_80_columns_shows_panels_and_a_live_bar_and_nothing_wider() -> None:
    raw = in_terminal()
    assert "\x1b[?25l" in raw, "the cursor is hidden while a bar is live"
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l"), "and shown again"
    assert max(map(len, wrapped(raw))) <= 80
    text = "\n".join(rows(raw))
    for part in ("╭─ mnistm_dist ", "loss 0.", "1,234 images/s", " s left", " 50 %", "╭─ result ", "best at 32 px"):
        assert part in text, part
    assert "a library warns a library" in text
    assert "another library prints" in text


def test_the_report_is_a_link_and_a_command_is_one_line_in_a_terminal() -> None:
    raw = in_terminal()
    address = Path("runs/x/report.html").resolve().as_uri()
    assert re.search(rf"\x1b\]8;[^;]*;{re.escape(address)}\x1b\\runs/x/report.html", raw)
    assert "python -m mnistm_dist.predict 'runs/a long name of a run that is wider than the terminal' IMAGE" in raw


def test_nothing_is_wider_than_a_narrow_terminal() -> None:
    assert max(map(len, wrapped(in_terminal(columns=60)))) <= 60


@pytest.mark.filterwarnings("default")  # a warning that is shown, as in a command
def test_other_ranks_write_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(enabled=False)
    console.header("a", {"b": "c"})
    console.line("x")
    console.warn("x")
    with console.library_warnings():
        warnings.warn("x", stacklevel=1)
    with console.progress("p", 3) as bar:
        bar(1)
        bar(3, 3)
    with console.progress("train", 3, "steps") as training:
        training(1, note="loss 1.0000")
    console.result(None, {}, {}, {}, report=False)
    assert capsys.readouterr() == ("", "")


def test_the_log_of_a_killed_job_is_complete(tmp_path: Path) -> None:
    script = (
        "import os, signal; from mnistm_dist.reporting.console import Console\n"
        "Console().line('the last line'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", script], stdout=log)
    assert (tmp_path / "log").read_text().endswith("the last line\n")


def test_a_closed_pipe_does_not_end_the_run() -> None:
    script = (
        "import sys; from mnistm_dist.reporting.console import Console\nconsole = Console()\n"
        "for i in range(20000): console.line(str(i))\nprint('trained to the end', file=sys.stderr)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == "trained to the end\n"
    assert process.wait() == 0


def test_a_full_disk_does_not_end_the_run() -> None:
    with Path("/dev/full").open("w") as stream:
        console = Console(stream=stream)
        with console.progress("work", 1) as bar:
            bar(1)
        console.line("lost")
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def test_a_terminal_that_is_closed_does_not_end_the_run(tmp_path: Path) -> None:
    # As the end of a login shell does to a process that was disowned: no SIGHUP, but every write fails.
    script = (
        f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{STORY}\nopen({str(tmp_path / 'end')!r}, 'w')"
    )
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        env=environment(TERM="xterm"),
        start_new_session=True,
    ) as process:
        os.close(slave)
        os.read(master, 100)
        os.close(master)
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    assert process.returncode == 0, errors
    assert (tmp_path / "end").exists()


def test_characters_that_the_encoding_lacks_are_escaped() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(stream=stream).line("runs/é")
    assert raw.getvalue().endswith(b"runs/\\xe9\n")


@pytest.mark.parametrize("live", [False, True])
def test_control_characters_of_file_names_are_escaped(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream: Any = io.StringIO()
    stream.isatty = lambda: live
    monkeypatch.setenv("TERM", "xterm")
    name = "a\x1b]0;owned\x07\udcff"
    console = Console(stream=stream)
    console.line(name)
    console.header("packed", {"from": name})
    console.header(name, {name: ""})
    with console.progress(name, None):
        pass
    output = COLOUR.sub("", MOVE.sub("", stream.getvalue()))
    assert output.count("a\\x1b]0;owned\\x07\\udcff") >= 5
    assert "\x1b" not in output


class Clock:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(console_module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_bar_writes_at_most_one_line_in_a_few_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    with Console(stream=stream).progress("train", 100_000, "steps") as bar:
        for step in range(36_000):
            clock.now = step * 0.1
            bar(step)
    lines = stream.getvalue().splitlines()
    # An hour: every 5 s in the first minutes, then every fiftieth of the time that has passed, at most 60 s.
    assert 100 < len(lines) < 250
    assert "  10 steps/s  " in lines[0]
    assert lines[0].endswith(" left")


def remaining(console: Console) -> float:
    seconds = console.bars.tasks[0].time_remaining
    assert seconds is not None
    return seconds


def test_the_time_left_follows_the_recent_speed(clock: Clock) -> None:
    console = Console(stream=io.StringIO())
    with console.progress("train", 1000, "steps") as bar:
        for step in range(501):
            # Ten steps a second, and one a second after step 400.
            clock.now = step * 0.1 if step <= 400 else 40 + (step - 400)
            bar(step)
        assert remaining(console) == pytest.approx(500, rel=0.05)


def test_a_resumed_run_does_not_count_earlier_steps(clock: Clock) -> None:
    stream = io.StringIO()
    with Console(stream=stream).progress("train", 1000, "steps", start=900) as bar:
        clock.now = 4.0
        bar(950, note="loss 1.0000")
        clock.now = 10.0
    assert stream.getvalue().endswith(" train: 950/1,000 steps in 10 s (5 steps/s)\n")


def test_bytes_are_shown_as_megabytes(clock: Clock) -> None:
    console = Console(stream=io.StringIO())
    with console.progress("reading", 181_000_000, "bytes") as bar:
        bar(500_000)
        clock.now = 2.0
        bar(90_500_000)
        assert bar_text(console.bars.tasks[0]) == "90.5/181.0 MB  45 MB/s"


def test_a_callback_without_a_total_shows_what_is_done() -> None:
    stream = io.StringIO()
    with Console(stream=stream).progress("download", None, "bytes") as bar:
        bar(90_500_000, 0)
    assert "download: 90.5 MB in" in stream.getvalue()
    assert "/" not in stream.getvalue().replace("MB/s", "")


def test_a_failed_work_leaves_no_line() -> None:
    stream = io.StringIO()
    console = Console(stream=stream)
    with pytest.raises(ValueError, match="no"), console.progress("work", 3):
        raise ValueError("no")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("live", [False, True])
def test_an_update_costs_far_less_than_a_fiftieth_of_a_step(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream: Any = io.StringIO()
    stream.isatty = lambda: live
    monkeypatch.setenv("TERM", "xterm")
    with Console(stream=stream).progress("train", 2000, "steps") as bar:
        began = time.perf_counter()
        for step in range(2000):
            bar(step, note="loss 1.0000")
        cost = (time.perf_counter() - began) / 2000
    assert cost < 0.1 * 0.02
