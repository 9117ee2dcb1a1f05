"""What people hold, from the generators of ../shared/cases: each is packed as the head of its file says."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, RunMain, output_of
from PIL import Image

from mnistm_dist import pack as pack_command
from mnistm_dist import train
from mnistm_dist.data.fetch import fetch_set
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.data.sources.catalog import open_source
from mnistm_dist.data.sources.download import download
from mnistm_dist.errors import UserError

CASES = ROOT.parent / "shared" / "cases"
CUT, OWN, ALONE = (36, 4, 12), (40, 10, 12), (36, 4)  # val cut from train; a val of its own; without test
Expected = tuple[int, ...] | str  # images of train, val and test, or words of the line that refuses the source

CASE_COMMANDS: Mapping[str, Mapping[str, Expected]] = {
    "archive_in_archive": {"download.zip": ALONE, "dataset": ALONE},
    "csv_of_its_own_folder": {"digits/mnistm": CUT},
    "digits_dg_jpg": {"digits_dg/mnist_m": (40, 20), "digits_dg.zip": "several sets of images (image-folder: "},
    "drive_split_zips": {"drive": ALONE, "drive/mnist_m-20240101T000000Z-001.zip": ALONE},
    "hf_cache_snapshot": {
        "datasets--someone--MNIST-M": CUT,
        "datasets--someone--MNIST-M/snapshots/0123abcd": CUT,
    },
    "hf_other_columns": {"img": CUT, "text": CUT, "disk": CUT, "val": OWN},
    "hidden_litter": dict.fromkeys(
        [
            "checkpoints_in_split",
            "checkpoints_in_class",
            "gitkeep",
            "nfs",
            "eadir",
            "lowercase_thumbs",
            "readme",
            "spotlight",
            "official_checkpoints",
        ],
        ALONE,
    ),
    "image_folder_variants": {
        "nosplit": ALONE,
        "official_sub": CUT,
        "words": ALONE,
        "tv_words": ALONE,
        "sets": CUT,
        "upper": ALONE,
        "deep": ALONE,
        "valid": (40, 12, 12),
        "traintest": CUT,
    },
    "label_in_file_name": {"digit5/mnist_m": CUT},
    "lmdb_trn_tst": {"mnistm_lmdb": "an LMDB database, which is not read"},
    "npz_one_file": {
        "keras/mnistm.npz": CUT,
        "medmnist/mnistm.npz": OWN,
        **dict.fromkeys(["xy", "chw", "float01", "npy", "floatlabels", "upper"], CUT),
    },
    "official_label_lines": dict.fromkeys(
        ["crlf", "tab", "bom", "trailing", "noeol", "comma", "header", "prefix", "nosuffix", "oldmac", "utf16"], ALONE
    ),
    "pickle_beside_pt": {"mnistm": CUT},
    "pickle_train_valid_test": {"mnistm_data.pkl --mnist mnist": (550, 50, 100), "mnistm_data.pkl": "add --mnist DIR"},
    "png_kinds": dict.fromkeys(["palette", "rgba", "mixed", "deep16", "jpegs"], ALONE),
    "pt_in_tar_gz": {"mnist_m_train.pt.tar.gz": CUT, "downloads": CUT, "root": CUT},
    "pt_variants": dict.fromkeys(
        ["torchvision_names", "dictionary", "data_targets", "chw", "floats", "tensordataset", "numpy_tuple", "three"],
        CUT,
    ),
    "tfrecord": {
        "mnist_m_train.tfrecord": "a TFRecord file, which is not read",
        ".": "mnist_m_test.tfrecord: a TFRecord",
    },
    "valid_dropped": dict.fromkeys(("valid.h5", "valid.mat", "course", "official"), OWN),
    "wds_foreign_shards": {"stock": CUT, "stock/train-000000.tar": CUT, "img2ds": "captions, not classes"},
}
# Not sources: a server for downloads, and paths that begin with ~; their tests are below.
OTHERS = {"http_moods", "tilde_paths"}


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run a generator once, in a folder of its own."""
    folders: dict[str, Path] = {}

    def generate(case: str) -> Path:
        if not CASES.exists():
            pytest.skip("the generators are not here (../shared/cases)")
        if case not in folders:
            folder = tmp_path_factory.mktemp(case)
            done = subprocess.run([sys.executable, CASES / f"{case}.py"], cwd=folder, capture_output=True, text=True)
            if "ModuleNotFoundError" in done.stderr:
                pytest.skip(f"{case} needs a package that is not installed: {done.stderr.splitlines()[-1]}")
            assert done.returncode == 0, done.stderr
            folders[case] = folder
        return folders[case]

    return generate


def test_every_generator_is_tested() -> None:
    if not CASES.exists():
        pytest.skip("the generators are not here (../shared/cases)")
    assert {file.stem for file in CASES.glob("*.py")} == set(CASE_COMMANDS) | OTHERS


