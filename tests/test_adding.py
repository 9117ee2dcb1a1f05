"""Each addition of CONTRIBUTING.md's table "How to add", made in a copy of the package, in the files of its row only.

The additions are examples. If an anchor is not found, check whether the table is still right.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, RunCommand, output_of
from layouts import noise, write_tar
from packed_sets import tiny_source

from mnistm_dist.config import AugmentConfig
from mnistm_dist.data.packing.writer import pack

TABLE = re.compile(r"^\| an? ([\w -]+?) +\| (.+?) \|", re.MULTILINE)
TINY = ("--batch-size", 8, "--image-size", 16, "--epochs", 2, "--threads", 1, "--tracker", "none")
OLD = AugmentConfig(shift=3, rotate=15, scale=0.1, shear=10, elastic=2, invert=0.5, permute_channels=0.5, cutout=6)
"""All augmentations without the addition."""
IMAGES, POSITIONS = np.random.default_rng(0).integers(0, 256, (8, 28, 28, 3), dtype=np.uint8), np.arange(8)


@dataclass
class Copy:
    """A copy of the package, and the files that were changed or created."""

    root: Path
    touched: set[str]

    def replace(self, file: str, anchor: str, text: str) -> None:
        """Replace the one match of the regular expression ``anchor`` with ``text``."""
        path = self.root / "mnistm_dist" / file
        changed, result = re.subn(anchor, text, path.read_text(), flags=re.MULTILINE)
        assert result == 1, f"{file}: {result} places match {anchor!r}; mend the anchor, and CONTRIBUTING.md if need be"
        path.write_text(changed)
        self.touched.add(file)

    def make(self, file: str, text: str) -> None:
        """Create a file."""
        path = self.root / "mnistm_dist" / file
        assert not path.exists(), f"{file} is there already; name the example otherwise"
        path.write_text(text)
        self.touched.add(file)

    def output(self, *arguments: object, code: int = 0) -> str:
        """Return the output of ``python ARGUMENTS`` with the copy, in a new process: for commands without torch."""
        environment = {**os.environ, "PYTHONPATH": str(self.root), "COLUMNS": "1000"}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr


def recipe(copy: Copy) -> None:
    """A quarter of an epoch."""
    text = "steps: {epochs: 1, batch_size: 8, image_size: [16]}\nrun: {max_steps: 1}\n"
    copy.make("recipes/taste.yaml", text)
    copy.replace("config.py", r"^(RECIPES = \(.*)\)$", r'\1, "taste")')


def augmentation(copy: Copy) -> None:
    """Images that are darker or brighter."""
    field = '    brightness: Probability = 0.0\n    """Largest change of brightness, of 1."""\n'
    copy.replace("config.py", r'^(    cutout: .* = .*\n    """.*"""\n)', rf"\1{field}")
    draw = int(re.search(r"^DRAWS = (\d+)$", (copy.root / "mnistm_dist/data/transforms.py").read_text(), re.M)[1])
    copy.replace("data/transforms.py", r"^DRAWS = \d+$", f"DRAWS = {draw + 1}")
    does = (
        "        if config.brightness:\n"
        f"            change = (draws[:, {draw}] * 2 - 1) * config.brightness\n"
        "            floats = floats + change.view(-1, 1, 1, 1) / self.preprocess.std\n"
    )
    copy.replace("data/transforms.py", r"^(        floats = self\.preprocess\.normalise\(images\)\n)", rf"\1{does}")


def optimizer(copy: Copy) -> None:
    """torch's NAdam."""
    copy.replace("config.py", r"^(    optimizer: Literal\[.*)\] =", r'\1, "nadam"] =')
    does = (
        '    if config.optimizer == "nadam":\n'
        "        return torch.optim.NAdam(groups, lr=config.learning_rate, betas=adam['betas'])\n"
    )
    copy.replace("training/optim.py", r"^(    assert_never\(config\.optimizer\)\n)", rf"{does}\1")


def metric(copy: Copy) -> None:
    """The mean of the recalls."""
    file = "reporting/metrics.py"
    formula = (
        "    @property\n"
        "    def balanced_accuracy(self) -> float:\n"
        '        """Mean recall of the classes that have images, 0 to 1."""\n'
        "        return float(np.mean([row.recall for row in self.per_class if row.recall is not None]))\n\n"
    )
    copy.replace(file, r"^(    def to_json)", rf"{formula}\1")
    field = '            "balanced_accuracy": self.balanced_accuracy,\n'
    copy.replace(file, r'^(            "accuracy": self\.accuracy,\n)', rf"\1{field}")
    tile = '{{ tile(split.metrics.balanced_accuracy|percent, split.name ~ " balanced accuracy") }}\n'
    anchor = r"^(\{\{ tile\(split\.metrics\.accuracy\|percent.*\n)"
    copy.replace("reporting/templates/run.html.j2", anchor, rf"\1{tile}")


