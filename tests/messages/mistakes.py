"""Every mistake that a person can make on one machine without a GPU: a command, and what was wrong before it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from places import (
    ALPHA,
    BROKEN,
    CHECKPOINT,
    GREY,
    IMAGE,
    LABELS,
    LARGE,
    OTHER_SIZE,
    PARTS,
    Evil,
    Preparation,
    add,
    archive,
    bomb,
    both,
    cut,
    document,
    flip,
    held,
    image,
    manifest,
    npz,
    npz_set,
    pickled,
    remove,
    tar_with_link,
    twice_in_a_tar,
    write,
    zip_with_password,
)

Mistakes = dict[str, Preparation | None]
"""Command -> what is done before it, by the person or by fate. A word after ``#`` tells alike commands apart."""


def first_shard(value: dict) -> dict:
    return value["splits"]["train"]["shards"][0]


PACK: Mistakes = {
    "pack": None,
    "pack sample": None,
    "pack sample --download official --out new": None,
    "pack nowhere --out new": None,
    "pack source --out set": None,
    "pack source --out new --layout wrong": None,
    "pack sample --out new --layout pt": None,
    "pack source --out new --layout parquet": None,
    "pack source --out new --photos photos": None,
    "pack source --out new --mnist mnist": None,
    "pack source --out new --blends 2": None,
    "pack sample --out new --blends 0": None,
    "pack sample --out new --mnist mnist": None,
    "pack mnist+photos --out new": None,
    "pack mnist+photos --mnist nowhere --photos photos --out new": None,
    "pack mnist+photos --mnist mnist --photos nowhere --out new": None,
    "pack mnist+photos --mnist mnist --photos empty --out new": None,
    "pack mnist+photos --mnist mnist --photos photos --out new  # labels missing": remove(
        "mnist/train-labels-idx1-ubyte"
    ),
    "pack mnist+photos --mnist mnist --photos photos --out new  # cut": cut("mnist/train-images-idx3-ubyte"),
    "pack mnist+photos --mnist mnist --photos photos --out new  # text": write("mnist/train-images-idx3-ubyte", "text"),
    "pack mnist+photos --mnist mnist --photos photos --out new  # no gzip": both(
        remove("mnist/train-images-idx3-ubyte"), write("mnist/train-images-idx3-ubyte.gz", b"\x1f\x8b\x08cut")
    ),
    "pack source --out new --split-size 99": None,
    "pack source --out new --split-size many": None,
    "pack source --out new --num-shards 0": None,
    "pack source --out new --seed -1": None,
    "pack source --out notes.txt/new": None,
    "pack source --out /dev/null/new": None,
    "pack empty --out new": None,
    "pack notes.txt --out new": None,
    "pack set --out new": None,
    "pack mnist --out new": None,
    "pack page.html --out new": write("page.html", "<!DOCTYPE html><html>"),
    "pack lfs --out new": write("lfs", "version https://git-lfs.github.com/spec/v1\n"),
    "pack nothing --out new": write("nothing", ""),
    "pack bytes --out new": write("bytes", bytes(range(1, 20))),
    "pack --download official2 --out new": None,
    "pack --download ftp://server/set --out new": None,
    "pack source --out new  # two sets": both(
        npz_set, lambda: shutil.copytree("npz", "source/mnist_m", dirs_exist_ok=True)
    ),
}
OFFICIAL: Mistakes = {
    f"pack source --out new  # {name}": preparation
    for name, preparation in {
        "no labels": remove(LABELS),
        "an image is gone": remove(IMAGE),
        "a label is gone": write(LABELS, "00000001.png 1\n"),
        "a label twice": add(LABELS, "00000000.png 1\n"),
        "a label of 10": add(LABELS, "00000006.png 10\n"),
        "a line of one word": add(LABELS, "00000006.png\n"),
        "labels in binary": write(LABELS, b"\xff\xfe"),
        "a foreign file": write("source/mnist_m/mnist_m_train/a.txt", ""),
        "not a PNG": image(b"\xff\xd8\xff\xe0 a JPEG, from its first bytes on"),
        "grey": image(GREY),
        "with alpha": image(ALPHA),
        "too large": image(LARGE),
        "another size": image(OTHER_SIZE),
        "cut short": image(BROKEN),
        "empty": image(b""),
        "one byte changed": flip(IMAGE),
        "a link to a folder": both(remove(IMAGE), lambda: Path(IMAGE).symlink_to("/dev/null")),
    }.items()
}
ARCHIVES: Mistakes = {
    "pack set.tar.gz --out new  # cut": both(archive("set.tar.gz"), cut("set.tar.gz")),
    "pack set.tar.gz --out new  # damaged": both(archive("set.tar.gz"), flip("set.tar.gz")),
    "pack set.tar.gz --out new  # climbs out": archive("set.tar.gz", ("../evil.png", b"")),
    "pack set.tar --out new  # a link": tar_with_link,
    "pack set.tar --out new  # twice": twice_in_a_tar,
    "pack set.zip --out new  # cut": both(archive("set.zip"), cut("set.zip")),
    "pack set.zip --out new  # damaged": both(archive("set.zip"), flip("set.zip")),
    "pack set.zip --out new  # password": zip_with_password,
    "pack set.zip --out new  # bomb": bomb,
    "pack train.npz --out new  # no labels": npz(labels=None),
    "pack train.npz --out new  # floats": npz(images=PARTS["train"].images / 255),
    "pack train.npz --out new  # too few labels": npz(labels=PARTS["train"].labels[1:]),
    "pack train.npz --out new  # a label of 10": npz(labels=PARTS["train"].labels + 5),
    "pack train.npz --out new  # not one-hot": npz(labels=np.ones((6, 10), int)),
    "pack train.npz --out new  # no images": npz(images=PARTS["train"].images[:0], labels=PARTS["train"].labels[:0]),
    "pack test.npz --out new": both(npz_set, lambda: shutil.copy("npz/test.npz", "test.npz")),
    "pack arrays.npz --out new": both(npz(), lambda: shutil.move("train.npz", "arrays.npz")),
    "pack set.pkl --out new": pickled({"train": PARTS["train"].images}),
    "pack set.pkl --mnist mnist --out new  # a program": pickled({"train": Evil()}),
    "pack set.pkl --mnist mnist --out new  # cut": write("set.pkl", b"\x80\x04\x95"),
    "pack set.pkl --mnist mnist --out new  # too few labels of MNIST": both(
        write("mnist/train-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x01\x05"), pickled({"train": PARTS["train"].images})
    ),
    "pack set.pkl --mnist mnist --out new  # a label of MNIST": both(
        write("mnist/train-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x06\1\2\3\4\5\x63"),
        pickled({"train": PARTS["train"].images}),
    ),
    "pack set.pkl --mnist mnist --out new  # a list": pickled([1]),
    "pack set.pkl --mnist mnist --out new  # other keys": pickled({"a": PARTS["train"].images}),
    "pack set.pkl --mnist mnist --out new  # val": pickled({"val": PARTS["train"].images}),
    "pack set.pkl --mnist mnist --out new  # too few": pickled({"train": PARTS["train"].images[:2]}),
    "pack set.mat --out new  # 7.3": write("set.mat", "MATLAB 7.3 MAT-file"),
    "pack set.mat --out new  # cut": write("set.mat", "MATLAB 5.0 MAT-file".ljust(126).encode() + b"IM\x0e\0\0\0\xff"),
    "pack set_train.pt --out new  # no tensors": write("set_train.pt", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."),
    "pack set.h5 --out new  # cut": write("set.h5", b"\x89HDF\r\n\x1a\n cut"),
    "pack train.parquet --out new  # cut": write("train.parquet", b"PAR1 cut"),
    "pack course --out new  # columns": write("course/train.csv", "file,class\n"),
    "pack course --out new  # no image": write("course/train.csv", "image_name,label\na.png,1\n"),
    "pack course --out new  # named twice": both(
        write("course/train.csv", "image_name,label\na.png,1\na.png,1\n"), write("course/a.png", b"")
    ),
    "pack course --out new  # no CSV": write("course/train.csv", 'image_name,label\n"a.png,1\n'),
    "pack course --out new --split-size 1": both(
        write("course/train.csv", "image_name,label\na.png,1\n"),
        write("course/val.csv", "image_name,label\nb.png,1\n"),
        write("course/a.png", b""),
        write("course/b.png", b""),
    ),
    "pack course --out new  # a cell too many": write("course/train.csv", "image_name,label\na.png,1,2\n"),
    "pack folders --out new  # a foreign class": both(
        write("folders/train/3/x.png", b""), write("folders/train/ten/x.png", b"")
    ),
    "pack folders --out new  # a split twice": both(
        write("folders/train/3/x.png", b""), write("folders/training/3/x.png", b"")
    ),
}
SETS: Mistakes = {
    "verify": None,
    "verify nowhere": None,
    "verify empty": None,
    "verify notes.txt": None,
    "verify set  # cut": cut("set/train-000000.tar"),
    "verify set  # changed": flip("set/train-000000.tar"),
    "verify set  # missing": remove("set/val-000000.tar"),
    "verify set  # extra": write("set/extra.tar", b""),
    "verify set  # no JSON": write("set/manifest.json", "{"),
    "verify set  # a list": write("set/manifest.json", "[]"),
    "verify set  # version": manifest(lambda value: value.update(format_version=2)),
    "verify set  # climbs out": manifest(lambda value: first_shard(value).update(name="../x.tar")),
    "verify set  # named twice": manifest(lambda value: first_shard(value).update(name="val-000000.tar")),
    "verify set  # count": manifest(lambda value: first_shard(value).update(count=1_000)),
    "verify set  # a field": manifest(lambda value: value.update(more=1)),
    "verify set  # no split": manifest(lambda value: value.update(splits={}, pixels_sha256={})),
    "verify set  # lineage": manifest(lambda value: value.update(lineage="mine")),
    "verify set  # changed by hand": manifest(lambda value: value.update(seed=5), signed=False),
    "plan --step 0": None,
    "plan --shards set --run run --step 0": None,
    "plan --shards set --step -1": None,
    "plan --shards set --step 0 --world-size 0": None,
    "plan --shards set --step 0 --save batch.gif": None,
    "plan --shards set --step 0 --save nowhere/batch.png": None,
    "plan --shards set --step 0 --world-size 3": None,
    "plan --run nowhere --step 0": None,
    "plan --run empty --step 0": None,
    "plan --run run --step 0 --seed 1": None,
    "plan --run run --step 1000000": None,
    "plan --shards set --step 0 --batch-size 4  # index": cut("set/train.index.npy"),
    "plan --shards set --step 0 --batch-size 4 --save x.png  # shards": cut("set/train-000000.tar"),
    "plan --shards set --step 0 --order sideways": None,
    "plan --shards ftp://server/set --step 0": None,
    "plan --shards https://user:word@server/set --step 0": None,
    "cache": None,
    "cache clear nothing --cache-dir cache": None,
}
FLAGS: Mistakes = {
    f"train {flags}": preparation
    for flags, preparation in {
        "--no-such-flag": None,
        "--epochs": None,
        "--epochs ten": None,
        "--epochs 0": None,
        "--rotate 999": None,
        "--optimizer lion": None,
        "--image-size 32,x": None,
        "--precision int8": None,
        "--recipe nowhere": None,
        "--recipe own.yaml  # no YAML": write("own.yaml", "data: ["),
        "--recipe own.yaml  # an alias": write("own.yaml", "data: &a {window: 3}\naugment: *a\n"),
        "--recipe own.yaml  # nested": write("own.yaml", "data: " + 30 * "[" + 30 * "]"),
        "--recipe own.yaml  # a date": write("own.yaml", "data: {shards: 2024-13-45}"),
        "--recipe own.yaml  # a program": write("own.yaml", "!!python/object/apply:os.system ['touch evil']"),
        "--recipe own.yaml  # a list": write("own.yaml", "[1]"),
        "--recipe own.yaml  # section": write("own.yaml", "optimiser: {}"),
        "--recipe own.yaml  # field": write("own.yaml", "optim: {learning-rate: 1}"),
        "--recipe own.yaml  # no fields": write("own.yaml", "optim: 3"),
        "--recipe own.yaml  # value": write("own.yaml", "optim: {warmup: 2}"),
        "--recipe empty": None,
        "--shards nowhere": None,
        "--shards empty": None,
        "--shards set --batch-size 4  # cut": cut("set/train-000000.tar"),
        "--shards set --batch-size 4  # changed": flip("set/train-000000.tar"),
        "--shards set --batch-size 1": None,
        "--shards set --batch-size 4 --micro-batch 3": None,
        "--shards set --batch-size 4 --order full --reader streaming": None,
        "--shards set --batch-size 4 --order windowed --shuffle-streams 3": None,
        "--shards set --batch-size 4 --cache-dir notes.txt": None,
        "--shards set --expect-world-size 2": None,
        "--shards set --sync-batchnorm": None,
        "--shards set --precision fp16": None,
        "--shards set --signals SIGKILL": None,
        "--shards set --run-dir run": None,
        "--shards set --batch-size 4 --run-dir notes.txt/run": None,
        "--shards set  # no train": manifest(lambda value: value["splits"].pop("train")),
        "--resume auto": None,
        "--resume nowhere": None,
        "--resume run --run-dir other": None,
        "--resume run/checkpoints/step-00000099": None,
        "--resume run --learning-rate 9  # not finished": write("run/state.json", "{}"),
        "--resume run --cache-dir cache  # another set": both(
            write("run/state.json", "{}"),
            document(f"{CHECKPOINT}/state.json", lambda d: d["scalars"].update(shards="x")),
        ),
        "--resume run --cache-dir cache  # changed": both(
            write("run/state.json", "{}"), document(f"{CHECKPOINT}/state.json", lambda d: d["scalars"].pop("past"))
        ),
        "--resume run  # no configuration": both(write("run/state.json", "{}"), write("run/config.yaml", "data: 3")),
        f"--resume {CHECKPOINT}  # torn": flip(f"{CHECKPOINT}/model.safetensors"),
        f"--resume {CHECKPOINT}  # no state": remove(f"{CHECKPOINT}/state.json"),
        f"--resume {CHECKPOINT}  # version": document(f"{CHECKPOINT}/state.json", lambda d: d.update(format=9)),
    }.items()
}
RUNS: Mistakes = {
    "evaluate": None,
    "evaluate nowhere": None,
    "evaluate run --split train": None,
    "evaluate run --shards nowhere": None,
    "evaluate run --checkpoint nowhere": None,
    "evaluate run --checkpoint best  # never evaluated": document(
        f"{CHECKPOINT}/state.json", lambda d: d["scalars"]["past"].update(best=None)
    ),
    "evaluate run  # held": held,
    "evaluate run  # no checkpoint": remove(CHECKPOINT),
    "evaluate run  # torn": flip(f"{CHECKPOINT}/model.safetensors"),
    "evaluate run --split test  # none": manifest(
        lambda value: (value["splits"].pop("test"), value["pixels_sha256"].pop("test"))
    ),
    "predict run": None,
    "predict nowhere digit.png": None,
    "predict run nowhere.png": None,
    "predict run notes.txt": None,
    "predict run empty": None,
    "predict run broken.png": write("broken.png", BROKEN[:60]),
    "predict run digit.png --batch-size 0": None,
    "predict run digit.png --batch-size ten": None,
    "predict run digit.png --json --csv": None,
    "predict run digit.png --checkpoint nowhere": None,
    "predict run digit.png  # no checkpoint": remove("run/checkpoints"),
    "report": None,
    "report nowhere": None,
    "report empty": None,
    "report run run": None,
    "predict run grey.tiff": lambda: Image.fromarray(np.full((8, 8), -1, np.int32)).save("grey.tiff"),
    "predict run pipe": lambda: os.mkfifo("pipe"),
    "report run --out nowhere/report.html": None,
    "report run --out empty": None,
    "export run": None,
    "export run --to tflite --out model": None,
    "export run --to torch --out empty": None,
    "export run --to torch --out notes.txt": None,
    "export nowhere --to torch --out model.pt2": None,
    "export run --to torch --out notes.txt/model.pt2": None,
}
BENCH: Mistakes = {
    "bench": None,
    "bench nothing": None,
    "bench loader --rounds 0": None,
    "bench loader --seconds -1": None,
    "bench loader --json nowhere/x.json": None,
    "bench loader --shards set --only nothing": None,
    "bench loader --shards nowhere": None,
    "bench ranks --processes 1,1": None,
    "bench recipe --recipe fast,fast": None,
    "bench recipe --accuracy 2": None,
    "bench step --recipe nowhere --shards set": None,
}
ALL: dict[str, Mistakes] = {
    "Pack": PACK,
    "Pack: the official layout": OFFICIAL,
    "Pack: archives and arrays": ARCHIVES,
    "Verify, plan and cache": SETS,
    "Train": FLAGS,
    "Evaluate, predict, report and export": RUNS,
    "Bench": BENCH,
}
CANNOT_BE_SHOWN = (
    "more processes than GPUs; a process group that cannot join; a head node that cannot be reached; a world that the "
    "launcher made of another size (two machines, or GPUs)",
    "a server that refuses, cuts, sends another file or too much (tests/test_remote.py and test_download.py make each)",
    "a disk that is full or read-only; a cache that belongs to another user; a file system without locks "
    "(tests/test_cache.py, tests/test_run_folder.py)",
    "a run folder or a pack that another process holds (tests/test_run_folder.py, tests/test_staging.py)",
    "a loss that is no number (tests/test_train.py)",
    "a package that is not installed: h5py, pyarrow, s3fs, onnx",
)
"""What is not in the list, since it needs another machine, another process or chance."""
