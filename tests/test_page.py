"""Claims about `mnistm_dist.report`, `mnistm_dist.reporting.page` and what they read and compare."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMEDRIVER, CHROMIUM, Browser, browser
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import CLASSES, synthetic_images, write_run

from mnistm_dist import __version__, report
from mnistm_dist.errors import UserError, run_cli
from mnistm_dist.reporting import figures
from mnistm_dist.reporting.comparison import differing_fields, mean_and_spread, paired_difference, seed_groups
from mnistm_dist.reporting.page import write_report
from mnistm_dist.reporting.predictions import Predictions, mistakes
from mnistm_dist.reporting.runs import RunRecord, read_run, read_runs
from mnistm_dist.reporting.style import save


def small_run(folder: Path, **options: object) -> Path:
    """A run with val alone, unless asked otherwise: a page of two splits takes twice as long."""
    return write_run(
        folder,
        **{
            "val_size": 60,
            "test_split": False,
            "accuracy": 0.8,
            "epochs": 3,
            "steps_per_epoch": 4,
            "resume_at": 6,
            **options,
        },
    )  # type: ignore[arg-type]


def page_of(run_dirs: list[Path], out: Path) -> str:
    write_report(run_dirs, out)
    return out.read_text(encoding="utf-8")


def plain(page: str) -> str:
    """The page's text, without its figures."""
    text = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)).replace("\xa0", " ")


# One run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = small_run(tmp_path_factory.mktemp("runs") / "fast-1", test_split=True)
    predictions = read_run(run, __version__).predictions["val"]
    wrong = mistakes(predictions, 12)
    images = synthetic_images(predictions.labels[[row.id for row in wrong]], 0)
    save(figures.mistakes(images, wrong, len(wrong), "Mistakes, val"), run / "mistakes_val.png")
    return run