LOADER = '''def load_safetensors(file: Path) -> Arrays:
    """Return the arrays of a safetensors file."""
    from safetensors.numpy import load_file

    return load_file(file)


'''


def layout(copy: Copy) -> None:
    """Arrays in a safetensors file."""
    file = "data/sources/data_files.py"
    copy.replace(file, r"^(def _flatten\()", rf"{LOADER}\1")
    copy.replace(
        file, r"^(    \"idx\": \(lambda .*\n)", r'\1    "safetensors": (load_safetensors, "named arrays"),' + "\n"
    )
    file = "data/sources/catalog.py"
    copy.replace(
        file, r"^(    \"pickle\": \"a dict .*\n)", r'\1    "safetensors": "x_train, y_train, x_test, y_test",' + "\n"
    )
    copy.replace(
        file, r"^(    \"npz\": \(\(\), \(\"\.npz\",\)\),\n)", r'\1    "safetensors": ((), (".safetensors",)),' + "\n"
    )


ADDITIONS: dict[str, Callable[[Copy], None]] = {
    "recipe": recipe,
    "augmentation": augmentation,
    "optimizer": optimizer,
    "metric": metric,
    "layout": layout,
}
"""The rows of the table, and an example of each."""


def test_each_row_of_the_table_has_an_example() -> None:
    assert {what for what, _ in TABLE.findall((ROOT / "CONTRIBUTING.md").read_text())} == set(ADDITIONS)


@pytest.fixture
def added(tmp_path: Path) -> Callable[[str], Copy]:
    """Make an addition in a copy of the package, and check that it touches only the files of its row, at most two."""

    def make(what: str) -> Copy:
        copy = Copy(tmp_path / "copy", set())
        shutil.copytree(ROOT / "mnistm_dist", copy.root / "mnistm_dist")
        ADDITIONS[what](copy)
        files = dict(TABLE.findall((ROOT / "CONTRIBUTING.md").read_text()))[what]
        named = {name.removeprefix("mnistm_dist/") for name in re.findall(r"`([\w/.]+\.(?:py|yaml|j2))`", files)}
        kind = {re.sub(r"(recipes|sources)/(taste|keras|named)\.", r"\1/NAME.", file) for file in copy.touched}
        assert kind == named
        assert len(named) <= 2
        return copy

    return make


@pytest.fixture
def trained(run_command: RunCommand, tmp_path: Path, few: Path) -> Callable[..., Path]:
    """Train with a copy of the package and return the run folder."""

    def train(copy: Copy, name: str, *flags: object, before: str = "test_adding:use_the_copy") -> Path:
        flags = ("--shards", few, "--run-dir", tmp_path / name, *flags)
        output_of(run_command("train", *flags, before=before, PYTHONPATH=str(copy.root)))
        return tmp_path / name

    return train


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of 24 + 9 images."""
    out = tmp_path_factory.mktemp("few") / "set"
    pack(tiny_source(33, size=(28, 28)), out, num_shards=2, val_size=9)
    return out


def use_the_copy() -> None:
    """Called before the command: import the package from PYTHONPATH."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "mnistm_dist"]:
        del sys.modules[name]
    sys.path.insert(0, os.environ["PYTHONPATH"])
    import mnistm_dist

    assert mnistm_dist.__file__ == str(Path(os.environ["PYTHONPATH"], "mnistm_dist", "__init__.py"))


def use_the_copy_and_augment() -> None:
    """`use_the_copy`, and write ``images.npz``: augmented as before, with brightness too, and with brightness only."""
    use_the_copy()
    np.savez("images.npz", old=augmented(), all=augmented(brightness=0.2), alone=augmented(old=False, brightness=0.2))


def augmented(*, old: bool = True, **extra: float) -> np.ndarray:
    """Return the images augmented by the imported package: float32 (8, 3, 28, 28)."""
    import dataclasses

    import torch

    from mnistm_dist.config import AugmentConfig
    from mnistm_dist.data.transforms import Augment, Preprocess

    config: Any = AugmentConfig(**(dataclasses.asdict(OLD) if old else {}), **extra)
    return Augment(config, Preprocess((0.5,) * 3, (0.5,) * 3), seed=3)(torch.from_numpy(IMAGES), POSITIONS, 28).numpy()


