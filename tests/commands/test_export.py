"""`python -m mnistm_dist.export`: a file that gives the model's probabilities without this package."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, error_of, output_of
from safetensors.torch import load_file, save_file

from mnistm_dist import load_model
from mnistm_dist.export import main
from mnistm_dist.exported_model import ABOUT, compare, run_onnx, run_torch

pytest.importorskip("onnxruntime", reason='needs pip install "mnistm-dist[export]"')


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory) -> dict[str, Path]:
    """The run's model in both formats, each in a folder that the command creates."""
    folder = tmp_path_factory.mktemp("exported")
    files = {"onnx": folder / "onnx" / "model.onnx", "torch": folder / "torch" / "model.pt2"}
    for name, file in files.items():
        assert main([str(trained_run), "--to", name, "--out", str(file)]) == 0
    return files


RUN = {"onnx": run_onnx, "torch": run_torch}
both = pytest.mark.parametrize("name", ["onnx", "torch"])


@both
def test_the_exported_model_gives_the_predictions_of_the_evaluation(exported, val_images, val_probabilities, name):
    run = RUN[name](exported[name])
    for batch in (1, 7, len(val_images)):
        result = run(val_images[:batch])
        assert (result.shape, result.dtype) == ((batch, 10), np.float32)
        assert np.abs(result - val_probabilities[:batch]).max() < 1e-4


@both
@pytest.mark.parametrize("size", [(1, 1), (5, 200), (28, 28), (32, 32), (33, 31), (300, 450)])
def test_images_of_any_size_give_what_the_model_gives(exported, trained_run, name, size):
    images = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    result = RUN[name](exported[name])(images)
    assert np.abs(result - load_model(trained_run, device="cpu").predict(images)).max() < 1e-4


@both
def test_an_export_is_one_file_without_paths_of_this_machine(exported, trained_run, name):
    assert list(exported[name].parent.iterdir()) == [exported[name]]
    content = exported[name].read_bytes()
    for path in (str(trained_run), str(Path(torch.__file__).parent), str(ROOT)):
        assert path.encode() not in content


def test_the_exported_file_holds_classes_sizes_and_step(exported, trained_run):
    import onnx

    model = load_model(trained_run)
    about = {"classes": list(model.classes), "image_size": 32, "step": model.step, "resize": None}
    extra = {ABOUT: ""}
    torch.export.load(exported["torch"], extra_files=extra)
    assert json.loads(extra[ABOUT]) == about
    properties = {entry.key: entry.value for entry in onnx.load(exported["onnx"]).metadata_props}
    assert json.loads(properties[ABOUT]) == about


def test_the_torch_file_needs_only_torch(exported, tmp_path):
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(['mnistm_dist', 'torchvision', 'accelerate'])\n"
        "import torch\n"
        "model = torch.export.load(sys.argv[1]).module()\n"
        "print(tuple(model(torch.zeros(3, 40, 50, 3, dtype=torch.uint8)).shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, exported["torch"]], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "(3, 10)", done.stderr


def test_the_torch_file_is_not_bound_to_the_cpu(exported):
    program = torch.export.load(exported["torch"])
    assert "device(" not in str(program.graph)
    assert "assert" not in str(program.graph)


def test_an_existing_file_is_replaced_only_with_force(exported, trained_run, run_main, tmp_path):
    (tmp_path / "model.pt2").write_text("mine")
    flags = [trained_run, "--to", "torch", "--out", "model.pt2"]
    assert "--force" in error_of(run_main(main, *flags))
    assert (tmp_path / "model.pt2").read_text() == "mine"
    assert "differ by" in output_of(run_main(main, *flags, "--force"))
    assert run_torch(tmp_path / "model.pt2")(np.zeros((1, 28, 28, 3), np.uint8)).shape == (1, 10)


def test_an_export_that_differs_from_the_model_is_removed(trained_run, run_main, tmp_path):
    """The weights are NaN, so no probability can be compared."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    for checkpoint in (run / "checkpoints").iterdir():
        weights = load_file(checkpoint / "model.safetensors")
        save_file(
            {k: v * float("nan") if k == "fc.3.bias" else v for k, v in weights.items()},
            checkpoint / "model.safetensors",
        )
        state = json.loads((checkpoint / "state.json").read_text())
        content = (checkpoint / "model.safetensors").read_bytes()
        state["files"]["model.safetensors"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (checkpoint / "state.json").write_text(json.dumps(state))
    out = tmp_path / "out"
    out.mkdir()
    assert "differ" in error_of(run_main(main, run, "--to", "torch", "--out", "out/model.pt2"))
    assert not list(out.iterdir())


def test_the_comparison_detects_one_wrong_probability(trained_run, val_images):
    model = load_model(trained_run, device="cpu")

    def wrong(batch: np.ndarray) -> np.ndarray:
        probabilities = model.predict(batch)
        probabilities[-1, 4] += 2e-4
        return probabilities

    assert compare(model, model.predict, val_images[:5]) < 1e-6
    assert compare(model, wrong, val_images[:5]) == pytest.approx(2e-4, rel=0.01)


def test_a_missing_package_is_named_with_its_remedy(trained_run, run_main, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    error = error_of(run_main(main, trained_run, "--to", "onnx", "--out", "model.onnx"))
    assert "--to onnx needs onnxscript" in error
    assert 'pip install "mnistm-dist[export]"' in error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere", "--to", "torch", "--out", "m.pt2"], "nowhere: not a run folder"),
        (["RUN", "--to", "torch", "--out", "."], "--out ."),
        (["RUN", "--to", "keras", "--out", "m"], "--to"),
        (["RUN", "--to", "onnx"], "--out"),
        (["RUN", "--to", "torch", "--out", "m.pt2", "--checkpoint", "nowhere"], "nowhere"),
        (["RUN", "--to", "torch", "--out", "file/m.pt2"], "m.pt2"),
    ],
)
def test_a_user_error_is_one_line(trained_run, run_main, tmp_path, arguments, named):
    (tmp_path / "file").touch()
    before = set(tmp_path.iterdir())
    assert named in error_of(run_main(main, *(trained_run if a == "RUN" else a for a in arguments)))
    assert set(tmp_path.iterdir()) == before
