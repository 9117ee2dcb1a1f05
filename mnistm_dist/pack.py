"""Pack a set of labelled images into shards to train on.

    python -m mnistm_dist.pack sample --out shards/sample
    python -m mnistm_dist.pack mnist_m.tar.gz --out shards/official
    python -m mnistm_dist.pack mnist+photos --mnist DIR --photos DIR --out shards/regenerated
    python -m mnistm_dist.pack --download official --out shards/official

PNGs are kept byte for byte. The new folder is complete or not there. shards/README.md describes its contents.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnistm_dist.cli import ArgumentParser, integer, write_result
from mnistm_dist.errors import UserError, run_cli

if TYPE_CHECKING:
    from mnistm_dist.data.manifest import Manifest
    from mnistm_dist.reporting.console import Console


class ShowLayouts(argparse.Action):
    """Prints every layout with its structure, and ends the door, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from mnistm_dist.data.sources.detect import KNOWN_LAYOUTS

        width = max(map(len, KNOWN_LAYOUTS))
        write_result("".join(f"{name:{width}}  {structure}\n" for name, structure in KNOWN_LAYOUTS.items()))
        parser.exit()


def main(argv: list[str]) -> int:
    """Run the command and return its exit code. Raises `UserError`."""
    parser = ArgumentParser(prog="python -m mnistm_dist.pack", description=__doc__)
    parser.add_argument(
        "source", metavar="SOURCE", nargs="?", help="sample, mnist+photos, or a path in any layout that is known"
    )
    parser.add_argument(
        "--download",
        metavar="official|URL",
        help="in place of SOURCE: fetch the official set, from a public copy or from one at URL; its pixels prove it",
    )
    parser.add_argument("--cache-dir", metavar="DIR", type=Path, help="where downloads lie (as in training)")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the new folder of the packed set")
    parser.add_argument("--layout", help="the layout of a path; told by looking without it")
    parser.add_argument("--layouts", action=ShowLayouts, nargs=0, help="show every layout that is known, and exit")
    parser.add_argument(
        "--mnist",
        metavar="DIR",
        help="MNIST's four IDX files, or auto to download them; for mnist+photos and for pickles",
    )
    parser.add_argument("--photos", metavar="DIR", help="colour photos, for mnist+photos")
    parser.add_argument(
        "--blends",
        metavar="N",
        type=integer(1, 1_000),
        help="training images made of each digit, each over another patch, for mnist+photos and sample (1)",
    )
    parser.add_argument(
        "--split-size", metavar="N", type=integer(1), help="how many of the last train images become val"
    )
    parser.add_argument("--num-shards", metavar="N", type=integer(1), default=64, help="shards of the train split (64)")
    parser.add_argument(
        "--seed", metavar="N", type=integer(0), default=0, help="of the order of storage and of synthesis (0)"
    )
    args = parser.parse_args(argv)
    if (args.source is None) == (args.download is None):
        parser.error("either SOURCE or --download official is needed, and not both")

    from mnistm_dist.data.cache import choose_cache_dir
    from mnistm_dist.data.sources.download import download
    from mnistm_dist.files import refuse_existing
    from mnistm_dist.reporting.console import Console

    refuse_existing(args.out)  # before anything that takes long
    started = time.monotonic()
    console = Console()
    cache_dir = choose_cache_dir(args.cache_dir)
    path = args.source
    if args.download is not None:
        with console.progress("download", None, "bytes") as bar:
            path = str(download(args.download, cache_dir, progress=bar, say=console.line))
    try:
        manifest = _pack(path, args, cache_dir, console)
    except UserError as error:
        if args.download is None:
            raise
        command = f"python -m mnistm_dist.cache clear {Path(path).relative_to(cache_dir).parts[1]}"
        if args.cache_dir is not None:
            command += f" --cache-dir {cache_dir}"
        raise UserError(f"{error}; if the download is wrong, remove it with {command}, and run this again") from error
    console.header(f"packed: {args.out}", _summary(manifest, time.monotonic() - started))
    return 0


def _pack(path: str, args: argparse.Namespace, cache_dir: Path, console: Console) -> Manifest:
    from mnistm_dist.data.packing.writer import pack
    from mnistm_dist.data.sources.catalog import open_source

    source = open_source(
        path,
        layout=args.layout,
        mnist=args.mnist,
        photos=args.photos,
        blends=args.blends,
        seed=args.seed,
        cache_dir=cache_dir,
    )
    for note in source.notes:
        console.warn(note)
    with console.progress("pack", sum(source.counts.values()), "images") as bar:
        return pack(
            source,
            args.out,
            num_shards=args.num_shards,
            val_size=args.split_size,
            seed=args.seed,
            lineage=None if args.download is None else "official",
            progress=bar,
        )


def _summary(manifest: Manifest, seconds: float) -> dict[str, str]:
    height, width = manifest.image_size
    rows = {
        "lineage": manifest.lineage,
        "from": f"{manifest.description} ({manifest.layout})",
        "images": f"{height} x {width}, {len(manifest.classes)} classes",
    }
    for split in manifest.splits.values():
        rows[split.name] = f"{split.count:,} images in {len(split.shards)} shards"
    for group, digest in manifest.pixels_sha256.items():
        rows[f"pixels of {group}"] = digest
    return {**rows, "took": f"{seconds:.1f} s"}


if __name__ == "__main__":
    sys.exit(run_cli(main))
