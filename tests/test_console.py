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
from collections.abc import Callable
from pathlib import Path

import pytest

from mnistm_dist.reporting.console import Console
from mnistm_dist.reporting.progress import Progress, duration, number
from mnistm_dist.reporting.terminal import PlainScreen, TerminalScreen

STORY = """
import sys, time, warnings
from mnistm_dist.reporting.console import Console
console = Console()
with console.library_warnings():
    console.header("mnistm_dist", {"recipe": "fast", "run": "runs/" + "a-long-name-" * 8})
    with console.progress("decoding train", 8000) as bar:
        for done in range(0, 8001, 800):
            bar(done, 8000)
            time.sleep(0.01)
    with console.training(40) as bar:
        for step in range(1, 41):
            time.sleep(0.03)
            bar.update(step, epoch=step // 20, loss=2.3 / step, lr=1e-3, images_per_second=1234.5, image_size=32)
            if step == 10:
                warnings.warn("a library has something to say " * 20)
                warnings.warn("a library has something to say " * 20)
                print("and another prints", file=sys.stderr)
            if step % 20 == 0:
                with console.progress("evaluating val", 2000) as inner:
                    inner.update(2000)
                console.evaluation({"epoch": step // 20 - 1, "step": step, "split": "val", "val/loss": 0.3,
                    "val/accuracy": 0.97, "image_size": 32 * (step // 20), "full_image_size": 64, "best": True})
    split = {"accuracy": 0.9712, "correct": 1942, "total": 2000, "interval95": [0.963, 0.977]}
    checkpoint = {"step": 40, "chosen": "best on val", "averaged": True, "image_size": 64}
    summary = {"val": split, "train_seconds": 222.0, "images_per_second": 709.2, "checkpoint": checkpoint}
    console.result(summary, "1,942 of 2,000 images are right. " * 5, {"run folder": "runs/x"})
"""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
MOVE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def rows(raw: str) -> list[str]:
    """What stood in the rows of a terminal at any time: a line ends where the cursor is moved."""
    return MOVE.sub("\n", COLOUR.sub("", raw)).split("\n")


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
    return {**kept, "PYTHONUNBUFFERED": "", **more}


