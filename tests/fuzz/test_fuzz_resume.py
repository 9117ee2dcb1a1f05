"""A run that is really trained, gone on with, evaluated and asked after what it left was changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bounds import at_door
from hypothesis import strategies as st
from inputs import changed, damaged
from packed_sets import pixels_of, tiny_source
from search import Fuzz

from mnistm_dist import evaluate, predict, train
from mnistm_dist.data.image_io import encode_png
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.errors import EXIT_PREEMPTED

pytest_plugins = ["counting"]
FLAGS = [
    "--batch-size",
    "4",
    "--image-size",
    "16",
    "--epochs",
    "3",
    "--threads",
    "1",
    "--tracker",
    "none",
    "--no-report",
    "--checkpoint-every",
    "1",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set of 7 + 2 + 3 images and a run of it, two steps long; it was to be six."""
    folder = tmp_path_factory.mktemp("trained")
    pack(tiny_source(9, 3, size=(8, 8)), folder / "set", num_shards=2, val_size=2)
    places = ["--shards", str(folder / "set"), "--run-dir", str(folder / "run"), "--cache-dir", str(folder / "cache")]
    at_door(train.main, *FLAGS, *places, "--max-steps", "2")
    config = folder / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(folder / "cache"), "cache"))
    (folder / "run" / "state.json").write_text('{"state": "preempted", "step": 2, "reason": "SIGTERM"}')
    return folder


@pytest.mark.parametrize("name", ["checkpoint", "config.yaml", "log.jsonl", "state.json", "summary.json"])
def test_a_run_with_other_values_goes_on_or_is_refused_in_a_line(fuzz: Fuzz, trained: Path, name: str) -> None:
    """Of a checkpoint, it is its state.json, of which no checksum stands anywhere."""
    whole = trained / "run"
    file = next(whole.glob("checkpoints/step-00000002/state.json")) if name == "checkpoint" else whole / name
    place = Path("run") / file.relative_to(whole)
    Path("digit.png").write_bytes(encode_png(pixels_of("train", 0)))

    def attempt(drawn: tuple[bytes, str]) -> None:
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(whole, "run")
        shutil.copytree(trained / "set", "set", dirs_exist_ok=True)
        place.write_bytes(drawn[0])
        own = ["--shards", "set", "--cache-dir", "cache"]
        match drawn[1]:
            case "resume":
                run = ["--resume", "run", "--max-steps", "3", "--threads", "1", "--no-report", "--tracker", "none"]
                at_door(train.main, *run, *own, codes=(0, EXIT_PREEMPTED))
            case "evaluate":
                at_door(evaluate.main, "run", "--shards", "set")
            case "predict":
                at_door(predict.main, "run", "digit.png", "--json")

    inputs = damaged(file.read_bytes())
    if name == "checkpoint":
        document = json.loads(file.read_bytes())
        inputs = changed(document["scalars"]).map(lambda value: write({**document, "scalars": value})) | inputs
    elif name.endswith("json"):
        inputs = changed(json.loads(file.read_bytes())).map(write) | inputs
    commands = st.sampled_from(["resume", "evaluate", "predict"])
    fuzz.search(f"trained run, {name}", 0.004, st.tuples(inputs, commands), attempt)


def write(document: Any) -> bytes:
    """JSON."""
    return json.dumps(document).encode()
