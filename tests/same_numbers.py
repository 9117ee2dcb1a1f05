"""Prove that two versions of the package train the same numbers, to the last bit.

    python tests/same_numbers.py --before REV|FOLDER [--after REV|FOLDER] [--steps 60] [--pack ARCHIVE]

Each version packs the bundled sample and trains the recipes on it: on the CPU, in fp32, on one thread per process, with
one and with two processes. The loss of every step must be the same float and predictions_val.csv the same bytes. With
--pack, each version packs ARCHIVE too: the keys, labels and pixels of every split must be the same, in storage order.
Prints a table; exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RENAMED = {"--tracker": "--track"}
"""Flags used below -> their name in the first version."""
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--main_process_port", "0"]
TIMEOUT_SECONDS = 3600
CUT = 60
"""Characters of a difference shown in the table."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of the package, and a folder in which its commands run."""

    source: Path
    work: Path

    def __post_init__(self) -> None:
        imported = Path(self.run("-c", "import mnistm_dist; print(mnistm_dist.__file__)").strip())
        assert imported.is_relative_to(self.source.resolve()), f"{self.source}: imported {imported} instead"

    def run(self, *arguments: object) -> str:
        """Run ``python ARGUMENTS`` with this version of the package; return its output. Exit if it fails."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.source),
            "CUDA_VISIBLE_DEVICES": "",
            "WANDB_MODE": "disabled",
            "OMP_WAIT_POLICY": "passive",
        }
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self.work, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
        if done.returncode:
            sys.exit(f"error: {self.source}: {' '.join(command)}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        return done.stdout

    def train(self, recipe: str, *, world_size: int, steps: int) -> dict[str, Any]:
        """Train, and return what must not differ: the loss of each step, and the rows of predictions_val.csv."""
        run_dir = self.work / f"{recipe}-{world_size}"
        flags = ["--recipe", recipe, "--run-dir", run_dir, "--cache-dir", self.work / "cache", "--max-steps", steps]
        flags += ["--threads", 1, "--precision", "fp32", "--log-every", 1, "--no-report", "--tracker", "none"]
        known = self.run("-m", "mnistm_dist.train", "--help")
        command = ["mnistm_dist.train", *(RENAMED[f] if f in RENAMED and f"{f} " not in known else f for f in flags)]
        self.run(*([*LAUNCH, "--num_processes", world_size] if world_size > 1 else []), "-m", *command)
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["world_size"] == world_size, f"{run_dir}: {summary['world_size']} processes"
        rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
        losses = {f"step {row['step']}": row["train/loss"] for row in rows if row["kind"] == "train"}
        assert len(losses) == steps, f"{run_dir}: {len(losses)} steps were logged"
        predictions = (run_dir / "predictions_val.csv").read_bytes().splitlines(keepends=True)
        return {"train/loss": losses, "predictions_val.csv": dict(enumerate(predictions))}

    def pack(self, archive: Path) -> dict[str, Any]:
        """Pack ``archive``, and return the key, label and sum of pixels of every image by split, in storage order."""
        out = self.work / "packed"
        self.run("-m", "mnistm_dist.pack", archive.resolve(), "--out", out)
        result: dict[str, Any] = {"pixels_sha256": json.loads((out / "manifest.json").read_text())["pixels_sha256"]}
        for path in sorted(out.glob("*.tar")):
            images, split = list(read_shard(path)), result.setdefault(path.name.partition("-")[0], {})
            split.update(enumerate(images, start=len(split)))
        return result


def read_shard(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the key, the label and the SHA-256 of the pixels of each image of a shard."""
    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None, f"{path}: {member.name} is not a file"
            members.setdefault(key, {})[suffix] = file.read()
    for key, parts in members.items():
        pixels = np.asarray(Image.open(io.BytesIO(parts["png"])).convert("RGB"))
        yield key, parts["cls"].decode(), hashlib.sha256(pixels.tobytes()).hexdigest()


@contextmanager
def version(name: str, work: Path) -> Iterator[Version]:
    """Give the version in the folder ``name``, or check the commit ``name`` out for the duration of the block."""
    work.mkdir()
    if Path(name).is_dir():
        yield Version(source=Path(name).resolve(), work=work)
        return
    worktree = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*worktree, "add", "--quiet", "--detach", str(work / "source"), name], check=True)
    try:
        yield Version(source=work / "source", work=work)
    finally:
        subprocess.run([*worktree, "remove", "--force", str(work / "source")], check=True)


def compare(title: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Print a line for each quantity of two versions; return whether all are equal."""
    same = True
    for name in sorted({*before, *after}):
        left, right = before.get(name, {}), after.get(name, {})
        differ = [key for key in {**left, **right} if left.get(key) != right.get(key)]
        first = "".join(f"; first: {key}: {left.get(key)!r:.{CUT}} -> {right.get(key)!r:.{CUT}}" for key in differ[:1])
        print(f"{title:28} {name:20} {len(right):>7} compared {len(differ):>7} differ{first}", flush=True)
        same = same and bool(right) and not differ
    return same


def main() -> int:
    """Compare, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, metavar="REV|FOLDER")
    parser.add_argument("--after", default=str(ROOT), metavar="REV|FOLDER", help="default: this checkout")
    parser.add_argument("--steps", type=int, default=60, metavar="N")
    parser.add_argument("--recipes", default="fast,baseline", metavar="NAME,...", help="default: fast,baseline")
    parser.add_argument("--world-sizes", default="1,2", metavar="N,...", help="default: 1,2")
    parser.add_argument("--pack", type=Path, metavar="ARCHIVE")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="same-numbers-") as temporary,
        version(args.before, Path(temporary) / "before") as before,
        version(args.after, Path(temporary) / "after") as after,
    ):
        results = []
        for recipe in filter(None, args.recipes.split(",")):
            for size in map(int, args.world_sizes.split(",")):
                runs = [each.train(recipe, world_size=size, steps=args.steps) for each in (before, after)]
                results.append(compare(f"{recipe}, world size {size}", *runs))
        if args.pack:
            results.append(compare(f"pack {args.pack.name}", *(each.pack(args.pack) for each in (before, after))))
    print("the numbers are the same" if all(results) else "the numbers DIFFER")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
