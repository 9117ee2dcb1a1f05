"""A trained model in use, with its preprocessing: pictures of any kind in, probabilities out.

    from mnistm_dist import load_model

    model = load_model("runs/NAME")
    model.predict(["a.png", "b.jpg"])      float32 (2, 10)
    model.classes[model.predict("a.png").argmax()]

A picture becomes RGB uint8 and then goes the way of every image in training and evaluation, by the run's own numbers:
resized to what the model saw, whole, so that a long one is squeezed; normalised; classified.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mnistm_dist import config as configuration
from mnistm_dist.data.image_io import read_picture, to_rgb
from mnistm_dist.data.transforms import Preprocess
from mnistm_dist.errors import UserError
from mnistm_dist.results import choose_checkpoint, read_summary
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.evaluation import BATCH_SIZE
from mnistm_dist.training.models import create_model, to_device

REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions of a run that need autocast."""
LAST_BIAS = "fc.3.bias"
"""The model's last parameter, as long as there are classes."""

Picture = np.ndarray | Tensor | Image.Image | str | Path
"""uint8 (H, W, 3), RGB; a PIL image of any mode; or the path of a file."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A checkpoint's model, ready to classify. `load_model` makes it."""

    module: nn.Module = field(repr=False)
    """Takes normalised float32 (B, 3, size, size), gives logits; in evaluation mode."""
    preprocess: Preprocess = field(repr=False)
    image_size: int
    """What the model sees, pixels."""
    classes: tuple[str, ...]
    """Names, in the order of the probabilities."""
    device: torch.device
    autocast: torch.dtype | None
    """The run's reduced precision, where the device has it."""
    checkpoint: Path
    step: int
    """Steps trained."""

    def predict(self, pictures: Picture | Iterable[Picture], *, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """The probability of each class for each picture: float32 (N, C), on the CPU.

        ``pictures`` is one picture, a list or other iterable of them (sizes and kinds may differ), or an array or
        tensor uint8 (N, H, W, 3). Files are read as they come to their turn. Raises `UserError` for a file that cannot
        be read and for an array of another shape or type.
        """
        if isinstance(pictures, str | Path | Image.Image) or getattr(pictures, "ndim", 4) == 3:
            pictures = [pictures]  # type: ignore[list-item]  # one picture, by the line above
        results = []
        iterator = enumerate(pictures)
        while chunk := list(itertools.islice(iterator, batch_size)):
            prepared = torch.cat([self.prepare(picture, f"picture {index}") for index, picture in chunk])
            results.append(self.classify(prepared, batch_size=batch_size))
        return np.concatenate(results) if results else np.empty((0, len(self.classes)), np.float32)

    @torch.inference_mode()
    def prepare(self, picture: Picture, origin: str = "picture") -> Tensor:
        """One picture as the model sees it: float32 (1, 3, size, size) on the device.

        Raises `UserError`, naming the file or else ``origin``.
        """
        if isinstance(picture, str | Path):
            pixels: np.ndarray | Tensor = read_picture(picture)
        elif isinstance(picture, Image.Image):
            pixels = to_rgb(picture, origin)
        else:
            pixels = picture
        if not isinstance(pixels, np.ndarray | Tensor):
            raise UserError(f"{origin}: found {type(pixels).__name__}; accepted are arrays, PIL images and paths")
        shape, kind = tuple(pixels.shape), str(pixels.dtype).removeprefix("torch.")
        if kind != "uint8" or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise UserError(f"{origin}: found {kind} {shape}; accepted is uint8 (height, width, 3), RGB")
        if isinstance(pixels, np.ndarray):
            # A copy: torch takes no negative strides (OpenCV's [..., ::-1]) and warns of what is read-only.
            pixels = torch.from_numpy(np.array(pixels, order="C"))
        return self.preprocess(pixels[None].to(self.device), self.image_size)

    @torch.inference_mode()
    def classify(self, prepared: Tensor, *, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """The probabilities float32 (N, C) of one batch of `prepare`'s images, at most ``batch_size`` of them."""
        count = len(prepared)
        if self.device.type != "cpu" and count < batch_size:
            # A GPU picks its kernels by the batch's shape, and in TF32 or bfloat16 that shows in the third decimal: a
            # picture's result must not depend on how many others come with it.
            prepared = torch.cat([prepared, prepared[-1:].expand(batch_size - count, -1, -1, -1)])
        with self._precision():
            logits = self.module(prepared)
        return logits.float().softmax(dim=1)[:count].cpu().numpy()

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)


def load_model(
    run: str | Path, checkpoint: str | Path = "chosen", device: str | torch.device | None = None
) -> TrainedModel:
    """The model of a run.

    Args:
        run: a run folder.
        checkpoint: ``best`` on val, ``last``, a checkpoint's folder, or ``chosen``: the run's own choice, which is the
            best where a test split gives an honest result, else the last.
        device: by default a GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged or of another version.
    """
    run_dir = Path(run)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: no run folder (no config.yaml); name one, such as runs/NAME")
    machine = configuration.load(run_dir / "config.yaml").machine
    summary = read_summary(run_dir)
    found, _ = choose_checkpoint(run_dir, str(checkpoint), has_test="test" in summary)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    last_bias = checkpoints.load_tensors(found.path / checkpoints.MODEL).get(LAST_BIAS, torch.empty(1))
    module = create_model(len(last_bias), seed=0)
    checkpoints.load_model(found.path, module)
    return TrainedModel(
        module=to_device(module, target, machine.memory_format).eval(),
        preprocess=Preprocess(found.scalars.mean, found.scalars.std, target),
        image_size=found.scalars.image_size,
        classes=class_names(summary, count=len(last_bias)),
        device=target,
        autocast=native_precision(machine.precision, target),
        checkpoint=found.path,
        step=found.step,
    )


def class_names(summary: dict[str, Any], *, count: int) -> tuple[str, ...]:
    """The names in a run's ``summary.json``, or digits where it has none for ``count`` classes."""
    for split in ("val", "test"):
        scores = summary.get(split)
        names = scores.get("classes") if isinstance(scores, dict) else None
        if isinstance(names, list) and len(names) == count:
            return tuple(map(str, names))
    return tuple(map(str, range(count)))


def native_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """The reduced precision in which a run was evaluated, if ``device`` has it too; None: float32."""
    if device.type != "cuda" or (precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False)):
        return None
    return REDUCED.get(precision)
