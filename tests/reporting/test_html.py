"""Claims about `mnistm_dist.report` and `mnistm_dist.reporting.html`."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from browser import CHROMEDRIVER, CHROMIUM, Browser, browser
from PIL import Image
from run_folders import synthetic_images, write_run

from mnistm_dist import __version__, report
from mnistm_dist.errors import run_cli
from mnistm_dist.reporting.html import write_report
from mnistm_dist.reporting.predictions import Predictions, mistakes
from mnistm_dist.reporting.runs import read_run


def small_run(folder: Path, **options: object) -> Path:
    """Write a run with val alone by default: a page of two splits takes twice as long."""
    size = {"val_size": 60, "test_split": False, "accuracy": 0.8, "epochs": 3, "steps_per_epoch": 4, "resume_at": 6}
    return write_run(folder, **{**size, **options})  # type: ignore[arg-type]


def text_of(page: Path) -> str:
    """Return the text of a page, without its figures."""
    text = re.sub(r"<(style|svg)\b.*?</\1>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)).replace("\xa0", " ")


def write_pictures(run: Path, split: str, most: int) -> list[str]:
    """Write the pictures of the first mistakes, as a run does; return their keys."""
    predictions = read_run(run, __version__).predictions[split]
    wrong = mistakes(predictions, most)
    (run / "mistakes" / split).mkdir(parents=True)
    for row, image in zip(wrong, synthetic_images(predictions.labels[[row.id for row in wrong]], 0), strict=True):
        Image.fromarray(image).save(run / "mistakes" / split / f"{row.key}.png")
    return [row.key for row in wrong]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = small_run(tmp_path_factory.mktemp("runs") / "fast-1", test_split=True)
    write_pictures(run, "val", 12)
    return run


@pytest.fixture(scope="module")
def page(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert write_report([finished], out) == []
    return out


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("three")
    runs = [
        small_run(root / "a", seed=0, val_size=300, accuracy=0.9),
        small_run(root / "b", seed=1, val_size=300, accuracy=0.9),
        small_run(root / "c", seed=2, val_size=300, accuracy=0.2, learning_rate=1e-5),
    ]
    assert write_report(runs, root / "compare.html") == []
    return root / "compare.html"


def test_the_report_of_a_run_shows_everything_in_the_run_folder(finished: Path, page: Path) -> None:
    html, text = page.read_text(encoding="utf-8"), text_of(page)
    summary = json.loads((finished / "summary.json").read_text())
    assert f"{100 * summary['val']['accuracy']:.2f} %" in text
    assert f"{100 * summary['test']['accuracy']:.2f} %" in text
    for part in (
        "fast-1",
        "recipe fast · finished · step 12 · resumed 1 time",
        "702 images/s, world size 2",
        "692,106 parameters",
        "Evaluated checkpoint: step 12 (best on val), 64 px.",
        "of 60 images correct",
        "It was chosen on val",
        "Label smoothing of 0.1 makes a model less confident than it is accurate.",
        "mean gap between confidence and accuracy",
        "class images precision % recall % F1 %",
        "32 of 64 px",
        "Training loss is measured on augmented images with label smoothing",
        "started 20",
        "duration 1:0",
        "machine node-1, cpu",
        "learning_rate 0.004",
        "image_size 32, 64, 64",
        "cache_dir none",
        "Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False) 64 × 32 × 32 9,408",
        "lineage regenerated",
        "ab" * 32,
        "Command of the last launch, on 2 processes",
        "python -m mnistm_dist.train --recipe fast --seed 0 --learning-rate 0.004",
        "torch 2.14.1",
    ):
        assert part in text, part
    assert "Missing or unreadable" not in text
    assert html.count("<svg") == 2 * 2 + 2
    assert "<details>" in html
    assert '<a href="../../runs' in html or 'fast-1/log.jsonl">log.jsonl</a>' in html


def test_the_configuration_shows_what_a_flag_the_recipe_and_auto_have_set(page: Path) -> None:
    origins = dict(re.findall(r"<tr><td>(\w+)</td><td><\w+ class=\"(\w+)\">", page.read_text()))
    named = ("learning_rate", "seed", "label_smoothing", "precision", "shards", "momentum")
    assert [origins[name] for name in named] == ["yours", "yours", "recipe", "auto", "auto", "default"]


def test_each_mistake_has_its_picture_its_key_and_its_probabilities(finished: Path, page: Path) -> None:
    predictions = read_run(finished, __version__).predictions["val"]
    wrong = mistakes(predictions)
    cards = re.findall(r'<div class="card">(.*?)<code>(.*?)</code>', page.read_text(), re.DOTALL)
    assert [key for _, key in cards][: len(wrong)] == [row.key for row in wrong]
    pictures = {path.stem: path.read_bytes() for path in (finished / "mistakes" / "val").iterdir()}
    for (card, key), row in zip(cards, wrong, strict=False):
        assert key not in pictures or base64.b64encode(pictures[key]).decode() in card
        assert f"<b>{row.true} as {row.predicted}</b>" in card
        assert f"<b>{row.true}</b>" in card, "the true class is always among the probabilities"
    assert page.read_text().count("data:image/png;base64,") == len(pictures) == min(len(wrong), 12)


def test_without_its_pictures_a_mistake_is_listed_all_the_same(tmp_path: Path) -> None:
    write_report([small_run(tmp_path / "run")], tmp_path / "report.html")
    assert '<div class="card">' in (tmp_path / "report.html").read_text()


def test_links_lead_from_the_page_to_the_files_of_the_run(finished: Path, tmp_path: Path) -> None:
    for out in (finished / "report.html", tmp_path / "deeper" / "report.html"):
        out.parent.mkdir(exist_ok=True)
        write_report([finished], out)
        addresses = re.findall(r'<a href="([^#"]+)">([^<]+)</a>', out.read_text())
        assert {"config.yaml", "log.jsonl", "summary.json", "predictions_val.csv"} <= {name for _, name in addresses}
        assert all((out.parent / unquote(address)).exists() for address, _ in addresses)
    (finished / "report.html").unlink()


def test_a_cell_of_the_matrix_names_its_count_and_both_shares(page: Path, finished: Path) -> None:
    metrics = read_run(finished, __version__).metrics["val"]
    matrix = page.read_text().split('<div class="matrix">')[1].split("</svg>")[0]
    titles = re.findall(r"<title>(.*?)</title>", matrix, re.DOTALL)
    assert len(titles) == 100
    row = metrics.per_class[3]
    assert titles[33].splitlines() == [
        f"{row.correct} image{'' if row.correct == 1 else 's'} of class 3 predicted as 3",
        f"{100 * row.recall:.1f} % of class 3, {100 * row.precision:.1f} % of those predicted as 3",
    ]
    for mode in ("counts", "rows", "columns"):
        cells = re.findall(r"<text [^>]*>([^<]+)</text>", matrix.split(f'<g class="{mode}">')[1].split("</g>")[0])
        assert len(cells) == 100
    # The last of them: the columns sum to 100 %.
    assert sum(float(cells[10 * i + 3].replace("·", "0")) for i in range(10)) == pytest.approx(100, abs=0.5)


def test_a_bar_of_precision_and_of_recall_has_the_length_of_its_share(page: Path, finished: Path) -> None:
    metrics = read_run(finished, __version__).metrics["val"]
    html = page.read_text().split('<table class="scores">')[1].split("</section>")[0]
    start = int(re.search(r"Bars of precision and recall: (\d+) to 100 %", html.replace("\xa0", " "))[1]) / 100
    assert start < min(min(row.precision, row.recall) for row in metrics.per_class)
    bars = [float(share) for share in re.findall(r"--share: ([\d.]+)", html.split("</table>")[0])]
    shares = [share for row in metrics.per_class for share in (row.precision, row.recall)]
    assert bars == pytest.approx([(share - start) / (1 - start) for share in shares], abs=1e-3)
    assert f"{metrics.per_class[0].correct} of {metrics.per_class[0].support} images correct" in html


def test_the_page_loads_nothing_and_runs_nothing(page: Path, comparison: Path) -> None:
    for html in (page.read_text(encoding="utf-8"), comparison.read_text(encoding="utf-8")):
        assert html.startswith("<!DOCTYPE html>")
        # A link is followed only by a click.
        assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', re.sub(r"<a href=[^>]*>", "", html))
        assert "<script" not in html
        assert "url(" not in re.sub(r"url\(#", "", html)
        assert "default-src 'none'" in html


def test_markup_in_names_and_commands_is_escaped(tmp_path: Path) -> None:
    run = small_run(tmp_path / "<img src=x onerror=alert(1)>")
    environment = json.loads((run / "environment.json").read_text())
    environment |= {"command": "train --shards '<script>alert(1)</script>'", "host": "\ud800"}
    (run / "environment.json").write_text(json.dumps(environment))
    write_report([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;" in html
    assert "\\ud800" in html


def test_a_report_takes_less_than_five_seconds_of_cpu_time_and_two_megabytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", val_size=9001, accuracy=0.9, epochs=16, steps_per_epoch=430)
    for split in ("val", "test"):
        write_pictures(run, split, 36)
    began = time.process_time()
    write_report([run], tmp_path / "report.html")
    assert time.process_time() - began < 5.0
    assert (tmp_path / "report.html").stat().st_size < 2e6


def test_the_page_of_many_classes_shows_those_that_are_confused_most(tmp_path: Path) -> None:
    run, count = small_run(tmp_path / "run"), 300
    labels = np.arange(2 * count) % count
    predicted = np.where(labels == 7, 291, labels)
    probabilities = np.full((2 * count, count), 1e-6)
    probabilities[np.arange(2 * count), predicted] = 1
    predictions = Predictions(
        keys=tuple(f"{key:08d}" for key in range(2 * count)),
        labels=labels,
        predicted=predicted,
        probabilities=probabilities,
        classes=tuple(f"class {number}" for number in range(count)),
    )
    write_report([run], tmp_path / "report.html", {"val": predictions})
    html = (tmp_path / "report.html").read_text()
    assert "The 30 most confused of 300 classes" in html
    assert "2 images of class class 7 predicted as class 291" in html
    assert len(html) < 2e6


def test_a_run_that_was_killed_is_reported_as_far_as_it_goes(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", resume_at=None)
    for name in ("summary.json", "predictions_val.csv", "architecture.json", "config.yaml"):
        (run / name).unlink()
    log = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(log[: len(log) // 2])
    (run / "state.json").write_text('{"state": "preempted", "step": 7, "reason": "SIGTERM"}')
    missing = write_report([run], tmp_path / "report.html")
    assert len(missing) == 5
    text = text_of(tmp_path / "report.html")
    assert "recipe unknown · preempted · step 7 · SIGTERM" in text
    assert all(line in text for line in missing)
    assert "Learning curve" in text
    assert "To reproduce this run, on 2 processes" in text


def test_an_empty_run_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    assert write_report([tmp_path], tmp_path / "report.html")
    assert "recipe unknown · unknown" in text_of(tmp_path / "report.html")


def test_a_comparison_begins_with_what_differs(comparison: Path) -> None:
    text = text_of(comparison)
    places = [text.index(part) for part in ("optim.learning_rate", "difference to a, points", "standard deviation")]
    assert places == sorted(places)
    # Runs that differ in their seed alone are one group, and none of them is better.
    assert re.search(r"Only b correct: \d+; only a: \d+ \(the seed alone differs\)\.", text)
    assert re.search(r"Only c correct: \d+; only a: \d+ \(p = [\d.e-]+\): a is better\.", text)
    assert "The interval excludes seed variance: train several seeds." in text
    assert "a, b val 2 " in text
    assert comparison.read_text().count("<svg") == 2


def test_a_comparison_links_to_the_reports_that_exist(tmp_path: Path) -> None:
    runs = [small_run(tmp_path / name, seed=seed) for seed, name in enumerate(("a b", "c"))]
    write_report(runs[:1], runs[0] / "report.html")
    write_report(runs, tmp_path / "compare.html")
    assert set(re.findall(r'<a href="([^#"]+)">', (tmp_path / "compare.html").read_text())) == {"a%20b/report.html"}


def test_runs_on_other_images_are_shown_and_not_compared(tmp_path: Path) -> None:
    runs = [small_run(tmp_path / name, val_size=size) for name, size in (("a", 60), ("b", 61))]
    write_report(runs, tmp_path / "compare.html")
    text = text_of(tmp_path / "compare.html")
    assert "b and a cannot be paired" in text
    assert "not on the same images" in text


# The command


def test_the_command_writes_into_the_run_and_prints_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run(tmp_path / "run")
    (run / "architecture.json").unlink()
    assert run_cli(report.main, [str(run)]) == 0
    assert [line[9:] for line in capsys.readouterr().out.splitlines()] == [
        "warning: architecture.json: not found.",
        f"report: {run / 'report.html'}",
    ]
    assert "architecture.json: not found." in text_of(run / "report.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: not a run folder"),
        (["run", "run"], "run, run: a run is given twice"),
        (["run", "--out", "missing/folder/x.html"], "missing/folder/x.html: cannot be written"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    write_run(tmp_path / "run", val_size=20, epochs=1, steps_per_epoch=2, test_split=False, resume_at=None)
    monkeypatch.chdir(tmp_path)
    assert run_cli(report.main, arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert message in output.err
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(("epochs", "text"), [(1, ", 1 epoch<"), (2, ", 2 epochs<")])
def test_one_epoch_is_told_in_the_singular(tmp_path: Path, epochs: int, text: str) -> None:
    write_run(tmp_path / "run", val_size=20, epochs=epochs, steps_per_epoch=2, test_split=False, resume_at=None)
    write_report([tmp_path / "run"], tmp_path / "page.html")
    assert text in (tmp_path / "page.html").read_text()


def test_help_needs_no_heavy_import() -> None:
    script = (
        "import sys\nfrom mnistm_dist import report\n"
        "try: report.main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "assert not {'numpy', 'matplotlib', 'torch', 'jinja2'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RUN" in done.stdout


# In a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("chromium and chromedriver are not installed")
    with browser(tmp_path_factory.mktemp("browser") / "profile") as result:
        yield result


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
"""Smallest contrast of any text with the background: WCAG 2.1, success criterion 1.4.3, requires 4.5."""


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 375], ids=["desktop", "phone"])
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_the_page_is_complete_and_legible_in_a_browser(
    chromium: Browser, page: Path, comparison: Path, several: bool, width: int, dark: bool
) -> None:
    chromium.open(comparison if several else page, width=width, dark=dark)
    assert chromium.evaluate("return innerWidth") == width
    assert chromium.evaluate("return document.documentElement.scrollWidth <= innerWidth"), "a horizontal scroll bar"
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


@pytest.mark.slow
def test_a_button_shows_the_matrix_by_row_or_by_column_without_a_script(chromium: Browser, page: Path) -> None:
    chromium.open(page, width=1200)
    shown = """return [...document.querySelectorAll('.matrix svg')[0].querySelectorAll(':scope > g[class]')]
        .filter(g => getComputedStyle(g).display != 'none').map(g => g.getAttribute('class'))"""
    for mode in ("counts", "rows", "columns"):
        chromium.evaluate(f"document.querySelector('label[for=matrix-val-{mode}]').click()")
        assert chromium.evaluate(shown) == [mode, "tips"]


@pytest.mark.slow
def test_the_pointer_finds_a_tip_over_cells_curves_and_bars(chromium: Browser, page: Path) -> None:
    chromium.open(page, width=1200)
    script = """const svg = document.querySelector(%r); svg.scrollIntoView({block: 'center', behavior: 'instant'});
        const box = svg.getBoundingClientRect();
        const found = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
        return found.querySelector('title')?.textContent;"""
    for figure, text in (
        (".matrix svg", " of class "),
        ("svg[aria-label='Learning curve']", "training loss "),
        ("svg[aria-label='Accuracy at each confidence']", "confidence "),
    ):
        assert text in (chromium.evaluate(script % figure) or ""), figure


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_nothing_is_cut_off_on_a_phone(chromium: Browser, page: Path, comparison: Path, several: bool) -> None:
    chromium.open(comparison if several else page, width=375)
    wide = "return [...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)"
    assert max(chromium.evaluate(wide)) <= 0


@pytest.mark.slow
def test_a_page_is_printed_dark_on_light_in_a_dark_theme_too(chromium: Browser, page: Path) -> None:
    chromium.open(page, width=800, dark=True)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    chromium.command("Emulation.setEmulatedMedia", media="print", features=dark)
    assert chromium.evaluate(CONTRAST)["ground"] == 1.0
    assert chromium.evaluate("return getComputedStyle(document.querySelector('nav')).display") == "none"
    chromium.command("Emulation.setEmulatedMedia", media="", features=[])
