"""Images with labels as people hold them: everything in a source is used, refused by name or noted."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layouts import Files, noise, refusal, write_folder, write_mnist, write_parquet, write_tar, write_zip
from PIL import Image

from mnistm_dist.data.image_io import encode_png
from mnistm_dist.data.sources.base import Source, split_of
from mnistm_dist.data.sources.catalog import open_source

PARTS = noise({"train": 40, "val": 10, "test": 12})
IMAGES, LABELS = PARTS["train"].images, PARTS["train"].labels
PNG = encode_png(IMAGES[0])


def jpeg(seed: int, size: tuple[int, int] = (30, 20)) -> bytes:
    target = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(target, "JPEG")
    return target.getvalue()


def labels_of(source: Source, split: str = "train") -> list[str]:
    """The class names of the images of a split, in order."""
    samples = sorted((sample.index, sample.label) for sample in source.samples() if sample.split == split)
    return [source.classes[label] for _, label in samples]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train", "train"), ("Training", "train"), ("trn", "train"), ("x_train", "train"), ("trainImages", "train")),
        *(("valid", "val"), ("validation_set", "val"), ("dev", "val"), ("mnist_m_val", "val"), ("valX", "val")),
        *(("test", "test"), ("tst", "test"), ("t10k-images", "test"), ("yTest", "test"), ("testing.csv", "test")),
        *(("trainer", None), ("contest", None), ("validity", None), ("devices", None), ("street", None), ("", None)),
    ],
)
def test_one_vocabulary_names_the_splits(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_folders_of_photos_are_classes_by_name_at_any_depth(tmp_path: Path) -> None:
    files = {f"pets/{animal}/album {n % 2}/{n}.jpg": jpeg(n) for n, animal in enumerate(["cat", "dog", "fish"] * 3)}
    source = open_source(str(write_folder(tmp_path, files)))
    assert (source.layout, source.classes, source.counts) == ("image-folder", ("cat", "dog", "fish"), {"train": 9})
    assert sorted(labels_of(source)) == ["cat"] * 3 + ["dog"] * 3 + ["fish"] * 3


def test_a_class_may_be_named_train(tmp_path: Path) -> None:
    files = {f"{name}/{n}.png": PNG for n, name in enumerate(["bus", "car", "train"])}
    assert open_source(str(write_folder(tmp_path, files))).classes == ("bus", "car", "train")


def test_what_no_reader_uses_is_noted(tmp_path: Path) -> None:
    files: Files = {f"train/{n % 2}/{n}.png": PNG for n in range(4)}
    files |= {"README.md": b"", "train/results.csv": b"epoch,loss\n1,2\n", "train/notes.txt": b"to do\n"}
    (write_folder(tmp_path, files) / "train" / "2").mkdir()
    notes = "; ".join(open_source(str(tmp_path)).notes)
    for name in ("README.md", "train/results.csv", "train/notes.txt", "train/2/"):
        assert name in notes


CSV: dict[str, tuple[str, bytes]] = {
    "common column names": ("labels.csv", b"filename,category\na/1.png,cat\na/2.png,dog\n"),
    "semicolons": ("labels.csv", b"image;label\na/1.png;cat\na/2.png;dog\n"),
    "no header": ("train.csv", b"a/1.png,cat\na/2.png,dog\n"),
    "leading dots": ("labels.csv", b"path,label\n./a/1.png,cat\n./a/2.png,dog\n"),
    "backslashes": ("labels.csv", b"path,label\na\\1.png,cat\na\\2.png,dog\n"),
    "paths of another machine": ("labels.csv", b"path,label\n/home/me/set/a/1.png,cat\n/home/me/set/a/2.png,dog\n"),
    "no suffixes": ("labels.csv", b"id,class\n1,cat\n2,dog\n"),
    "tabs": ("labels.tsv", b"file\tlabel\na/1.png\tcat\na/2.png\tdog\n"),
    "UTF-16": ("labels.csv", "file,label\na/1.png,cat\na/2.png,dog\n".encode("utf-16")),
    "a list": ("train_list.txt", b"a/1.png cat\na/2.png dog\n"),
}


@pytest.mark.parametrize("form", CSV)
def test_a_csv_file_of_any_form_labels_the_images(tmp_path: Path, form: str) -> None:
    name, text = CSV[form]
    source = open_source(str(write_folder(tmp_path, {"a/1.png": PNG, "a/2.png": jpeg(1), name: text})))
    assert (source.layout, source.classes) == ("csv", ("cat", "dog"))
    assert labels_of(source) == ["cat", "dog"]


def test_a_csv_file_may_have_a_column_of_splits(tmp_path: Path) -> None:
    rows = b"image,label,split\n1.png,cat,train\n2.png,dog,validation\n3.png,cat,test\n"
    files = {f"{n}.png": PNG for n in (1, 2, 3)} | {"all.csv": rows}
    source = open_source(str(write_folder(tmp_path, files)))
    assert source.counts == {"train": 1, "val": 1, "test": 1}
    (tmp_path / "all.csv").write_bytes(rows.replace(b"validation", b"extra"))
    assert "line 3: split 'extra'; accepted: train, val, test" in refusal(tmp_path)


def test_a_list_of_a_split_takes_no_image_of_another_split(tmp_path: Path) -> None:
    files = {"train/1.png": PNG, "test/1.png": PNG, "test/2.png": PNG, "train.csv": b"image,label\n1.png,a\n2.png,b\n"}
    assert "train.csv: line 3: 2.png: no such image" in refusal(write_folder(tmp_path, files))


def test_class_names_of_a_file_name_the_numbers(tmp_path: Path) -> None:
    files = {"1.png": PNG, "2.png": PNG, "train.csv": b"image,label\n1.png,1\n2.png,0\n", "classes.txt": b"cat\ndog\n"}
    source = open_source(str(write_folder(tmp_path, files)))
    assert (source.classes, labels_of(source), source.notes) == (("cat", "dog"), ["dog", "cat"], ())


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["0", "2", "1"], ("0", "1", "2")),
        (["0", "3"], ("0", "1", "2", "3")),
        (["3", "1", "2"], ("1", "2", "3")),
        (["7", "70"], ("7", "70")),
        (["two", "zero", "one"], ("zero", "one", "two")),
        (["b", "a", "10"], ("10", "a", "b")),
    ],
)
def test_classes_are_numbers_in_order_or_sorted_names(tmp_path: Path, labels: list[str], classes: tuple[str]) -> None:
    rows = "".join(f"{n}.png,{label}\n" for n, label in enumerate(labels))
    files = {f"{n}.png": PNG for n in range(len(labels))} | {"train.csv": b"image,label\n" + rows.encode()}
    source = open_source(str(write_folder(tmp_path, files)))
    assert source.classes == classes
    assert labels_of(source) == labels


def test_more_classes_than_10_000_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", images=np.zeros((10_001, 1, 1, 3), np.uint8), labels=np.arange(10_001))
    assert "10,001 classes; accepted are 1 to 10,000" in refusal(tmp_path)


def shard(label: str, data: object, count: int = 6, image: str = "webp") -> list[tuple[str, bytes]]:
    members = []
    for n in range(count):
        target = io.BytesIO()
        Image.fromarray(IMAGES[n]).save(target, image, lossless=True)
        text = json.dumps(data).replace("CLASS", "catdog"[n % 2 * 3 :][:3])
        members += [(f"{n:06d}.{image}", target.getvalue()), (f"{n:06d}.{label}", text.strip('"').encode())]
    return members


@pytest.mark.parametrize(
    ("label", "data"),
    [("cls", "CLASS"), ("txt", "CLASS"), ("json", {"label": "CLASS", "width": 28}), ("json", "CLASS")],
)
def test_shards_of_others_are_read_with_labels_of_each_form(tmp_path: Path, label: str, data: object) -> None:
    members = shard(label, data)
    if data == "CLASS" and label == "json":
        members = [(name, f'"{text.decode()}"'.encode() if name.endswith("json") else text) for name, text in members]
    write_tar(tmp_path / "train-000000.tar", [*members, ("000000.pkl", b"cos\nsystem\n(S'touch evil'\ntR.")], "w")
    source = open_source(str(tmp_path))
    assert (source.layout, source.classes, source.counts) == ("webdataset", ("cat", "dog"), {"train": 6})
    assert labels_of(source) == ["cat", "dog"] * 3
    assert any("000000.pkl" in note for note in source.notes)


def test_an_incomplete_shard_or_set_of_shards_is_refused(tmp_path: Path) -> None:
    members = shard("cls", "CLASS")
    for folder, kept, message in (
        ("label", members[:-1], "000005.webp: no label: no .cls beside it; the shard is incomplete"),
        ("image", members[:-2] + members[-1:], "000005.cls: a label without an image; the shard is incomplete"),
    ):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "train-000000.tar", kept, "w")
        assert message in refusal(tmp_path / folder)
    (tmp_path / "gap").mkdir()
    for number in (0, 1, 3):
        write_tar(tmp_path / "gap" / f"train-{number:06d}.tar", members, "w")
    assert "1 parts of this set are missing, the first like train-00002.tar" in refusal(tmp_path / "gap")


def test_a_missing_part_of_parquet_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [{"bytes": PNG, "path": None}], "label": [1]})
    pq.write_table(table, tmp_path / "train-00000-of-00002.parquet")
    assert "parts of this set are missing, the first like train-00001" in refusal(tmp_path)


def test_class_names_of_a_parquet_schema_are_the_classes(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {"label": {"names": ["cat", "dog", "fish"], "_type": "ClassLabel"}}
    schema = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pa.table({"img": [{"bytes": jpeg(n), "path": None} for n in range(2)], "label": [2, 0], "id": ["a", "b"]})
    pq.write_table(table.replace_schema_metadata(schema), tmp_path / "train.parquet")
    source = open_source(str(tmp_path))
    assert (source.classes, labels_of(source)) == (("cat", "dog", "fish"), ["fish", "cat"])
    assert source.notes == ("columns id are left out",)


def test_a_pickle_with_labels_of_its_own_does_not_get_those_of_mnist(tmp_path: Path) -> None:
    content = {b"x_train": IMAGES, b"y_train": [int(label) for label in LABELS], b"meta": IMAGES[0, 0, 0, :2]}
    (tmp_path / "set.pkl").write_bytes(pickle.dumps(content, 2))
    source = open_source(str(tmp_path))
    assert labels_of(source) == [str(label) for label in LABELS]
    assert any("set.pkl: meta" in note for note in source.notes)
    mnist = write_mnist(tmp_path / "mnist", noise())
    assert "are the labels already; leave out --mnist" in refusal(tmp_path / "set.pkl", mnist=str(mnist))


def test_images_without_labels_are_noted_beside_a_set_with_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x_train=IMAGES, y_train=LABELS)
    write_folder(tmp_path, {"samples.png": PNG, "old.pkl": pickle.dumps({"train": IMAGES}, 2)})
    source = open_source(str(tmp_path))
    assert source.layout == "npz"
    assert "samples.png" in " ".join(source.notes)
    assert "old.pkl: train: no labels in it: add --mnist DIR" in " ".join(source.notes)


@pytest.mark.parametrize("words", [("train", "validation", "test"), ("trn", "dev", "tst")])
def test_keys_of_one_file_name_all_splits(tmp_path: Path, words: tuple[str, ...]) -> None:
    import h5py

    with h5py.File(tmp_path / "set.h5", "w") as file:
        for word, part in zip(words, PARTS.values(), strict=True):
            file[f"{word}_images"], file[f"deep/{word}/labels"] = part.images, part.labels
    arrays = {f"X_{word}": part.images for word, part in zip(words, PARTS.values(), strict=True)}
    arrays |= {f"y_{word}": part.labels for word, part in zip(words, PARTS.values(), strict=True)}
    np.savez(tmp_path / "set.npz", **arrays)
    for layout in ("hdf5", "npz"):
        source = open_source(str(tmp_path), layout=layout)
        assert source.counts == {"train": 40, "val": 10, "test": 12}
        assert labels_of(source, "val") == [str(label) for label in PARTS["val"].labels]


def test_a_zip_of_array_files_and_an_archive_in_an_archive_are_read(tmp_path: Path) -> None:
    target = io.BytesIO()
    np.savez(target, images=IMAGES, labels=LABELS)
    write_zip(tmp_path / "arrays.zip", {"data/train.npz": target.getvalue(), "README.txt": b""})
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as outer:
        outer.write(tmp_path / "arrays.zip", "download/arrays.zip")
    for name in ("arrays.zip", "outer.zip"):
        source = open_source(str(tmp_path / name))
        assert labels_of(source) == [str(label) for label in LABELS]
        pixels = {sample.index: sample.pixels for sample in source.samples()}
        np.testing.assert_array_equal(pixels[7], IMAGES[7])


FORMS = {
    "channels first": (IMAGES.transpose(0, 3, 1, 2), "channels first"),
    "floats": ((IMAGES / 255).astype(np.float32), "floats from 0 to 1, times 255"),
    "both": ((IMAGES / 255).transpose(0, 3, 1, 2), "channels first, floats from 0 to 1, times 255"),
}


@pytest.mark.parametrize("form", FORMS)
def test_arrays_of_other_forms_give_the_same_pixels_with_a_note(tmp_path: Path, form: str) -> None:
    array, note = FORMS[form]
    np.savez(tmp_path / "train.npz", images=array, labels=np.eye(10)[LABELS])
    source = open_source(str(tmp_path))
    assert source.notes == (f"images converted to uint8 RGB: {note}",)
    pixels = {sample.index: sample.pixels for sample in source.samples()}
    np.testing.assert_array_equal(np.stack([pixels[n] for n in range(40)]), IMAGES)


def test_a_train_file_and_a_file_without_a_split_are_refused(tmp_path: Path) -> None:
    for name in ("set_train_images", "set_train_labels", "set_images", "set_labels"):
        np.save(tmp_path / f"{name}.npy", IMAGES if "images" in name else LABELS)
    assert "not train, val or test, but other images of" in refusal(tmp_path)


def class_files(split: str, prefix: str = "") -> Files:
    part = PARTS[split]
    return {
        f"{prefix}{label}/{number}.png": encode_png(image)
        for number, (image, label) in enumerate(zip(part.images, part.labels, strict=True))
    }


COUNTS = {"train": 40, "val": 10, "test": 12}
IN_ARCHIVES = {
    "archives in folders of splits": lambda folder, split: (f"{split}/images.zip", class_files(split)),
    "archives named by splits": lambda folder, split: (f"{split}.zip", class_files(split)),
    "a folder of the same name in an archive": lambda folder, split: (f"{split}.zip", class_files(split, f"{split}/")),
    "another name around it": lambda folder, split: (f"pets_{split}.zip", class_files(split, f"pets/{split}/")),
}


@pytest.mark.parametrize("form", IN_ARCHIVES)
def test_splits_are_named_by_archives_and_by_the_folders_around_and_in_them(tmp_path: Path, form: str) -> None:
    for split in PARTS:
        name, files = IN_ARCHIVES[form](tmp_path, split)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_zip(tmp_path / name, files)
    source = open_source(str(tmp_path))
    assert (source.classes, source.counts) == (tuple("0123456789"), COUNTS)
    assert sorted(labels_of(source, "val")) == sorted(map(str, PARTS["val"].labels))


def test_shards_in_folders_of_splits_keep_their_splits(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 4)):
        (tmp_path / split).mkdir()
        write_tar(tmp_path / split / "000000.tar", shard("cls", "CLASS", count), "w")
    assert open_source(str(tmp_path)).counts == {"train": 6, "val": 4}


def test_folders_of_splits_in_folders_of_classes_are_splits(tmp_path: Path) -> None:
    files = {f"{animal}/{split}/{n}.png": PNG for animal in ("cat", "dog") for split in ("train", "test") for n in "12"}
    source = open_source(str(write_folder(tmp_path, files)))
    assert (source.classes, source.counts) == (("cat", "dog"), {"train": 4, "test": 4})


def test_a_list_beside_an_archive_labels_its_images_and_its_other_columns_are_noted(tmp_path: Path) -> None:
    write_zip(tmp_path / "images.zip", {f"images/{n}.png": encode_png(IMAGES[n]) for n in range(3)})
    write_folder(tmp_path, {"labels.csv": b"image,label,weight\n2.png,a\n".replace(b",a", b",a,1")})
    source = open_source(str(tmp_path))
    assert (source.layout, labels_of(source)) == ("csv", ["a"])
    notes = " ".join(source.notes)
    for name in ("columns weight are left out", "images.zip/images/0.png"):
        assert name in notes


def test_an_image_beside_archives_does_not_disturb_them(tmp_path: Path) -> None:
    write_zip(tmp_path / "pets.zip", class_files("train"))
    write_folder(tmp_path, {"preview.png": PNG})
    source = open_source(str(tmp_path))
    assert (source.counts, source.notes) == ({"train": 40}, ("left out: preview.png",))


def test_data_files_in_an_archive_are_read_after_they_were_opened(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set", PARTS)
    write_zip(tmp_path / "set.zip", {file.name: file.read_bytes() for file in folder.rglob("*.parquet")})
    assert labels_of(open_source(str(tmp_path / "set.zip"))) == list(map(str, LABELS))


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_an_empty_folder_in_an_archive_is_noted(tmp_path: Path, write: Callable[[Path, Files], Path]) -> None:
    path = write(tmp_path / "set", {"a/1.png": PNG, "b/2.png": PNG})
    if write is write_zip:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("c/", b"")
            archive.writestr("a/", b"")
    else:
        write_tar(path, {"a/1.png": PNG, "b/2.png": PNG}, "w")
        with tarfile.open(path, "a") as tar:
            for name in ("a", "c"):
                member = tarfile.TarInfo(name)
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
    assert open_source(str(path)).notes == (f"left out: {path.name}/c/",)


def test_a_column_of_splits_in_parquet_is_used(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": PNG, "path": None}] * 3
    columns = {"image": images, "label": [1, 0, 1], "split": ["train", "validation", "test"]}
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    assert open_source(str(tmp_path)).counts == {"train": 1, "val": 1, "test": 1}
    pq.write_table(pa.table({**columns, "split": ["train", "extra", "test"]}), tmp_path / "all.parquet")
    assert "row 1: split 'extra'; accepted: train, val, test" in refusal(tmp_path)


def test_class_names_and_whatever_else_is_in_a_file_of_arrays_are_used_or_noted(tmp_path: Path) -> None:
    import h5py
    from scipy.io import savemat

    names, labels = ["cat", "dog"], LABELS % 2
    savemat(
        tmp_path / "a.mat", {"X": IMAGES, "y": labels, "classes": np.array(names, dtype=object), "note": {"by": "me"}}
    )
    content = {"images": IMAGES, "labels": labels.tolist(), "label_names": names, "note": 3, "more": [{"by": None}]}
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(content))
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["images"], file["labels"], file["list_classes"], file["note"] = IMAGES, labels, names, 3
    for name in ("a.mat", "b.pkl", "c.h5"):
        source = open_source(str(tmp_path / name))
        assert source.classes == ("cat", "dog")
        assert labels_of(source) == [names[label] for label in labels]
        assert f"{name}: note is left out" in " ".join(source.notes)
    assert "b.pkl: more/0/by is left out" in " ".join(open_source(str(tmp_path / "b.pkl")).notes)


def test_labels_that_are_text_in_a_matlab_cell_name_the_classes(tmp_path: Path) -> None:
    from scipy.io import savemat

    texts = np.array(["cat" if label % 2 else "dog" for label in LABELS], dtype=object)
    savemat(tmp_path / "a.mat", {"images": IMAGES, "labels": texts})
    assert labels_of(open_source(str(tmp_path))) == texts.tolist()


@pytest.mark.parametrize("name", ["train/0/1.png", "train-00000-of-00001.parquet", "train.npz", "images.zip"])
def test_a_git_lfs_pointer_in_a_source_is_named(tmp_path: Path, name: str) -> None:
    files: Files = {f"train/{n % 2}/{n}.png": PNG for n in range(4)} if name.endswith(".png") else {}
    write_folder(tmp_path, files | {name: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"})
    assert f"{name}: a Git LFS pointer in place of the file; fetch it with git lfs pull" in refusal(tmp_path)


def test_a_matlab_file_of_another_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "set.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(512))
    assert "MATLAB 7.3; save it with -v7" in refusal(tmp_path)
