"""Claims about `mnistm_dist.reporting.figures`, `curves` and `style`: any set can be drawn, and is labelled."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from run_folders import (
    CLASSES,
    log_rows,
    metrics_of_matrix,
    synthetic_images,
    synthetic_labels,
    synthetic_probabilities,
)

from mnistm_dist.reporting import figures
from mnistm_dist.reporting.curves import learning_curve, learning_curves, machine_curve
from mnistm_dist.reporting.predictions import Mistake, Predictions, mistakes
from mnistm_dist.reporting.style import SERIES, THEME, save, to_svg


@pytest.fixture(autouse=True)
def no_warning_and_no_changed_setting() -> Iterator[None]:
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert dict(matplotlib.rcParams) == before


def predictions_of(case: str) -> Predictions:
    """Return predictions with a class missing, without a mistake, or of a model that always predicts 3."""
    labels = synthetic_labels(150, 1, (7,) if case == "a class missing" else ())
    probabilities = synthetic_probabilities(labels, 0.85, 2, 3 if case == "always 3" else None)
    if case == "no mistake":
        probabilities = np.where(np.eye(10, dtype=bool)[labels], 0.91, 0.01)
    return Predictions(
        keys=tuple(f"{i:08d}" for i in range(150)),
        labels=labels,
        predicted=probabilities.argmax(axis=1),
        probabilities=probabilities,
        classes=CLASSES,
    )


CASES = ("usual", "a class missing", "no mistake", "always 3")


def texts(figure: Figure) -> list[str]:
    """Return every text of a figure, with the labels of the ticks."""
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(Text)]


@pytest.mark.parametrize("case", CASES)
def test_every_figure_is_drawn_for_any_set(tmp_path: Path, case: str) -> None:
    predictions = predictions_of(case)
    metrics = predictions.metrics
    wrong = mistakes(predictions)
    shown = wrong[: figures.MOST_MISTAKES]
    images = synthetic_images(predictions.labels[[row.id for row in shown]], 0)
    drawn = {
        "matrix": figures.confusion_matrix(metrics),
        "calibration": figures.calibration(predictions),
        "mistakes": figures.mistakes(images, shown, len(wrong)),
    }
    for name, figure in drawn.items():
        assert not any("$" in text for text in texts(figure)), "mathtext that is not parsed"
        save(figure, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width >= 800
            assert image.getpixel((0, 0))[:3] == (255, 255, 255)


def error_shades(figure: Figure) -> list[float]:
    """Return the opacities of the cells of a confusion matrix that have the colour of errors."""
    figure.draw_without_rendering()
    colours = figure.axes[0].collections[0].get_facecolors()
    return [float(colour[3]) for colour in colours if matplotlib.colors.to_hex(colour) == SERIES[1] and colour[3]]


@pytest.mark.parametrize("case", CASES)
def test_the_matrix_shows_every_count_and_every_error_is_shaded(case: str) -> None:
    metrics = predictions_of(case).metrics
    figure = figures.confusion_matrix(metrics)
    matrix = np.array(metrics.confusion_matrix)
    shown = texts(figure)
    for count in matrix[matrix > 0]:
        assert str(count) in shown
    off = int((matrix > 0).sum() - (matrix.diagonal() > 0).sum())
    errors = error_shades(figure)
    assert len(errors) == off
    assert all(shade >= figures.WEAKEST_SHADE for shade in errors)
    errors = metrics.total - metrics.correct
    assert f"Confusion matrix: {errors} error{'' if errors == 1 else 's'} in 150 images" in shown


def test_an_error_of_one_in_a_thousand_is_as_visible_as_the_largest() -> None:
    matrix = np.diag([1000] * 10)
    matrix[4, 9] = 1
    figure = figures.confusion_matrix(metrics_of_matrix(matrix.tolist()))
    assert error_shades(figure) == [figures.STRONGEST_SHADE]


@pytest.mark.parametrize(
    ("shown", "total", "title"),
    [
        (0, 0, "Mistakes: none"),
        (1, 1, "Mistakes: all 1"),
        (5, 5, "Mistakes: all 5"),
        (36, 38, "Mistakes: the 36 most confident of 38"),
        (36, 400, "Mistakes: the 36 most confident of 400"),
    ],
)
def test_the_figure_of_mistakes_shows_their_number(shown: int, total: int, title: str) -> None:
    mistake = Mistake(id=0, key="k", true="4", predicted="9", probability=0.9876, true_probability=0.01)
    figure = figures.mistakes(synthetic_images(np.full(shown, 4), 0), [mistake] * shown, total)
    assert title in texts(figure)
    assert texts(figure).count("4 as 9\n98.8 %") == shown


def test_a_batch_is_shown_image_by_image(tmp_path: Path) -> None:
    labels = synthetic_labels(14, 3)
    images = synthetic_images(labels, 3, size=28)
    figure = figures.batch_grid(images, [str(label) for label in labels], "Step 7")
    shown = [image.get_array() for image in figure.axes[0].images]
    assert all(np.array_equal(a, b) for a, b in zip(shown, images, strict=True))
    save(figure, tmp_path / "batch.png")


def test_the_learning_curve_marks_epochs_resumes_and_sizes(tmp_path: Path) -> None:
    figure = learning_curve(log_rows(6, 20, 0.97, 0, resume_at=50))
    shown = texts(figure)
    assert " resumed" in shown
    assert {"32 px", "64 px"} <= set(shown)
    save(figure, tmp_path / "curve.png")
    top = figure.axes[0].child_axes[0]
    assert [label.get_text() for label in top.get_xticklabels()] == ["1", "2", "3", "4", "5", "6"]
    (marks,) = figure.axes[1].collections
    opacities = marks.get_facecolors()[:, 3]
    assert opacities.tolist() == [0, 0, 1, 1, 1, 1], "the two epochs evaluated at 32 px are hollow"


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_no_text_of_a_learning_curve_is_mathtext(scale: float) -> None:
    rows = log_rows(6, 20, 0.97, 0, resume_at=50)
    for row in rows:
        if row["kind"] == "train":
            row["train/learning_rate"] *= scale
            row["train/loss"] *= scale
    for figure in (learning_curve(rows), machine_curve(rows), *learning_curves({"a": rows, "b": rows})):
        assert not any("$" in text for text in texts(figure))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"kind": "start", "step": 0, "world_size": 1, "time": 0.0}],
        [{"kind": "train", "step": 1, "epoch": 1, "train/loss": 2.3, "train/learning_rate": 1e-3}],
        [{"kind": "train", "step": 1, "epoch": 1, "train/loss": float("nan")}],
        [{"kind": "evaluation", "step": 5, "epoch": 1, "val/accuracy": 1.0, "val/loss": 0.0}],
        [{"kind": "resume", "step": 3}, {"kind": "train", "step": 4, "train/loss": 1.0}],
    ],
)
def test_an_almost_empty_log_makes_a_curve_too(rows: list[dict[str, Any]]) -> None:
    for figure in (learning_curve(rows), machine_curve(rows), *learning_curves({"a": rows, "b": rows})):
        to_svg(figure, "curve", "a curve")


def test_a_long_run_is_drawn_with_few_points_and_keeps_its_extremes() -> None:
    rows = log_rows(10, 1000, 0.97, 0, resume_at=None)
    rows[5001]["train/loss"] = 9.0
    figure = learning_curve(rows)
    assert all(len(line.get_xdata()) <= 300 for line in figure.axes[0].lines)
    highest = max(path.vertices[:, 1].max() for path in figure.axes[0].collections[0].get_paths())
    assert highest == 9.0


def test_several_runs_are_drawn_by_epoch() -> None:
    _, figure = learning_curves({"a": log_rows(4, 20, 0.97, 0, None), "b": log_rows(4, 40, 0.96, 1, None)})
    a, b = figure.axes[0].lines
    np.testing.assert_allclose(a.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(b.get_xdata(), [1, 2, 3, 4])
    assert a.get_color() != b.get_color()
    assert a.get_linestyle() != b.get_linestyle()
    assert a.get_marker() != b.get_marker()


def test_a_run_of_any_name_is_in_the_legend() -> None:
    figure, _ = learning_curves({name: log_rows(4, 20, 0.97, 0, None) for name in ("_a", "$b_{2}$")})
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["_a", "$b_{2}$"]
    figure.draw_without_rendering()


def test_a_run_that_ended_within_an_epoch_is_drawn_at_its_length() -> None:
    cut = [row for row in log_rows(1, 20, 0.97, 0, None) if row["step"] <= 5 and row["kind"] != "evaluation"]
    cut.append({"kind": "evaluation", "step": 5, "epoch": 1, "val/loss": 2.0, "val/accuracy": 0.2})
    _, figure = learning_curves(
        {"a": log_rows(4, 20, 0.97, 0, None), "b": cut}, epochs_per_step={"a": 1 / 20, "b": 1 / 20}
    )
    a, b = figure.axes[0].lines
    np.testing.assert_allclose(a.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(b.get_xdata(), [0.25])


def test_svg_follows_the_theme_of_its_page_and_shares_no_id() -> None:
    rows = log_rows(6, 20, 0.97, 0, None)
    one = to_svg(learning_curve(rows), "one", 'what "it" shows & means')
    two = to_svg(learning_curve(rows), "two", "the same")
    root = ElementTree.fromstring(one)
    assert root.attrib["aria-label"] == 'what "it" shows & means'
    assert not any(colour in one for colour in THEME)
    assert "var(--ink)" in one
    assert "var(--series-1)" in one
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, two)]
    assert ids[0]
    assert not ids[0] & ids[1]
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', one))
    assert used <= ids[0]
    assert "width=" not in one[: one.index(">")]


def tips(figure: Any) -> list[tuple[str, list[float]]]:
    """Return the text of every tip in the SVG of a figure, and its x, y, width and height."""
    rects = re.findall(r"<rect ([^>]*)><title>([^<]*)</title></rect>", to_svg(figure, "x", "y"))
    return [(text, [float(number) for number in re.findall(r'"(.*?)"', box)]) for box, text in rects]


def test_the_tips_of_a_curve_show_every_quantity_where_it_is_drawn() -> None:
    rows = log_rows(6, 20, 0.97, 0, resume_at=None)
    for curve in (learning_curve, machine_curve):
        shown = tips(curve(rows))
        assert len(shown) <= 100
        lines = shown[-1][0].splitlines()
        assert lines[0] == "step 120, epoch 6"
        for part in ("training loss ", "val accuracy 9", "learning rate ", " images/s", "gradient norm ", "64 px"):
            assert any(part in line for line in lines), part
        lefts = [box[0] for _, box in shown]
        assert lefts == sorted(lefts)
        assert all(box[2] > 0 and box[3] > 400 for _, box in shown)


def test_the_tips_of_calibration_count_every_image() -> None:
    shown = tips(figures.calibration(predictions_of("usual")))
    assert sum(int(text.split()[0]) for text, _ in shown) == 150


def test_the_tips_of_several_runs_show_each_of_them() -> None:
    runs = {"a": log_rows(4, 20, 0.97, 0, None), "<b>": log_rows(2, 20, 0.96, 1, None)}
    _, accuracy = learning_curves(runs)
    shown = [text.splitlines() for text, _ in tips(accuracy)]
    assert [head for head, *_ in shown] == [f"val accuracy, %, epoch {epoch}" for epoch in (1, 2, 3, 4)]
    assert [len(lines) for _, *lines in shown] == [2, 2, 1, 1]
    assert shown[0][2].startswith("&lt;b&gt;: ")


def test_the_same_figure_is_the_same_svg() -> None:
    rows = log_rows(6, 20, 0.97, 0, None)
    assert to_svg(machine_curve(rows), "x", "y") == to_svg(machine_curve(rows), "x", "y")


def test_figures_of_many_classes_show_those_that_are_confused_most(tmp_path: Path) -> None:
    names = tuple(f"a class of a long name {number}" for number in range(1000))
    matrix = np.eye(1000, dtype=np.int64) * 20
    matrix[7, 991], matrix[500, 3] = 9, 8
    metrics = replace(metrics_of_matrix(matrix.tolist()), classes=names)
    chosen = figures.most_confused(metrics)
    assert len(chosen) == figures.MOST_CLASSES
    assert {3, 7, 500, 991} <= set(chosen)
    assert chosen == sorted(chosen)
    figure = figures.confusion_matrix(metrics)
    assert any("(the 30 most confused of 1,000 classes)" in text for text in texts(figure))
    assert max(figure.get_size_inches()) < 20
