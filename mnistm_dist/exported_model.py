"""A trained model as one graph, uint8 images in and probabilities out, for programs without this package.

Both formats take ``images``, uint8 (N, H, W, 3), RGB, any N, H and W from 1, and return ``probabilities``, float32
(N, C). Resizing and normalising are inside, in float32 whatever the run's precision was.
"""

import copy
import dataclasses
import io
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from mnistm_dist.data.sources.catalog import open_source
from mnistm_dist.inference import TrainedModel

# uint8 (N, H, W, 3) to float32 (N, C).
Runner = Callable[[np.ndarray], np.ndarray]
# Where `about` is stored: in ONNX a metadata property, in a .pt2 an extra file.
ABOUT = "mnistm_dist"
# (width, height) of the images on which a file is compared with its model, pixels: smaller, larger, not square.
SIZES = ((28, 28), (33, 20), (64, 64), (90, 150))


class Portable(nn.Module):
    """Preprocessing, model and softmax in one."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        # A copy in the default memory format: torch.export.save does not store channels_last weights whole.
        self.module = copy.deepcopy(model.module).to(memory_format=torch.contiguous_format)
        self.image_size = model.image_size
        self.register_buffer("mean", model.preprocess.mean)
        self.register_buffer("std", model.preprocess.std)

    def forward(self, images: Tensor) -> Tensor:
        # `images / 255` and not `.float()`, which would tie the graph to the CPU by an assertion.
        x = images.permute(0, 3, 1, 2) / 255
        # Always antialiased, unlike `data.transforms.resize`: it has no effect where an image grows or stays, and the
        # graph has no branch on a size that it does not know.
        size = (self.image_size, self.image_size)
        x = functional.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        return self.module((x - self.mean) / self.std).softmax(dim=1)


def about(model: TrainedModel) -> str:
    """Return the description that an exported file holds, as JSON: class names, size of the model's input, step, and
    ``resize``, the size to which the caller scales and crops pictures first."""
    return json.dumps({name: getattr(model, name) for name in ("classes", "image_size", "step", "resize")})


def trace(model: TrainedModel) -> ExportedProgram:
    """Return the graph of a model on the CPU, with N, H and W free."""
    example = torch.zeros(2, 32, 48, 3, dtype=torch.uint8)
    free = {0: Dim("N"), 1: Dim("H"), 2: Dim("W")}
    program = torch.export.export(Portable(model).eval(), (example,), dynamic_shapes=(free,))
    for node in program.graph.nodes:
        # It holds paths of this machine.
        node.meta.pop("stack_trace", None)
    return program


def to_torch(model: TrainedModel) -> bytes:
    """Return a ``.pt2`` file: ``torch.export.load(FILE).module()(images)``, with torch alone."""
    file = io.BytesIO()
    torch.export.save(trace(model), file, extra_files={ABOUT: about(model)})
    return file.getvalue()


def to_onnx(model: TrainedModel) -> bytes:
    """Return an ONNX file with its weights inside. Needs onnx and onnxscript."""
    with warnings.catch_warnings():
        # torch's own converter uses what torch has deprecated.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            trace(model), input_names=["images"], output_names=["probabilities"], dynamo=True, verbose=False
        )
    assert program is not None
    program.model.metadata_props[ABOUT] = about(model)
    return program.model_proto.SerializeToString()


def run_torch(path: Path) -> Runner:
    """Load a ``.pt2`` file."""
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return torch.inference_mode()(lambda images: module(torch.from_numpy(images)).numpy())


def run_onnx(path: Path) -> Runner:
    """Load an ONNX file in onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images})[0]


# How a format is written, and loaded.
FORMATS: dict[str, tuple[Callable[[TrainedModel], bytes], Callable[[Path], Runner]]] = {
    "onnx": (to_onnx, run_onnx),
    "torch": (to_torch, run_torch),
}


def sample_images(count: int) -> np.ndarray:
    """Return the first images of the bundled sample, uint8 (count, 28, 28, 3)."""
    samples = itertools.islice(open_source("sample").samples(), count)
    return np.stack([sample.pixels for sample in samples if sample.pixels is not None])


def compare(model: TrainedModel, run: Runner, images: np.ndarray) -> float:
    """Return the largest difference of a probability between an exported file and its model; NaN if there is a NaN.

    The images, uint8 (n, H, W, 3), are brought to each of `SIZES`, and classified all at once and the first by itself.
    """
    differences = []
    # The file neither scales nor crops.
    model = dataclasses.replace(model, resize=None)
    for size in SIZES:
        resized = np.stack([np.asarray(Image.fromarray(image).resize(size)) for image in images])
        for batch in (resized, resized[:1]):
            differences.append(np.abs(run(batch) - model.predict(batch)).max())
    return float(np.max(differences))
