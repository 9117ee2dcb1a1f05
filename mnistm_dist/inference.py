"""A trained model in Python, with its preprocessing: images of any kind in, probabilities out.

    from mnistm_dist import load_model

    model = load_model("runs/NAME")
    model.predict(["a.png", "b.jpg"])      float32 (2, 10)
    model.classes[model.predict("a.png").argmax()]

Every image is converted to uint8 RGB and then processed as in training and evaluation: scaled and cropped if the set
was packed with ``--resize``, resized to the image size of the checkpoint (without keeping the aspect ratio),
normalised, classified.
"""

import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mnistm_dist import config as configuration
from mnistm_dist.data.image_io import read_picture, resize_and_crop, to_rgb
from mnistm_dist.data.parallel import Progress
from mnistm_dist.data.transforms import Preprocess
from mnistm_dist.errors import UserError
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.evaluation import BATCH_SIZE, DECIMALS
from mnistm_dist.training.hardware import find_device, native_precisions
from mnistm_dist.training.models import create_model, to_device
from mnistm_dist.training.run_dir import CONFIG_NAME, read_summary, require_run

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# uint8 (H, W, 3), RGB; a PIL image of any mode; or the path of a file.
AnyImage = np.ndarray | Tensor | Image.Image | str | Path


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """The model of a checkpoint, ready to classify. `load_model` creates it."""

    module: nn.Module = field(repr=False)
    """Takes normalised float32 (B, 3, size, size), gives logits; in evaluation mode."""
    preprocess: Preprocess = field(repr=False)
    image_size: int
    """Size of the model's input, pixels."""
    resize: int | None
    """Short side to which pictures are scaled before their centre is cropped, pixels, as when the set was packed."""
    classes: tuple[str, ...]
    """Names, in the order of the probabilities."""
    device: torch.device
    autocast: torch.dtype | None
    """The run's reduced precision, if the device supports it natively."""
    checkpoint: Path
    step: int
    """Steps trained."""

    def predict(self, images: AnyImage | Iterable[AnyImage], *, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Return the probability of each class for each image: float32 (N, C), on the CPU.

        ``images``: one image, an iterable of images (sizes and kinds may differ), or an array or tensor uint8
        (N, H, W, 3). Files are read batch by batch. Raise `UserError` for a file that cannot be read and for an array
        of another shape or type.
        """
        if isinstance(images, str | Path | Image.Image) or getattr(images, "ndim", 4) == 3:
            images = [images]  # type: ignore[list-item]  # one image, by the line above
        results = []
        iterator = enumerate(images)
        while chunk := list(itertools.islice(iterator, batch_size)):
            prepared = torch.cat([self.prepare(image, f"image {index}") for index, image in chunk])
            results.append(self.classify(prepared, batch_size=batch_size))
        return np.concatenate(results) if results else np.empty((0, len(self.classes)), np.float32)

    @torch.inference_mode()
    def prepare(self, image: AnyImage, origin: str = "image") -> Tensor:
        """Return the model's input for one image: float32 (1, 3, size, size) on the device.

        Raise `UserError` that names the file, or else ``origin``.
        """
        if isinstance(image, str | Path):
            pixels: np.ndarray | Tensor = read_picture(image)
        elif isinstance(image, Image.Image):
            pixels = to_rgb(image, origin)
        else:
            pixels = image
        if not isinstance(pixels, np.ndarray | Tensor):
            raise UserError(f"{origin}: found {type(pixels).__name__}; accepted are arrays, PIL images and paths")
        shape, dtype = tuple(pixels.shape), str(pixels.dtype).removeprefix("torch.")
        if dtype != "uint8" or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise UserError(f"{origin}: found {dtype} {shape}; accepted is uint8 (height, width, 3), RGB")
        if self.resize is not None:
            pixels = resize_and_crop(np.asarray(pixels.cpu() if isinstance(pixels, Tensor) else pixels), self.resize)
        if isinstance(pixels, np.ndarray):
            # A copy: torch refuses negative strides (OpenCV's [..., ::-1]) and warns of read-only arrays.
            pixels = torch.from_numpy(np.array(pixels, order="C"))
        return self.preprocess(pixels[None].to(self.device), self.image_size)

    @torch.inference_mode()
    def classify(self, prepared: Tensor, *, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Return the probabilities, float32 (N, C), of one batch of `prepare`'s images, at most ``batch_size`` of
        them."""
        count = len(prepared)
        if self.device.type != "cpu" and count < batch_size:
            # A GPU chooses its kernels by the batch size, which in TF32 or bfloat16 shows in the third decimal: the
            # result of an image must not depend on the number of images beside it.
            prepared = torch.cat([prepared, prepared[-1:].expand(batch_size - count, -1, -1, -1)])
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            logits = self.module(prepared)
        return logits.float().softmax(dim=1)[:count].cpu().numpy()


def load_model(
    run: str | Path, checkpoint: str | Path = "chosen", device: str | torch.device | None = None
) -> TrainedModel:
    """Return the model of a run.

    Args:
        run: a run folder, or a folder that ``export --to hub`` wrote.
        checkpoint: ``best`` on val, ``last``, the folder of a checkpoint, or ``chosen``: the best if there is a test
            split to give an unbiased result, else the last.
        device: by default a GPU if there is one, else the CPU.

    Raises:
        UserError: the run or the checkpoint does not exist, is damaged, or is of another version.
    """
    run_dir = Path(run)
    require_run(run_dir)
    config = configuration.load(run_dir / CONFIG_NAME)
    found, _ = checkpoints.choose_checkpoint(run_dir, str(checkpoint), has_test="test" in read_summary(run_dir))
    scalars, target = found.scalars, torch.device(device or find_device(os.environ))
    precision = config.machine.precision
    module = create_model(len(scalars.classes), 0, config.network.model)
    checkpoints.load_model(found.path, module)
    return TrainedModel(
        module=to_device(module, target, config.machine.memory_format).eval(),
        preprocess=Preprocess(scalars.mean, scalars.std, target),
        image_size=scalars.image_size,
        resize=scalars.resize,
        classes=tuple(scalars.classes),
        device=target,
        autocast=AUTOCAST_DTYPES.get(precision) if precision in native_precisions(target.type) else None,
        checkpoint=found.path,
        step=found.step,
    )


def predict_files(
    model: TrainedModel, files: list[str], batch_size: int, skipped: list[str], progress: Progress
) -> list[dict[str, Any]]:
    """Read and classify the files, ``batch_size`` at a time. Files that cannot be read are added to ``skipped``.

    Return a row per file: ``file``, ``predicted`` (the first class of the largest probability), ``probability`` and
    ``probabilities``, rounded to `DECIMALS`.
    """
    rows: list[dict[str, Any]] = []
    for start in range(0, len(files), batch_size):
        batch = []
        for file in files[start : start + batch_size]:
            try:
                batch.append((file, model.prepare(file)))
            except UserError as error:
                skipped.append(str(error))
        if batch:
            names, inputs = zip(*batch, strict=True)
            outputs = model.classify(torch.cat(inputs), batch_size=batch_size).astype("float64").round(DECIMALS)
            rows += [
                {"file": file, "predicted": row.index(max(row)), "probability": max(row), "probabilities": row}
                for file, row in zip(names, outputs.tolist(), strict=True)
            ]
        progress(min(start + batch_size, len(files)), len(files))
    return rows
