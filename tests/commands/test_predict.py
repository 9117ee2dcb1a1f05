"""`python -m mnistm_dist.predict`: the evaluation's numbers for files, and stdout fit for other programs."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import VAL, error_of, output_of
from PIL import Image

from mnistm_dist.data.shards import ShardSet
from mnistm_dist.predict import main


@pytest.fixture(scope="module")
def val(small_set, tmp_path_factory) -> Path:
    """The PNGs of val, as files."""
    folder = tmp_path_factory.mktemp("val")
    shards = ShardSet.open(small_set)
    for key, png in zip(shards.keys("val", range(VAL)), shards.read("val", range(VAL)), strict=True):
        (folder / f"{key}.png").write_bytes(png)
    return folder


def test_the_pngs_of_val_give_the_predictions_of_the_evaluation(trained_run, val, run_command):
    result = list(
        csv.reader(output_of(run_command("predict", trained_run, val, "--csv", "--batch-size", "40")).splitlines())
    )
    written = list(csv.reader((trained_run / "predictions_val.csv").read_text().splitlines()))
    assert result[0] == ["file", "predicted", "probability", *written[0][3:]]
    expected = {row[0]: row for row in written[1:]}
    assert [Path(row[0]).stem for row in result[1:]] == sorted(expected)
    for row in result[1:]:
        of_evaluation = expected[Path(row[0]).stem]
        assert row[1] == of_evaluation[2]
        assert np.allclose(np.float64(row[3:]), np.float64(of_evaluation[3:]), rtol=0, atol=1e-4)
        assert float(row[2]) == max(map(float, row[3:]))


def test_json_is_exactly_what_other_programs_expect(trained_run, val, run_main):
    files = sorted(val.iterdir())[:3]
    done = run_main(main, trained_run, *files, "--json")
    result = json.loads(output_of(done))
    assert done.stderr == ""
    assert [row["file"] for row in result] == [str(file) for file in files]
    for row in result:
        assert list(row) == ["file", "predicted", "probability", "probabilities"]
        assert type(row["predicted"]) is int
        assert len(row["probabilities"]) == 10
        assert row["probability"] == row["probabilities"][row["predicted"]] == max(row["probabilities"])


def test_in_a_pipe_there_is_a_plain_line_for_each_file(trained_run, val, run_main):
    files = sorted(val.iterdir())[:3]
    lines = [line.split("  ") for line in output_of(run_main(main, trained_run, *files)).splitlines()]
    result = json.loads(output_of(run_main(main, trained_run, *files, "--json")))
    assert lines == [[str(row["predicted"]), f"{row['probability']:.4f}", row["file"]] for row in result]


def test_a_broken_file_is_named_and_skipped(trained_run, val, run_main, tmp_path):
    good = sorted(val.iterdir())[:2]
    (tmp_path / "broken.png").write_bytes(good[0].read_bytes()[:200])
    done = run_main(main, trained_run, good[0], "broken.png", "missing.png", good[1], "--json")
    assert done.returncode == 1
    assert [row["file"] for row in json.loads(done.stdout)] == [str(file) for file in good]
    assert [line.split(": ")[:2] for line in done.stderr.splitlines()] == [
        ["skipped", "broken.png"],
        ["skipped", "missing.png"],
    ]


def test_pictures_of_any_size_and_mode_go_together(trained_run, val, run_main, tmp_path):
    image = Image.open(min(val.iterdir()))
    folder = tmp_path / "any"
    folder.mkdir()
    image.convert("L").save(folder / "grey.png")
    image.convert("P").save(folder / "palette.gif")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("RGBA").resize((300, 100)).save(folder / "wide.webp")
    image.resize((1, 1)).save(folder / "dot.bmp")
    image.resize((3000, 2000)).save(folder / "large.jpg")
    result = json.loads(output_of(run_main(main, trained_run, "any", "--json")))
    names = ["cmyk.jpg", "dot.bmp", "grey.png", "large.jpg", "palette.gif", "wide.webp"]
    assert [row["file"] for row in result] == [f"any/{name}" for name in names]


def test_control_characters_in_file_names_are_escaped_and_every_name_is_kept(trained_run, val, run_main, tmp_path):
    """Escape codes, a line break, rich's markup, and bytes that are no Unicode."""
    names = [b"\x1b[31mred.png", b"two\nlines.png", b"[bold]x.png", b"\xff.png"]
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(min(val.iterdir()).read_bytes())
    plain = output_of(run_main(main, trained_run, "odd"))
    assert len(plain.splitlines()) == len(names)
    assert "\x1b" not in plain
    result = json.loads(output_of(run_main(main, trained_run, "odd", "--json")))
    assert sorted(os.fsencode(row["file"]) for row in result) == sorted(b"odd/" + name for name in names)


def test_a_reader_that_closes_the_pipe_is_no_error(trained_run, val, environment):
    command = [sys.executable, "-m", "mnistm_dist.predict", str(trained_run), str(val), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere", "VAL"], "nowhere: not a run folder"),
        (["RUN", "nowhere.png"], "nowhere.png: cannot be read (No such file"),
        (["RUN", "nowhere.png", "neither.png"], "and 1 more"),
        (["RUN", "empty"], "empty: no pictures in it"),
        (["RUN", "VAL", "--checkpoint", "nowhere"], "nowhere"),
        (["RUN", "VAL", "--batch-size", "0"], "--batch-size"),
        (["RUN", "VAL", "--batch-size", "x"], "--batch-size: found 'x'; should be a valid integer"),
        (["RUN", "VAL", "--json", "--csv"], "--json and --csv: choose one"),
        (["RUN"], "IMAGE|FOLDER"),
    ],
)
def test_a_user_error_is_one_line(trained_run, val, run_main, tmp_path, arguments, named):
    (tmp_path / "empty").mkdir()
    places = {"RUN": trained_run, "VAL": val}
    done = run_main(main, *(places.get(argument, argument) for argument in arguments))
    assert named in error_of(done)
    assert done.stdout == ""