@pytest.fixture(scope="module")
def page(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert write_report([finished], out) == []
    return out


def test_the_report_of_a_run_says_everything_that_the_run_folder_says(finished: Path, page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    text = plain(html)
    summary = json.loads((finished / "summary.json").read_text())
    assert f"{100 * summary['val']['accuracy']:.2f} %" in text
    assert f"{100 * summary['test']['accuracy']:.2f} %" in text
    for part in (
        "fast-1",
        "finished · step 12 · resumed 1 time",
        "692,106",
        "learning_rate 0.004",
        "Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False) 64 × 32 × 32 9,408",
        "lineage regenerated",
        "ab" * 32,
        "python -m mnistm_dist.train --recipe fast --seed 0 --learning-rate 0.004",
        "torch 2.14.1",
        "best on val",
        "32 px (smaller)",
        "images are right",
    ):
        assert part in text, part
    assert "What is missing" not in text
    assert re.search("loses? most", text)
    assert html.count("<svg") == 3 * 2 + 1
    assert "data:image/png;base64," in html


def test_the_page_loads_nothing_and_runs_nothing(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', html)
    assert "<script" not in html
    assert "url(" not in re.sub(r"url\(#", "", html)
    assert "default-src 'none'" in html


def test_what_a_person_wrote_is_shown_and_never_run(tmp_path: Path) -> None:
    run = small_run(tmp_path / "<img src=x onerror=alert(1)>")
    environment = json.loads((run / "environment.json").read_text())
    environment["command"] = "train --shards '<script>alert(1)</script>'"
    (run / "environment.json").write_text(json.dumps(environment))
    page = page_of([run], tmp_path / "report.html")
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;" in page


def test_the_report_is_written_in_less_than_ten_seconds_of_work(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", val_size=4001, epochs=10, steps_per_epoch=43)
    began = time.process_time()
    write_report([run], tmp_path / "report.html")
    assert time.process_time() - began < 10.0


# Runs of which something is missing


def test_half_a_log_is_told_and_the_rest_reported(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    log = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(log[: len(log) // 2])
    missing = write_report([run], tmp_path / "report.html")
    assert missing == ["The last line of log.jsonl is cut: the run was killed while it wrote."]
    text = plain((tmp_path / "report.html").read_text())
    assert missing[0] in text
    assert "Learning curve" in text


def test_lines_that_are_none_are_counted(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    with (run / "log.jsonl").open("a") as file:
        file.write('nonsense\n[1, 2]\n{"kind": "train"}\n')
    (missing,) = write_report([run], tmp_path / "report.html")
    assert re.fullmatch(r"3 of \d+ lines of log.jsonl cannot be read and were left out\.", missing)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("config.yaml", "config.yaml is not there."),
        ("environment.json", "environment.json is not there."),
        ("state.json", "state.json is not there."),
        ("log.jsonl", "log.jsonl is not there."),
        ("architecture.json", "architecture.json is not there."),
        ("summary.json", "summary.json is not there."),
        ("checkpoints", "There is no checkpoint: the model itself is not in this folder."),
        ("predictions_val.csv", "predictions_val.csv is not there: calibration and comparisons of val are left out."),
    ],
)
def test_a_missing_file_is_named_and_the_rest_reported(tmp_path: Path, name: str, sentence: str) -> None:
    run = small_run(tmp_path / "run")
    shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    record = read_run(run, __version__)
    assert record.missing == (sentence,)
    assert record.metrics["val"].total == 60


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "state.json", "architecture.json", "summary.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"text"', "\x00\xff: ["])
def test_a_damaged_file_is_named_and_the_rest_reported(tmp_path: Path, name: str, content: str) -> None:
    run = small_run(tmp_path / "run")
    (run / name).write_text(content, encoding="latin-1")
    record = read_run(run, __version__)
    assert any(sentence.startswith(name) for sentence in record.missing), record.missing
    assert record.metrics["val"].total == 60


def test_a_run_without_predictions_is_reported_from_its_summary(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    for path in run.glob("predictions_*.csv"):
        path.unlink()
    page = page_of([run], tmp_path / "report.html")
    assert "images are right" in plain(page)
    assert page.count("<svg") == 2 + 1, "no calibration"


def test_a_run_that_was_killed_before_any_evaluation_is_reported(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    for name in ("summary.json", "predictions_val.csv"):
        (run / name).unlink()
    (run / "state.json").write_text(json.dumps({"state": "preempted", "step": 7, "reason": "SIGTERM"}))
    missing = write_report([run], tmp_path / "report.html")
    assert "summary.json is not there yet: the run is preempted." in missing
    assert "There are no predictions: neither predictions_val.csv nor predictions_test.csv." in missing
    assert "preempted · step 7 · SIGTERM" in plain((tmp_path / "report.html").read_text())


@pytest.mark.parametrize(
    ("world_size", "resumed", "heading"),
    [
        (1, False, "To repeat this run"),
        (2, False, "To repeat this run, on 2 processes"),
        (2, True, "The command of its last launch, on 2 processes"),
    ],
)
def test_a_command_is_said_to_repeat_a_run_only_where_it_does(tmp_path: Path, world_size, resumed, heading) -> None:
    run = small_run(tmp_path / "run", resume_at=6 if resumed else None)
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**environment, "command": "train", "world_size": world_size}))
    write_report([run], tmp_path / "report.html")
    assert f">{heading}</h3>" in (tmp_path / "report.html").read_text()


def test_a_run_of_another_version_says_so(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    environment = json.loads((run / "environment.json").read_text()) | {"mnistm_dist": "9.9"}
    (run / "environment.json").write_text(json.dumps(environment))
    config = (run / "config.yaml").read_text() + "future:\n  field: [1, {deep: true}]\n"
    (run / "config.yaml").write_text(config)
    (run / "summary.json").write_text(json.dumps({"val": {"accuracy": 0.9}, "data": "elsewhere", "checkpoint": 3}))
    (run / "predictions_val.csv").unlink()
    missing = write_report([run], tmp_path / "report.html")
    assert f"The run was written by version 9.9 and is read by {__version__}." in missing
    assert any(line.startswith("summary.json on val was left out") for line in missing)


# Several runs


def predictions_of(right: list[bool]) -> Predictions:
    labels = np.arange(len(right)) % 10
    predicted = np.where(right, labels, (labels + 1) % 10)
    probabilities = np.eye(10)[predicted]
    keys = tuple(f"{i:08d}" for i in range(len(right)))
    return Predictions(keys=keys, labels=labels, predicted=predicted, probabilities=probabilities, classes=CLASSES)


def test_the_paired_interval_is_that_of_agresti_and_min() -> None:
    # 100 images: 10 that only the run reads right, 4 that only the reference does.
    run = predictions_of([True] * 80 + [True] * 10 + [False] * 4 + [False] * 6)
    reference = predictions_of([True] * 80 + [False] * 10 + [True] * 4 + [False] * 6)
    found = paired_difference(run, reference)
    assert found is not None
    assert (found.only_right, found.only_reference_right, found.difference) == (10, 4, 0.06)
    middle, spread = 6 / 102, math.sqrt((10.5 + 4.5) - 6**2 / 102) / 102
    assert found.interval95 == pytest.approx((middle - 1.959964 * spread, middle + 1.959964 * spread))
    # McNemar's exact test: 4 or fewer of 14 coins, two-sided.
    assert found.p_value == pytest.approx(2 * (1 + 14 + 91 + 364 + 1001) / 2**14)
    assert not found.decided


def test_the_paired_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng, covered, trials = np.random.default_rng(0), 0, 600
    for _ in range(trials):
        cell = rng.choice(4, size=400, p=[0.94, 0.03, 0.015, 0.015])
        found = paired_difference(
            predictions_of(list((cell == 0) | (cell == 1))), predictions_of(list((cell == 0) | (cell == 2)))
        )
        assert found is not None
        covered += found.interval95[0] <= 0.015 <= found.interval95[1]
    assert 0.93 <= covered / trials <= 0.985


@given(right=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
@settings(max_examples=80, deadline=None)
def test_a_paired_difference_turns_its_sign_with_its_sides(right: list[tuple[bool, bool]]) -> None:
    one, two = predictions_of([a for a, _ in right]), predictions_of([b for _, b in right])
    there, back = paired_difference(one, two), paired_difference(two, one)
    assert there is not None
    assert back is not None
    assert there.difference == -back.difference
    assert there.interval95 == pytest.approx((-back.interval95[1], -back.interval95[0]))
    assert there.p_value == back.p_value
    assert -1 <= there.interval95[0] <= there.difference <= there.interval95[1] <= 1


def test_predictions_of_other_images_are_not_compared() -> None:
    assert paired_difference(predictions_of([True] * 3), predictions_of([True] * 4)) is None


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("three")
    return [
        small_run(root / "a", seed=0, val_size=300, accuracy=0.9),
        small_run(root / "b", seed=1, val_size=300, accuracy=0.9),
        small_run(root / "c", seed=2, val_size=300, accuracy=0.2, learning_rate=1e-5),
    ]


def records(paths: list[Path]) -> list[RunRecord]:
    return read_runs(paths, __version__)


def test_what_differs_is_named_and_nothing_else(three: list[Path]) -> None:
    assert differing_fields(records(three)) == {
        "optim.learning_rate": [4e-3, 4e-3, 1e-5],
        "steps.seed": [0, 1, 2],
    }
    assert differing_fields(records(three[:1])) == {}


def test_seeds_of_one_recipe_are_gathered(three: list[Path]) -> None:
    assert [[run.name for run in group.runs] for group in seed_groups(records(three))] == [["a", "b"], ["c"]]


def test_the_spread_of_seeds_is_that_of_a_sample() -> None:
    assert mean_and_spread([0.9, 0.92, 0.94]) == (pytest.approx(0.92), pytest.approx(0.02))
    assert mean_and_spread([0.9]) == (0.9, None)


@pytest.fixture(scope="module")
def comparison(three: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison") / "compare.html"
    assert write_report(three, out) == []
    return out


def test_the_report_of_several_runs_begins_with_what_differs(comparison: Path) -> None:
    html = comparison.read_text(encoding="utf-8")
    text = plain(html)
    places = [text.index(part) for part in ("optim.learning_rate", "the reference", "standard deviation")]
    assert places == sorted(places)
    assert "a is better than c." in text
    assert re.search(r"b alone reads \d+ images right, a alone \d+ \(p = [\d.e-]+\): no difference is shown", text)
    assert html.count("<svg") == 1


def test_runs_of_one_name_are_told_apart_and_one_run_is_not_compared_with_itself(tmp_path: Path) -> None:
    runs = [small_run(tmp_path / "x" / "run"), small_run(tmp_path / "y" / "run", seed=1)]
    assert [run.name for run in records(runs)] == [str(run) for run in runs]
    with pytest.raises(UserError, match="named twice"):
        records([runs[0], runs[0].parent / "." / "run"])


def test_runs_on_other_images_are_shown_and_not_compared(tmp_path: Path) -> None:
    runs = [small_run(tmp_path / "a"), small_run(tmp_path / "b", val_size=61)]
    assert "b and a cannot be paired" in plain(page_of(runs, tmp_path / "compare.html"))


# The door


def test_the_door_writes_into_the_run_and_says_where(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    (run / "architecture.json").unlink()
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "mnistm_dist.report", str(run)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line[9:] for line in done.stdout.splitlines()] == [
        "warning: architecture.json is not there.",
        f"report: {run / 'report.html'}",
    ]
    assert "architecture.json is not there." in plain((run / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere"], "nowhere: no such run folder"),
        (["empty"], "empty: no run in it; a run folder holds config.yaml"),
        (["run", "run"], "run: named twice"),
        (["run", "--out", "missing/folder/x.html"], "missing/folder/x.html: cannot be written"),
        ([], "required"),
        (["run", "--colour"], "--colour"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    words: str,
) -> None:
    small_run(tmp_path / "run", val_size=20)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    try:
        code = run_cli(report.main, flags)
    except SystemExit as end:  # argparse's way
        code = end.code if isinstance(end.code, int) else 1
    assert code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert words in said.err
    assert not list(tmp_path.glob("*.html"))


def test_help_comes_without_a_heavy_import() -> None:
    script = (
        "import sys\nfrom mnistm_dist import report\n"
        "try: report.main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "assert not {'numpy', 'matplotlib', 'torch', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RUN" in done.stdout


# In a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("chromium and chromedriver are not installed")
    with browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


CONTRAST = """
const light = c => { const v = c / 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
const luminance = text => { const [r, g, b] = text.match(/[\\d.]+/g).map(Number);
    return 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b); };
const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
const ground = luminance(getComputedStyle(document.body).backgroundColor);
const words = [...document.querySelectorAll('h1, h2, p, th, td, a, footer')].map(e => getComputedStyle(e).color);
const drawn = [...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill);
return {ground, least: Math.min(...[...words, ...drawn].map(c => ratio(luminance(c), ground)))};
"""
"""The least contrast of any text with the ground: WCAG 2.1, success criterion 1.4.3, wants 4.5."""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 375], ids=["desktop", "phone"])
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_the_page_is_whole_and_legible_in_a_browser(
    chromium: Browser, page: Path, comparison: Path, several: bool, width: int, dark: bool
) -> None:
    chromium.open(comparison if several else page, width=width, dark=dark)
    assert chromium.evaluate("return innerWidth") == width
    assert chromium.evaluate("return document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    assert chromium.evaluate("return performance.getEntriesByType('resource').length") == 0
    contrast = chromium.evaluate(CONTRAST)
    assert (contrast["ground"] < 0.1) == dark
    assert contrast["least"] >= 4.5
    heights = chromium.evaluate(
        "return [...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().height)"
    )
    assert min(heights) > 100
    widths = chromium.evaluate("return [...document.images].map(e => e.complete && e.naturalWidth > 0)")
    assert all(widths)
    links = chromium.evaluate(
        "return [...document.querySelectorAll('nav a')].every(a => document.querySelector(a.getAttribute('href')))"
    )
    assert links
    shown = chromium.evaluate("return document.querySelector('td').getBoundingClientRect().height")
    assert shown > 0
