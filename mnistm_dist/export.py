"""Export a trained model as one file: uint8 images in, probabilities out.

    python -m mnistm_dist.export runs/NAME --to onnx --out model.onnx
    python -m mnistm_dist.export runs/NAME --to torch --out model.pt2

Input: images, uint8 (N, H, W, 3), RGB, any N, H and W; the preprocessing is
part of the model. Output: probabilities, float32 (N, C), computed in float32
whatever the run's precision was.

    session = onnxruntime.InferenceSession("model.onnx")
    session.run(None, {"images": images})[0]
    torch.export.load("model.pt2").module()(torch.from_numpy(images))

The second needs torch alone. The file appears under its name only if its
probabilities equal the model's, to 1e-4, on images of the bundled sample in
several sizes and batches.
"""

import dataclasses
import os
import sys
from typing import Annotated, Literal

from tyro.conf import arg

from mnistm_dist.cli import command
from mnistm_dist.config import LocalFile, LocalPath
from mnistm_dist.errors import UserError, import_optional, run_cli
from mnistm_dist.files import atomic_path, explain_os_errors

# Packages beyond this one's own that a format needs.
PACKAGES: dict[str, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
# Largest accepted difference of a probability.
TOLERANCE = 1e-4
# Images on which the file is compared with the model.
IMAGES = 50


@command
def main(
    run: Annotated[LocalPath, arg(metavar="RUN")],
    /,
    *,
    to: Literal["onnx", "torch"],
    out: Annotated[LocalFile, arg(metavar="FILE")],
    force: bool = False,
    checkpoint: LocalPath = "chosen",
) -> int:
    """Export a trained model. Raises `UserError` if the exported file does not give the model's probabilities.

    Args:
        run: A run folder.
        to: Format.
        out: File to write.
        force: Replace FILE if it exists.
        checkpoint: best, last, or the path of a checkpoint. chosen: the one that the run has chosen.
    """
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it")
    if os.path.lexists(out) and not force:
        raise UserError(f"--out {out}: already exists; choose another name, or replace it with --force")
    for package in PACKAGES[to]:
        import_optional(package, f"--to {to}", "export")

    from mnistm_dist import exported_model
    from mnistm_dist.inference import load_model
    from mnistm_dist.reporting.console import Console

    console = Console()
    # A file is for any machine, so it is made, and compared, in float32 on the CPU, whatever the run's precision is.
    model = dataclasses.replace(load_model(run, checkpoint, device="cpu"), autocast=None)
    with explain_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out) as temporary, console.library_warnings():
            data = exported_model.to_onnx(model) if to == "onnx" else exported_model.to_torch(model)
            temporary.write_bytes(data)
            exported = exported_model.run_onnx(temporary) if to == "onnx" else exported_model.run_torch(temporary)
            difference = exported_model.compare(model, exported, exported_model.sample_images(IMAGES))
            # Not `difference > TOLERANCE`, which is False for NaN.
            if not difference <= TOLERANCE:
                raise UserError(
                    f"{out}: not written: its probabilities differ from the model's by {difference:.1e}, more than "
                    f"{TOLERANCE:.0e}; another version of {' or '.join(PACKAGES[to]) or 'torch'} may do better"
                )
    console.header(
        f"exported: {out}",
        {
            "model": f"{model.checkpoint}, {model.step:,} steps",
            "input": "images: uint8 (N, H, W, 3), RGB, any N, H and W",
            "output": f"probabilities: float32 (N, {len(model.classes)})",
            "compared": f"{IMAGES} images in {len(exported_model.SIZES)} sizes: they differ by {difference:.1e}",
            "size": f"{len(data):,} bytes",
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