def test_a_recipe_needs_a_file_and_its_name(added, trained) -> None:
    copy = added("recipe")
    assert ", taste, or a YAML file" in copy.output("-m", "mnistm_dist.train", "--help")
    run = trained(copy, "run", "--recipe", "taste", "--no-report", "--tracker", "none", "--threads", 1)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["recipe"], config["steps"]["batch_size"], config["run"]["max_steps"]) == ("taste", 8, 1)
    assert json.loads((run / "summary.json").read_text())["recipe"] == "taste"


def test_an_augmentation_needs_a_field_and_its_code_and_changes_no_other_run(added, trained, tmp_path) -> None:
    """A field is a flag, a line of ``--help``, a key of the YAML and a line of ``config.yaml``."""
    copy = added("augmentation")
    shown = " ".join(copy.output("-m", "mnistm_dist.train", "--help").split())
    assert "--brightness FLOAT Largest change of brightness, of 1. (default: 0.0)" in shown
    refused = copy.output("-m", "mnistm_dist.train", "--brightness", "2", code=2)
    assert refused == "error: --brightness: found '2'; should be less than or equal to 1\n"
    (tmp_path / "own.yaml").write_text("augment: {brightness: 0.125}\n")
    flags = ("--recipe", "own.yaml", "--max-steps", 1, *TINY, "--no-report")
    run = trained(copy, "run", *flags, before="test_adding:use_the_copy_and_augment")
    assert yaml.safe_load((run / "config.yaml").read_text())["augment"]["brightness"] == 0.125
    images = np.load(tmp_path / "images.npz")
    assert np.array_equal(images["old"], augmented())
    assert not np.allclose(images["all"], augmented())
    change = (images["alone"] - augmented(old=False)).reshape(8, -1)
    assert np.allclose(change, change[:, :1], atol=1e-5)
    assert (np.abs(change).max(), len(np.unique(change[:, 0].round(3)))) == (pytest.approx(0.3, abs=0.1), 8)


def test_an_optimizer_needs_its_name_and_its_code_and_resumes_from_a_checkpoint(added, trained) -> None:
    copy = added("optimizer")
    assert ",nadam}" in copy.output("-m", "mnistm_dist.train", "--help")
    flags = ("--optimizer", "nadam", *TINY, "--no-report", "--checkpoint-every", 1, "--max-steps", 2)
    run = trained(copy, "run", *flags)
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["optimizer"] == "nadam"
    weights = (run / "checkpoints/step-00000002/model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints/step-00000002")
    trained(copy, "run", "--max-steps", 2, "--resume", run / "checkpoints/step-00000001", "--no-report")
    assert (run / "checkpoints/step-00000002/model.safetensors").read_bytes() == weights


def test_a_metric_needs_a_field_with_its_formula_and_a_place_on_the_page(added, trained) -> None:
    run = trained(added("metric"), "run", "--max-steps", 1, *TINY)
    val = json.loads((run / "summary.json").read_text())["val"]
    recalls = [row["recall"] for row in val["per_class"] if row["support"]]
    assert val["balanced_accuracy"] == pytest.approx(sum(recalls) / len(recalls))
    assert "validation balanced accuracy" in (run / "report.html").read_text()


def test_a_layout_needs_a_loader_and_its_rows(added, run_command: RunCommand, tmp_path) -> None:
    from safetensors.numpy import save_file

    copy, parts = added("layout"), noise()
    arrays = {f"x_{split}": part.images for split, part in parts.items()}
    (tmp_path / "source").mkdir()
    save_file(arrays | {f"y_{s}": part.labels for s, part in parts.items()}, tmp_path / "source" / "mnistm.safetensors")
    archive = write_tar(
        tmp_path / "set.tar", {"a/m.safetensors": (tmp_path / "source/mnistm.safetensors").read_bytes()}
    )
    pixels = []
    for number, path in enumerate((tmp_path / "source", tmp_path / "source" / "mnistm.safetensors", archive)):
        out = tmp_path / f"set {number}"
        output_of(run_command("pack", path, "--out", out, before="test_adding:use_the_copy", PYTHONPATH=str(copy.root)))
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["layout"] == "safetensors"
        assert manifest["splits"]["test"]["count"] == len(parts["test"].labels)
        pixels.append({split: result["pixels_sha256"] for split, result in manifest["splits"].items()})
    assert pixels == [pixels[0]] * 3
