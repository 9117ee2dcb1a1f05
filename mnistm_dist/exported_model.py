"""A trained model as one graph, uint8 images in and probabilities out, for programs without this package.

Both formats take ``images``, uint8 (N, H, W, 3), RGB, any N, H and W from 1, and give ``probabilities``, float32
(N, C). Resizing and normalising are inside, in float32 whatever the run's precision was.
"""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from mnistm_dist.inference import TrainedModel

Runner = Callable[[np.ndarray], np.ndarray]
"""uint8 (N, H, W, 3) to float32 (N, C)."""
ABOUT = "mnistm_dist"
"""Where `about` stands: in ONNX a metadata property, in a .pt2 an extra file."""


class Portable(nn.Module):
    """Preprocessing, model and softmax in one."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        # A copy in the ordinary memory format, which the torch format would not recognise as whole otherwise.
        self.module = copy.deepcopy(model.module).to(memory_format=torch.contiguous_format)
        self.image_size = model.image_size
        self.register_buffer("mean", model.preprocess.mean)
        self.register_buffer("std", model.preprocess.std)

    def forward(self, images: Tensor) -> Tensor:
        # `images / 255` and not `.float()`: that would tie the graph to the CPU by an assertion.
        x = images.permute(0, 3, 1, 2) / 255
        # Always antialiased, where `data.transforms.resize` is only if it shrinks: an image that grows or stays is the
        # same by it, and the graph has no branch on a size that it does not know.
        size = (self.image_size, self.image_size)
        x = functional.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        return self.module((x - self.mean) / self.std).softmax(dim=1)


def about(model: TrainedModel) -> str:
    """What an exported file says of itself, as JSON: the names of the classes, the size the model sees, its step."""
    return json.dumps({"classes": model.classes, "image_size": model.image_size, "step": model.step})


def trace(model: TrainedModel) -> ExportedProgram:
    """The graph of a model that lies on the CPU, with N, H and W free."""
    example = torch.zeros(2, 32, 48, 3, dtype=torch.uint8)
    free = {0: Dim("N"), 1: Dim("H"), 2: Dim("W")}
    program = torch.export.export(Portable(model).eval(), (example,), dynamic_shapes=(free,))
    for node in program.graph.nodes:
        # Lines of the source with their paths on this machine: nobody else's business.
        node.meta.pop("stack_trace", None)
    return program


def to_torch(model: TrainedModel) -> bytes:
    """A ``.pt2`` file: ``torch.export.load(FILE).module()(images)``, with torch alone."""
    file = io.BytesIO()
    torch.export.save(trace(model), file, extra_files={ABOUT: about(model)})
    return file.getvalue()


def to_onnx(model: TrainedModel) -> bytes:
    """An ONNX file with its weights inside. Needs onnx and onnxscript."""
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
    """A `.pt2` file, loaded."""
    with path.open("rb") as file:
        module = torch.export.load(file).module()

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(images)).numpy()

    return run


def run_onnx(path: Path) -> Runner:
    """An ONNX file in onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> np.ndarray:
        return session.run(["probabilities"], {"images": images})[0]

    return run
