"""Layouts of image files: unexpected content is refused with the name of the file and the line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from layouts import WRITE, Files, csv_files, image_folder_files, noise, official_files, refusal, write_folder

PARTS = noise()
LABELS = "mnist_m/mnist_m_train_labels.txt"
IMAGE = "mnist_m/mnist_m_train/00000003.png"


def relabel(change: Callable[[list[str]], list[str]]) -> Callable[[Files], None]:
    def damage(files: Files) -> None:
        files[LABELS] = "".join(f"{line}\n" for line in change(files[LABELS].decode().splitlines())).encode()

    return damage


def rename(files: Files) -> None:
    files["mnist_m/mnist_m_train/other.png"] = files.pop(IMAGE)


OFFICIAL_DAMAGE: dict[str, tuple[Callable[[Files], object], str]] = {
    "no labels": (lambda files: files.pop(LABELS), "mnist_m_train_labels.txt; add its line, or that file"),
    "a missing image": (lambda files: files.pop(IMAGE), "line 4: 00000003.png: no such image"),
    "a renamed image": (rename, "line 4: 00000003.png: no such image"),
    "a missing label": (relabel(lambda lines: lines[:3] + lines[4:]), "00000003.png: no label in "),
    "too many labels": (relabel(lambda lines: [*lines, "00000099.png 1"]), "line 41: 00000099.png: no such image"),
    "a label twice": (
        relabel(lambda lines: [*lines, lines[3]]),
        "00000003.png is labelled twice",
    ),
    "a label of 10": (
        relabel(lambda lines: [*lines[:-1], "00000039.png 10"]),
        "line 40: label '10'; accepted are 0 to 9",
    ),
    "a label of -1": (relabel(lambda lines: ["00000000.png -1", *lines[1:]]), "line 1: label '-1'"),
    "a line of one word": (relabel(lambda lines: ["00000000.png", *lines[1:]]), "line 1: expected 2 values"),
    "binary labels": (
        lambda files: files.update({LABELS: b"\xff\xfe\x00"}),
        "labels.txt: damaged or not CSV or lines of NAME LABEL, in UTF-8",
    ),
}


@pytest.mark.parametrize("damage", OFFICIAL_DAMAGE)
def test_a_damaged_official_set_is_refused(tmp_path, damage):
    spoil, part = OFFICIAL_DAMAGE[damage]
    files = official_files(PARTS)
    spoil(files)
    for kind in WRITE:
        assert part in refusal(WRITE[kind](tmp_path / f"set.{kind}", files))


IMAGE_FOLDER_DAMAGE: dict[str, tuple[Files, str]] = {
    "a file among the classes": (
        {"MNIST-M/training/x.png": b""},
        "training/x.png: unexpected among the folders of classes",
    ),
    "a split twice": ({"MNIST-M/train/3/x.png": b""}, "a second folder of split train beside train"),
    "a folder beside the splits": ({"MNIST-M/extra/3/x.png": b""}, "extra is not train, val or test as test"),
}


@pytest.mark.parametrize("damage", IMAGE_FOLDER_DAMAGE)
def test_an_unexpected_member_of_an_image_folder_is_refused(tmp_path, damage):
    extra, part = IMAGE_FOLDER_DAMAGE[damage]
    for kind in WRITE:
        assert part in refusal(WRITE[kind](tmp_path / f"set.{kind}", image_folder_files(PARTS) | extra))


CSV_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "other columns": (
        lambda text: text.replace(b"image_name", b"colour"),
        "train.csv is left out: columns 'colour, label'; expected image_name,label",
    ),
    "a missing cell": (lambda text: text + b"train00001.png\r\n", "line 42: expected 2 values"),
    "too many cells": (lambda text: text + b"train00001.png,1,2\r\n", "line 42: expected 2 values"),
    "a missing image": (lambda text: text + b"gone.png,1\r\n", "line 42: gone.png: no such image"),
    "an image twice": (
        lambda text: text + b"train00001.png,1\r\n",
        "/train00001.png is labelled twice",
    ),
    "an image in two splits": (lambda text: text + b"val00001.png,1\r\n", "val00001.png is labelled twice"),
    "an empty label": (lambda text: text[:-3] + b"\r\n", "row 40 has an empty label"),
    "no CSV": (lambda text: text + b'"unclosed', "train.csv: damaged or not CSV"),
}


@pytest.mark.parametrize("damage", CSV_DAMAGE)
def test_a_damaged_csv_file_is_refused_with_its_line(tmp_path, damage):
    files = csv_files(PARTS)
    spoil, part = CSV_DAMAGE[damage]
    files["mnistm/train.csv"] = spoil(files["mnistm/train.csv"])
    assert part in refusal(write_folder(tmp_path / "set", files))


def test_an_ambiguous_image_of_a_csv_file_is_refused(tmp_path):
    files = csv_files(PARTS) | {"mnistm/more/train00003.png": b""}
    assert "line 5: train00003.png: 2 images of this name; give its folder too" in refusal(
        write_folder(tmp_path, files)
    )
