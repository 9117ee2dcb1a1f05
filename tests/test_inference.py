"""A trained model in Python: the numbers of the evaluation, for pictures of any type."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VAL, output_of
from PIL import Image

from mnistm_dist import load_model
from mnistm_dist.data.image_io import resize_and_crop
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError


@pytest.fixture(scope="module")
def model(trained_run):
    return load_model(trained_run)


def test_the_probabilities_are_those_of_the_evaluation(model, val_images, val_probabilities):
    probabilities = model.predict(val_images)
    assert probabilities.shape == (VAL, 10)
    assert probabilities.dtype == np.float32
    assert np.abs(probabilities - val_probabilities).max() < 1e-5


def test_a_picture_may_be_an_array_a_tensor_an_image_or_a_path(model, val_images, tmp_path):
    expected = model.predict(val_images[:1])
    Image.fromarray(val_images[0]).save(tmp_path / "0.png")
    read_only = val_images[0].copy()
    read_only.flags.writeable = False
    kinds = {
        "array": val_images[0],
        "read-only": read_only,
        "strided": np.ascontiguousarray(val_images[0][..., ::-1])[..., ::-1],
        "tensor": torch.from_numpy(val_images[0]),
        "PIL": Image.fromarray(val_images[0]),
        "text": str(tmp_path / "0.png"),
        "path": tmp_path / "0.png",
        "tensors": torch.from_numpy(val_images[:1]),
    }
    for kind, picture in kinds.items():
        assert np.abs(model.predict(picture) - expected).max() < 1e-6, kind
    together = model.predict(kinds[name] for name in kinds if name != "tensors")
    assert np.abs(together - expected).max() < 1e-6


def test_a_result_does_not_depend_on_the_rest_of_the_batch(model, val_images):
    other = Image.fromarray(val_images[1]).resize((70, 41))
    for batch_size in (1, 2, 250):
        mixed = model.predict([val_images[0], other, val_images[2]], batch_size=batch_size)
        assert np.abs(mixed[[0, 2]] - model.predict(val_images[[0, 2]])).max() < 1e-6
        assert np.abs(mixed[1] - model.predict(other)[0]).max() < 1e-6


def test_an_enlarged_picture_gives_nearly_the_same(model, val_images):
    larger = [Image.fromarray(image).resize((224, 224), Image.Resampling.BILINEAR) for image in val_images]
    assert np.abs(model.predict(larger) - model.predict(val_images)).mean() < 0.02


def test_no_pictures_give_no_rows(model):
    assert model.predict([]).shape == (0, 10)


@pytest.mark.parametrize(
    ("picture", "result"),
    [
        (np.zeros((28, 28, 3), np.float32), "float32 (28, 28, 3)"),
        (torch.zeros(28, 28, 3), "float32 (28, 28, 3)"),
        (np.zeros((3, 28, 28), np.uint8), "uint8 (3, 28, 28)"),
        (np.zeros((2, 3, 28, 28), np.uint8), "uint8 (3, 28, 28)"),
        (np.zeros((28, 28), np.uint8), "uint8 (28,)"),
        (np.zeros((0, 28, 3), np.uint8), "uint8 (0, 28, 3)"),
        ([np.zeros((28, 28, 3), np.uint8), None], "image 1: found NoneType"),
        (["nowhere.png"], "nowhere.png: cannot be read (No such file"),
    ],
)
def test_anything_but_a_picture_is_refused_by_name(model, picture, result):
    with pytest.raises(UserError) as error:
        model.predict(picture)
    assert result in str(error.value)


def test_the_checkpoint_is_the_runs_own_choice_unless_named(trained_run):
    summary = json.loads((trained_run / "summary.json").read_text())
    assert summary["checkpoint"]["chosen"] == "best on val"
    assert load_model(trained_run).step == summary["checkpoint"]["step"]
    assert load_model(trained_run, "last").step == 20
    assert load_model(trained_run, trained_run / "checkpoints" / "step-00000010").step == 10


def test_without_a_test_split_the_last_checkpoint_is_used(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    del summary["test"]
    (run / "summary.json").write_text(json.dumps(summary))
    assert load_model(run).step == 20
    (run / "summary.json").unlink()
    model = load_model(run)
    assert (model.step, model.classes) == (20, tuple("0123456789"))


def test_a_folder_without_a_run_is_refused_by_name(trained_run, tmp_path):
    with pytest.raises(UserError, match="nowhere: not a run folder"):
        load_model(tmp_path / "nowhere")
    run = shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(UserError, match="no complete checkpoint"):
        load_model(run)
    with pytest.raises(UserError, match="nowhere"):
        load_model(trained_run, "nowhere")


def test_loading_leaves_the_random_state_alone(trained_run):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load_model(trained_run)
    assert torch.equal(before, torch.get_rng_state())


def test_the_package_costs_nothing_until_something_of_it_is_used():
    code = "import sys; import mnistm_dist; print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_batch_is_that_of_the_evaluation():
    from mnistm_dist import inference
    from mnistm_dist.training import evaluation

    assert inference.BATCH_SIZE == evaluation.BATCH_SIZE


def test_a_picture_is_cropped_as_pack_with_resize_did(run_command, tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (20 + number, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{number}.png")
    output_of(run_command("pack", "photos", "--resize", 16, "--out", "set"))
    flags = ("--batch-size", 8, "--max-steps", 1, "--image-size", 16, "--tracker", "none", "--no-report")
    output_of(run_command("train", "--shards", "set", "--run-dir", "run", *flags))
    model = load_model(tmp_path / "run")
    picture = tmp_path / "photos" / "val" / "cat" / "0.png"
    cropped = resize_and_crop(np.array(Image.open(picture)), 16)
    shards = ShardSet.open(tmp_path / "set")
    assert any(np.array_equal(cropped, image) for image in shards.images("val", np.arange(4)))
    image = Image.open(picture)
    for given in (picture, image, np.array(image), torch.from_numpy(np.array(image))):
        assert np.array_equal(model.predict(given), model.predict(cropped))
