"""Export a trained model as one file: uint8 images in, probabilities out.

    python -m mnistm_dist.export runs/NAME --to onnx --out model.onnx
    python -m mnistm_dist.export runs/NAME --to torch --out model.pt2

Input: images, uint8 (N, H, W, 3), RGB, any N, H and W; the preprocessing is
part of the model. Output: probabilities, float32 (N, C).

    session = onnxruntime.InferenceSession("model.onnx")
    session.run(None, {"images": images})[0]
    torch.export.load("model.pt2").module()(torch.from_numpy(images))

The second needs torch alone. The file appears under its name only if its
probabilities equal the model's, to 1e-4, on real images in several sizes and
batches.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from mnistm_dist.cli import command
from mnistm_dist.errors import UserError, run_cli
from mnistm_dist.files import explain_os_errors, fsync_path

if TYPE_CHECKING:
    import numpy as np

    from mnistm_dist.exported_model import Runner
    from mnistm_dist.inference import TrainedModel

NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
"""Packages beyond this one's own that a format needs."""
TOLERANCE = 1e-4
"""Largest accepted difference of a probability."""
IMAGES = 50
"""Real images on which the file is compared with the model."""
OTHER_SIZES = ((20, 33), (64, 64), (150, 90))
"""(height, width) to which they are also brought, pixels: smaller, larger, not square."""


@command
def main(
    run: Annotated[str, arg(metavar="RUN")],
    /,
    *,
    to: Literal["onnx", "torch"],
    out: Annotated[Path, arg(metavar="FILE")],
    force: bool = False,
    checkpoint: str = "chosen",
) -> int:
    """Export a trained model. Raises `UserError` if the exported file does not give the model's probabilities.

    Args:
        run: A run folder.
        to: Format.
        out: File to write.
        force: Replace FILE if it exists.
        checkpoint: best, last, or the path of a checkpoint. chosen: the one that the run has chosen.
    """
    check_out(out, force=force)
    check_packages(to)

    from mnistm_dist import exported_model as portable
    from mnistm_dist.inference import load_model
    from mnistm_dist.reporting.console import Console

    console = Console()
    # A file is for any machine, so it is made, and compared, in float32 on the CPU.
    model = load_model(run, checkpoint, device="cpu")
    with beside(out, force=force) as temporary:
        with console.library_warnings():
            data = portable.to_onnx(model) if to == "onnx" else portable.to_torch(model)
        with explain_os_errors(out):
            temporary.write_bytes(data)
            fsync_path(temporary)
        images, origin = real_images(Path(run))
        exported = portable.run_onnx(temporary) if to == "onnx" else portable.run_torch(temporary)
        difference, count = compare(model, exported, images)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{out}: not written: its probabilities differ from the model's by {difference:.1e}, more than "
                f"{TOLERANCE:.0e}; another version of {' or '.join(NEEDED[to]) or 'torch'} may do better"
            )
    console.header(
        f"exported: {out}",
        {
            "model": f"{model.checkpoint}, {model.step:,} steps",
            "input": "images: uint8 (N, H, W, 3), RGB, any N, H and W",
            "output": f"probabilities: float32 (N, {len(model.classes)})",
            "compared": f"{count} images ({origin}, in {1 + len(OTHER_SIZES)} sizes): they differ by {difference:.1e}",
            "size": f"{len(data):,} bytes",
        },
    )
    return 0


def check_out(out: Path, *, force: bool) -> None:
    """Raises `UserError` where the file may not be written there."""
    if out.is_dir() or not out.name:
        raise UserError(f"--out {out}: is a folder; name a file in it")
    if os.path.lexists(out) and not force:
        raise UserError(f"--out {out}: exists already; choose another name, or replace it with --force")


@contextlib.contextmanager
def beside(out: Path, *, force: bool) -> Iterator[Path]:
    """An empty file beside ``out`` to write to, which takes its place if the block ends well and is removed otherwise.

    Raises `UserError` where nothing can be written there, or ``out`` has appeared meanwhile.
    """
    temporary = out.with_name(f".{os.getpid()}.{out.name}")
    with explain_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    try:
        yield temporary
        check_out(out, force=force)
        with explain_os_errors(out):
            temporary.replace(out)
            fsync_path(out.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_packages(target: str) -> None:
    """Raises `UserError` where a package that the format needs is not installed."""
    missing = [name for name in NEEDED[target] if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f'--to {target}: {" and ".join(missing)} {verb} not installed; pip install "mnistm-dist[export]"'
        )


def real_images(run_dir: Path) -> tuple[np.ndarray, str]:
    """`IMAGES` images uint8 (n, H, W, 3), and where they are from: the run's packed set if it is still there, else the
    bundled sample."""
    import numpy as np

    from mnistm_dist import config as configuration
    from mnistm_dist.data.shards import ShardSet
    from mnistm_dist.data.sources.catalog import open_source

    path = configuration.load(run_dir / "config.yaml").data.shards
    try:
        shards = ShardSet.open(str(path))
        split = next(name for name in ("val", "train", "test") if name in shards.manifest.splits)
        ids = range(min(IMAGES, shards.split(split).count))
        return shards.images(split, ids), f"{split} of {path}"
    except UserError:
        samples = itertools.islice(open_source("sample").samples(), IMAGES)
        return np.stack([sample.pixels for sample in samples if sample.pixels is not None]), "the bundled sample"


def compare(model: TrainedModel, run: Runner, images: np.ndarray) -> tuple[float, int]:
    """The largest difference of a probability between the exported file and the model, and how many images were
    compared: uint8 (n, H, W, 3) as they are and in `OTHER_SIZES`, all at once and the first by itself."""
    import numpy as np
    from PIL import Image

    sets = [images]
    for height, width in OTHER_SIZES:
        sets.append(np.stack([np.asarray(Image.fromarray(image).resize((width, height))) for image in images]))
    largest = 0.0
    for batch in sets:
        expected = model.predict(batch)
        for found, wanted in ((run(batch), expected), (run(batch[:1]), expected[:1])):
            difference = np.abs(found - wanted).max() if found.shape == wanted.shape else np.inf
            # A NaN is larger than everything, so it stays.
            largest = float(np.maximum(largest, difference))
    return largest, len(sets) * len(images)


if __name__ == "__main__":
    sys.exit(run_cli(main))