def in_terminal(columns: int = 80, **more: str) -> str:
    """What the story writes to a pseudo-terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-c", STORY]
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment(TERM="xterm-256color", **more)
    ) as process:
        os.close(slave)
        pieces = []
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # Linux says so when the last writer has gone
                break
            if not piece:
                break
            pieces.append(piece)
        assert process.wait() == 0
    os.close(master)
    return b"".join(pieces).decode()


def in_pipe(**more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", STORY], capture_output=True, text=True, env=environment(**more))


def test_a_pipe_gets_plain_lines_with_the_time_and_no_control_codes() -> None:
    done = in_pipe(TERM="xterm-256color", FORCE_COLOR="1")
    lines = done.stdout.splitlines()
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert all(re.match(r"\d\d:\d\d:\d\d", line) for line in lines), lines
    assert done.stderr == "and another prints\n"
    text = [line[9:] for line in lines]
    assert text[0] == "mnistm_dist"
    assert any(
        re.fullmatch(r"decoding train: 8,000/8,000 images in 0\.\d s \([\d,]+ images/s\)", line) for line in text
    )
    assert "train: 40/40 steps" in done.stdout
    assert "evaluating val" not in done.stdout, "a bar within another leaves no line"
    assert sum("a library has something to say" in line for line in text) == 1
    head = text.index("epoch    step  split  train loss    loss  accuracy")
    assert text[head + 1] == "    1      20    val              0.3000   97.00 %  best at 32 px"
    assert text[head + 2 :][0].endswith("97.00 %  best")
    assert "  val         97.12 % (1,942 of 2,000; 95 % interval 96.30 to 97.70 %)" in text
    assert "  checkpoint  step 40 (best on val), averaged weights, 64 px" in text
    wide = [line for line in lines if len(line) > 80 and "a-long-name" not in line and "a library" not in line]
    assert not wide


def test_a_number_and_its_percent_sign_stay_on_one_line() -> None:
    stream = io.StringIO()
    Console(stream=stream).result({}, f"{'x' * 65} 12.50 % of all", {})
    assert stream.getvalue().splitlines()[-1].endswith(" 12.50 % of all")


@pytest.mark.parametrize("term", ["dumb", "unknown", ""])
def test_a_dumb_terminal_gets_plain_lines_too(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console = Console(stream=stream)
    console.header("title", {"a": "b"})
    with console.progress("work", 3) as bar:
        bar.update(3)
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().splitlines()[0].endswith(" title")


def test_a_terminal_of_80_columns_shows_panels_a_live_bar_and_nothing_wider() -> None:
    raw = in_terminal()
    assert "\x1b[?25l" in raw, "the cursor is hidden while a bar is live"
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l"), "and comes back"
    assert max(map(len, rows(raw))) <= 80
    text = "\n".join(rows(raw))
    for part in ("╭─ mnistm_dist ", "loss 0.", "1,234 images/s", "s left", "╭─ result ", "97.12 %", "best at 32 px"):
        assert part in text, part
    assert text.count("a library has something to say a library") >= 1
    assert "and another prints" in text


def test_a_narrow_terminal_is_kept_to_as_well() -> None:
    assert max(map(len, rows(in_terminal(columns=60)))) <= 60


@pytest.mark.filterwarnings("default")  # a warning that is shown, as in a door
def test_nothing_is_said_on_other_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(enabled=False)
    console.header("a", {"b": "c"})
    console.line("x")
    console.warn("x")
    with console.library_warnings():
        warnings.warn("x", stacklevel=1)
    with console.progress("p", 3) as bar:
        bar.update(1)
        bar(3, 3)
    with console.training(3) as training:
        training.update(1, epoch=0, loss=1.0, lr=1.0, images_per_second=1.0)
    console.evaluation({})
    console.result({}, "x", {})
    assert capsys.readouterr() == ("", "")


def test_a_killed_jobs_log_is_complete_to_its_last_line(tmp_path: Path) -> None:
    script = (
        "import os, signal; from mnistm_dist.reporting.console import Console\n"
        "Console().line('the last word'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", script], stdout=log)
    assert (tmp_path / "log").read_text().endswith("the last word\n")


def test_a_reader_that_has_gone_does_not_end_the_run() -> None:
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


def test_a_terminal_that_is_closed_does_not_end_the_run(tmp_path: Path) -> None:
    # As a login shell's end does to what was disowned: no SIGHUP, but every write fails.
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


def test_names_that_the_streams_encoding_lacks_are_written_all_the_same() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(stream=stream).line("runs/é")
    assert raw.getvalue().endswith(b"runs/\\xe9\n")


@pytest.mark.parametrize("screen", [PlainScreen, TerminalScreen])
def test_a_name_cannot_command_the_terminal(screen) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    shown = screen(stream)
    ways = (
        shown.line,
        shown.warn,
        shown.text,
        lambda name: shown.panel("packed", {"from": name}),
        lambda name: shown.panel(name, {}),
        lambda name: shown.panel("packed", {name: ""}),
        lambda name: shown.row([name], [1], "row"),
    )
    for show in ways:
        show("a\x1b]0;owned\x07\udcff")
    said = stream.buffer.getvalue() if screen is PlainScreen else (stream.flush(), stream.buffer.getvalue())[1]
    assert said.count(b"a\\x1b]0;owned\\x07\\udcff") == len(ways)
    assert b"\x1b" not in said


def test_a_bar_writes_at_most_one_line_in_a_few_seconds() -> None:
    now = [0.0]
    stream = io.StringIO()
    screen = PlainScreen(stream)
    progress = Progress("train", 100_000, "steps", clock=lambda: now[0])
    with screen.bar(progress):
        for step in range(36_000):
            now[0] = step * 0.1
            progress.advance(step, {})
            if screen.due(progress):
                screen.show(progress)
    lines = stream.getvalue().splitlines()
    # An hour: every 5 s for the first minutes, then every fiftieth of the time that has passed, 60 s at the last.
    assert 100 < len(lines) < 250
    assert "10 steps/s" in lines[0]


def test_time_left_follows_the_recent_speed() -> None:
    now = [0.0]
    progress = Progress("train", 1000, "steps", clock=lambda: now[0])
    for step in range(501):
        # Ten steps a second, and after step 400 one.
        now[0] = step * 0.1 if step <= 400 else 40 + (step - 400)
        progress.advance(step, {})
    assert progress.seconds_left == pytest.approx(500, rel=0.05)
    assert progress.left() == "8:20 left"


def test_time_left_does_not_count_an_evaluation() -> None:
    now = [0.0]
    progress = Progress("train", 1000, "steps", clock=lambda: now[0])
    for step in range(501):
        progress.advance(step, {})
        now[0] += 0.1
        if step == 498:
            now[0] += 60
            progress.leave_out(60)
    assert progress.seconds_left == pytest.approx(50, rel=0.05)


def test_a_resumed_run_does_not_count_what_was_done_before() -> None:
    now = [0.0]
    progress = Progress("train", 1000, "steps", start=900, clock=lambda: now[0])
    now[0] = 10.0
    progress.advance(950, {})
    assert progress.speed == pytest.approx(5.0)
    assert progress.finished() == "train: 950/1,000 steps in 10 s (5 steps/s)"


def test_bytes_are_shown_as_megabytes() -> None:
    now = [0.0]
    progress = Progress("reading", 181_000_000, "bytes", clock=lambda: now[0])
    now[0] = 2.0
    progress.advance(90_500_000, {})
    assert progress.counted() == "90.5/181.0 MB"
    assert progress.rate() == "45.2 MB/s"


def test_a_summary_with_foreign_fields_is_told_without_them() -> None:
    stream = io.StringIO()
    Console(stream=stream).result({"train_seconds": {"a": 1}, "images_per_second": "fast"}, "words", {})
    Console(stream=stream).result({"train_seconds": 60, "images_per_second": []}, "words", {})
    assert stream.getvalue().count("training") == 1


def test_a_callback_that_knows_no_total_shows_what_is_done() -> None:
    stream = io.StringIO()
    with Console(stream=stream).progress("download", None, "bytes") as bar:
        bar(90_500_000, 0)
    assert "download: 90.5 MB in" in stream.getvalue()
    assert "/" not in stream.getvalue().replace("MB/s", "")


@pytest.mark.parametrize(
    ("words", "value", "text"),
    [
        (duration, 0.04, "0.0 s"),
        (duration, 9.94, "9.9 s"),
        (duration, 59.97, "1:00"),
        (duration, 245.0, "4:05"),
        (duration, 7445.0, "2:04:05"),
        (duration, 266_645.0, "3 d 2:04:05"),
        (number, 0.98765, "0.988"),
        (number, 12.345, "12.3"),
        (number, 1234.5, "1,234"),
    ],
)
def test_times_and_numbers_are_short(words: Callable[[float], str], value: float, text: str) -> None:
    assert words(value) == text


def test_an_update_at_every_step_costs_far_less_than_a_fiftieth_of_a_step() -> None:
    console = Console(stream=io.StringIO())
    with console.training(2000) as bar:
        began = time.perf_counter()
        for step in range(2000):
            bar.update(step, epoch=0, loss=1.0, lr=1e-3, images_per_second=700.0)
        cost = (time.perf_counter() - began) / 2000
    assert cost < 0.1 * 0.02