@pytest.mark.parametrize(
    ("case", "arguments"), [(case, arguments) for case, commands in CASE_COMMANDS.items() for arguments in commands]
)
def test_a_case_gives_what_its_head_says(generated, tmp_path: Path, monkeypatch, case: str, arguments: str) -> None:
    monkeypatch.chdir(generated(case))
    expected, (path, *mnist) = CASE_COMMANDS[case][arguments], arguments.split(" --mnist ")
    options = {"mnist": mnist[0]} if mnist else {}
    if isinstance(expected, str):
        with pytest.raises(UserError) as caught:
            pack(open_source(path, **options), tmp_path / "set")
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    manifest = pack(open_source(path, **options), tmp_path / "set")
    assert tuple(split.count for split in manifest.splits.values()) == expected
    if case != "pickle_train_valid_test":
        # The generators give image i the label i % 10, so that classes have equally many images.
        for split in manifest.splits.values():
            assert len(split.class_counts) == 10
            assert max(split.class_counts) - min(split.class_counts) <= 1


@pytest.mark.parametrize("mood", ["plain", "rate1", "busy1", "gzenc", "gzcut", "redir"])
def test_a_server_of_any_mood_gives_the_archive(generated, tmp_path: Path, mood: str) -> None:
    (archive,) = generated("pt_in_tar_gz").glob("*train.pt.tar.gz")
    with served(archive.parent) as address:
        path = download(f"{address}/{mood}/{archive.name}", tmp_path / "cache")
    assert path.read_bytes() == archive.read_bytes()


def test_a_busy_server_gives_a_packed_set_and_one_with_passwords_says_how_to_log_in(generated, tmp_path: Path) -> None:
    pack(open_source(str(generated("tilde_paths") / "src")), tmp_path / "served" / "set", num_shards=2)
    lines: list[str] = []
    with served(tmp_path / "served") as address:
        folder = fetch_set(f"{address}/rate1/set", tmp_path / "cache", say=lines.append)
        with pytest.raises(UserError, match=r"denies access \(401.*put user and password into ~/\.netrc"):
            fetch_set(f"{address}/auth/set", tmp_path / "cache")
    assert ShardSet.open(folder).manifest == ShardSet.open(tmp_path / "served" / "set").manifest
    assert "is busy (status 429): waiting 1 s, as it asks" in lines[0]


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Run the given server on a folder; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, CASES / "http_moods.py", str(port), folder], stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_a_tilde_in_a_flag_or_a_recipe_is_the_home(generated, tmp_path: Path, monkeypatch, run_main: RunMain) -> None:
    shutil.copytree(generated("tilde_paths"), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    output_of(run_main(pack_command.main, "src", "--out=~/shards/a", "--num-shards", 1))
    quick = ("--max-steps", 1, "--tracker", "none", "--no-report", "--threads", 1, "--cache-dir=~/cache")
    output_of(run_main(train.main, "--recipe", "rec.yaml", *quick))
    output_of(run_main(train.main, "--shards=~/shards/a", "--run-dir=~/runs/y", "--recipe", "rec.yaml", *quick))
    assert {path.name for path in (tmp_path / "home").iterdir()} >= {"shards", "runs", "cache"}
    assert {path.name for path in (tmp_path / "home" / "runs").iterdir()} == {"x", "y"}
    assert not (tmp_path / "~").exists()


def rows_of(folder: Path, split: str) -> tuple[np.ndarray, list[int]]:
    """The images and labels of a split in key order."""
    shards = ShardSet.open(folder)
    order = np.argsort(shards.index(split)["key"])
    return shards.images(split, order), shards.labels(split)[order].tolist()


def test_a_csv_file_names_the_images_of_its_own_folder(generated, tmp_path: Path) -> None:
    source = generated("csv_of_its_own_folder") / "digits" / "mnistm"
    pack(open_source(str(source)), tmp_path / "set")
    for split in ("train", "test"):
        images, labels = rows_of(tmp_path / "set", split)
        assert np.array_equal(images[3], np.asarray(Image.open(source / split / "00003.png")))
        assert labels == [index % 10 for index in range(len(labels))]


def test_the_val_of_the_generator_has_the_first_labels_of_mnist(generated, tmp_path: Path) -> None:
    folder = generated("pickle_train_valid_test")
    pack(open_source(str(folder / "mnistm_data.pkl"), mnist=str(folder / "mnist")), tmp_path / "set")
    labels = np.load(folder / "mnist" / "labels.npy").tolist()
    for split, first in (("train", 50), ("val", 0)):
        images, found = rows_of(tmp_path / "set", split)
        numbers = (images[:, 0, 0, 0].astype(int) << 8) + images[:, 0, 0, 1]
        assert numbers.tolist() == list(range(first, first + len(found)))
        assert found == labels[first : first + len(found)]


def test_training_on_foreign_shards_names_the_command_that_packs_them(generated) -> None:
    folder = generated("wds_foreign_shards") / "stock"
    with pytest.raises(UserError, match=r"stock --out DIR packs them"):
        ShardSet.open(folder)
