"""Pack images with labels into shards to train on.

    python -m mnistm_dist.pack sample --out shards/sample
    python -m mnistm_dist.pack mnist_m.tar.gz --out shards/official
    python -m mnistm_dist.pack --download official --out shards/official
    python -m mnistm_dist.pack mnist+photos --mnist DIR --photos DIR --out DIR
    python -m mnistm_dist.pack my_images --resize 64 --out shards/mine

PNGs of 8-bit RGB are kept byte for byte, other images converted. The new folder
appears complete or not at all; shards/README.md describes its files.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeInt, PositiveInt
from tyro.conf import arg

from mnistm_dist.cli import command, write_result
from mnistm_dist.config import LocalFile, LocalPath, OrNone, checked
from mnistm_dist.errors import UserError, run_cli

if TYPE_CHECKING:
    from mnistm_dist.data.manifest import Manifest


@checked
@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """Images made from MNIST's digits and colour photos.

    Args:
        mnist: For mnist+photos and pickles: folder of MNIST's four IDX files. auto: download them.
        photos: For mnist+photos: folder of colour photos.
        blends: For mnist+photos and sample: training images per digit, each over another patch.
    """

    mnist: OrNone[LocalPath] = None
    photos: OrNone[LocalPath] = None
    blends: Annotated[int, Field(ge=1, le=1_000)] = 1


@checked
@dataclass(frozen=True, kw_only=True)
class Target:
    """The packed set.

    Args:
        out: The new folder (required).
        split_size: How many of the last train images become val. none: as the source defines, or a tenth.
        resize: Scale the short side to this many pixels and crop the centre. none: all images have one size.
        num_shards: Shards of the train split; fewer if it has fewer images.
        seed: Seed of the order of storage and of synthesis.
    """

    out: Annotated[LocalFile | None, arg(metavar="DIR")] = None
    split_size: OrNone[PositiveInt] = None
    resize: OrNone[Annotated[int, Field(ge=8, le=1024)]] = None
    num_shards: PositiveInt = 64
    seed: NonNegativeInt = 0


@command
def main(
    source: Annotated[LocalPath | None, arg(metavar="SOURCE")] = None,
    /,
    *,
    target: Target,
    synthesis: Synthesis,
    layout: OrNone[str] = None,
    download: Annotated[str | None, arg(metavar="official|URL")] = None,
    cache_dir: OrNone[LocalFile] = None,
    layouts: bool = False,
) -> int:
    """Pack a source.

    Args:
        source: sample, mnist+photos, or a path in a known layout.
        layout: Input layout. none: detected.
        download: Instead of SOURCE: official, or the URL of a copy. The official set is verified by checksum.
        cache_dir: Folder for downloads. none: the same as in training.
        layouts: List the known layouts, and exit.
    """
    if layouts:
        from mnistm_dist.data.sources.catalog import KNOWN_LAYOUTS

        width = max(map(len, KNOWN_LAYOUTS))
        write_result("".join(f"{name:{width}}  {structure}\n" for name, structure in KNOWN_LAYOUTS.items()))
        return 0
    if (source is None) == (download is None):
        raise UserError("either SOURCE or --download official is needed, and not both")
    if target.out is None:
        raise UserError("--out: none is named; name the new folder of the packed set")

    from mnistm_dist.data.cache import choose_cache_dir
    from mnistm_dist.data.packing.writer import pack
    from mnistm_dist.data.sources.catalog import open_source
    from mnistm_dist.data.sources.download import download as fetch
    from mnistm_dist.files import refuse_existing
    from mnistm_dist.reporting.console import Console
    from mnistm_dist.reporting.describe import listed

    refuse_existing(target.out)  # before anything long begins
    started = time.monotonic()
    console = Console()
    cache = choose_cache_dir(cache_dir)
    if download is not None:
        with console.progress("download", None, "bytes") as bar:
            source = str(fetch(download, cache, progress=bar, say=console.line))
    try:
        opened = open_source(str(source), layout=layout, seed=target.seed, cache_dir=cache, **vars(synthesis))
        for note in opened.notes:
            console.warn(note)
        with console.progress("pack", sum(opened.counts.values()), "images") as bar:
            manifest = pack(
                opened,
                target.out,
                num_shards=target.num_shards,
                val_size=target.split_size,
                resize=target.resize,
                seed=target.seed,
                lineage=None if download is None else "official",
                progress=bar,
            )
    except UserError as error:
        if download is None:
            raise
        raise UserError(
            f"{error}; if the download is damaged, remove it with rm -r {shlex.quote(str(source))}"
        ) from error
    for note in manifest.notes[len(opened.notes) :]:
        console.warn(note)
    counts = manifest.splits["train"].class_counts
    if empty := [name for name, count in zip(manifest.classes, counts, strict=True) if not count]:
        console.warn(f"{len(empty):,} classes have no image in train: {listed(empty)}")
    rows = _summary(manifest, time.monotonic() - started)
    console.header(f"packed: {target.out}", rows | _advice(manifest, f"--shards {shlex.quote(str(target.out))}"))
    return 0


def _summary(manifest: Manifest, seconds: float) -> dict[str, str]:
    height, width = manifest.image_size
    return {
        "lineage": manifest.lineage,
        "from": f"{manifest.description} ({manifest.layout})",
        "images": f"{height} x {width}",
        "classes": f"{len(manifest.classes):,}: {', '.join(manifest.classes[:10])}"
        + ", ..." * (len(manifest.classes) > 10),
        **{name: f"{split.count:,} images in {len(split.shards)} shards" for name, split in manifest.splits.items()},
        **{f"pixels of {group}": digest for group, digest in manifest.pixels_sha256.items()},
        "took": f"{seconds:.1f} s",
    }


def _advice(manifest: Manifest, shards: str) -> dict[str, str]:
    """Return the commands that train on the set. Inverted colours are a symmetry of MNIST-M alone."""
    command = "python -m mnistm_dist.train --recipe"
    if manifest.lineage != "unknown":
        return {"train by": f"{command} fast {shards}"}
    digits = f"{command} fast --invert 0 {shards}"
    if manifest.layout == "idx":
        return {"train by": digits}
    return {"train photos by": f"{command} images {shards}", "digits, text by": digits}


if __name__ == "__main__":
    sys.exit(run_cli(main))
