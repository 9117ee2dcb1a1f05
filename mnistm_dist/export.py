"""Export a trained model: one file, or a folder for the Hugging Face Hub.

    python -m mnistm_dist.export runs/NAME --to onnx --out model.onnx
    python -m mnistm_dist.export runs/NAME --to torch --out model.pt2
    python -m mnistm_dist.export runs/NAME --to hub --out FOLDER --push ME/NAME

onnx and torch. Input: images, uint8 (N, H, W, 3), RGB, any N, H and W; the
preprocessing is part of the model. If the set was packed with --resize, scale
and crop images in the same way first. Output: probabilities, float32 (N, C),
computed in float32 whatever the run's precision was.

    session = onnxruntime.InferenceSession("model.onnx")
    session.run(None, {"images": images})[0]
    torch.export.load("model.pt2").module()(torch.from_numpy(images))

The second needs torch alone. hub: weights, configuration, results and a model
card; mnistm_dist.load_model("FOLDER") reads it. The result appears under its
name only if its probabilities equal the model's, to 1e-4, on images of the
bundled sample in several sizes and batches.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from mnistm_dist.cli import command
from mnistm_dist.config import LocalFile, LocalPath, OrNone
from mnistm_dist.errors import UserError, import_optional, run_cli
from mnistm_dist.files import atomic_path, explain_os_errors, staged_folder

# Packages beyond this one's own that a format needs.
PACKAGES: dict[str, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": (), "hub": ()}
# Largest accepted difference of a probability.
TOLERANCE = 1e-4
# Images on which the export is compared with the model.
IMAGES = 50


@command
def main(
    run: Annotated[LocalPath, arg(metavar="RUN")],
    /,
    *,
    to: Literal["onnx", "torch", "hub"],
    out: LocalFile,
    force: bool = False,
    push: OrNone[str] = None,
    checkpoint: LocalPath = "chosen",
) -> int:
    """Export a trained model. Raises `UserError` if the export does not give the model's probabilities.

    Args:
        run: A run folder.
        to: Format.
        out: File to write; for hub, a folder.
        force: Replace a file that exists.
        push: Repository of the Hugging Face Hub, OWNER/NAME, to upload the folder to. It is created if it is missing.
        checkpoint: best, last, or the path of a checkpoint. chosen: the one that the run has chosen.
    """
    if push is not None and to != "hub":
        raise UserError(f"--push {push}: needs --to hub, found --to {to}")
    if to != "hub" and (out.is_dir() or (os.path.lexists(out) and not force)):
        raise UserError(f"--out {out}: already exists; choose another name, or replace a file with --force")
    for package in PACKAGES[to]:
        import_optional(package, f"--to {to}", "export")

    from huggingface_hub import get_token

    from mnistm_dist import exported_model, hub
    from mnistm_dist.inference import load_model
    from mnistm_dist.reporting.console import Console

    if push is not None and get_token() is None:
        raise UserError("--push: found no token of the Hugging Face Hub; set HF_TOKEN, or run hf auth login")
    console = Console()
    # An export is for any machine, so it is made, and compared, in float32 on the CPU, whatever the run's precision is.
    model = replace(load_model(run, checkpoint, device="cpu"), autocast=None)
    with explain_os_errors(out), console.library_warnings():
        out.parent.mkdir(parents=True, exist_ok=True)
        with staged_folder(out) if to == "hub" else atomic_path(out) as temporary:
            if to == "hub":
                hub.write_folder(model, Path(run), temporary)
                written = replace(load_model(temporary, device="cpu"), autocast=None, resize=None)
                exported: exported_model.Runner = written.predict
            else:
                write, load = exported_model.FORMATS[to]
                temporary.write_bytes(write(model))
                exported = load(temporary)
            difference = exported_model.compare(model, exported, exported_model.sample_images(IMAGES))
            # Not `difference > TOLERANCE`, which is False for NaN.
            if not difference <= TOLERANCE:
                raise UserError(
                    f"{out}: not written: its probabilities differ from the model's by {difference:.1e}, more than "
                    f"{TOLERANCE:.0e}; another version of {' or '.join(PACKAGES[to]) or 'torch'} may do better"
                )
    sizes = f"scaled and cropped as by pack --resize {model.resize}" if model.resize else "any N, H and W"
    size = sum(path.stat().st_size for path in [out, *out.rglob("*")] if path.is_file())
    rows = {
        "model": f"{model.checkpoint}, {model.step:,} steps",
        "input": f"images: uint8 (N, H, W, 3), RGB, {sizes}",
        "output": f"probabilities: float32 (N, {len(model.classes)})",
        "compared": f"{IMAGES} images in {len(exported_model.SIZES)} sizes: they differ by {difference:.1e}",
        "size": f"{size:,} bytes",
    }
    if push is not None:
        rows["pushed"] = hub.push(out, push)
    console.header(f"exported: {out}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
