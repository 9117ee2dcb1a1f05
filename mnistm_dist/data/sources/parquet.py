"""Parquet as on the Hugging Face hub: `data/train-*.parquet`, `data/test-*.parquet`; image {bytes, path}, label int."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mnistm_dist.data.sources.archives import MAX_IMAGE_BYTES, check_expansion, check_size
from mnistm_dist.data.sources.arrays import need_library, reading
from mnistm_dist.data.sources.base import CLASSES, Sample, Source
from mnistm_dist.errors import UserError

_BATCH = 16
"""Rows that are unpacked together: a few bytes of a file can stand for one large image in each of them."""
_BUFFER = 1 << 20
_IMAGE_TYPES = ("binary", "large_binary")
_LABEL_TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def open_parquet(files: Mapping[str, Sequence[Path]]) -> Source:
    """Opens the parquet files of each split, in the order given; images are read batch by batch.

    The column `image` is a struct with the field `bytes`, or binary itself; `label` is integer. Raises UserError for
    other columns, an empty cell, and a damaged file. Needs pyarrow.
    """
    need_library("pyarrow.parquet", "parquet")
    counts = {split: sum(_rows(file) for file in parts) for split, parts in files.items()}
    names = [file for parts in files.values() for file in parts]
    return Source(
        layout="parquet",
        description=f"{names[0].parent}, {len(names)} parquet files",
        counts=counts,
        read=partial(_read, files),
    )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Without a buffer it holds a whole row group's images at once.
    with reading(str(file), "parquet", pa.ArrowException), pq.ParquetFile(file, buffer_size=_BUFFER) as opened:
        yield opened


def _rows(file: Path) -> int:
    import pyarrow as pa

    with _opened(file) as opened:
        schema = opened.schema_arrow
        kinds = {name: schema.field(name).type for name in schema.names}
        image, label = kinds.get("image"), kinds.get("label")
        if image is not None and pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
            image = image.field("bytes").type
        if str(image) not in _IMAGE_TYPES or str(label) not in _LABEL_TYPES:
            found = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
            needed = "needed are image, a struct with bytes, and label, an integer"
            raise UserError(f"{file}: columns {found[:120]}; {needed}")
        groups = (opened.metadata.row_group(number) for number in range(opened.metadata.num_row_groups))
        check_expansion(str(file), file.stat().st_size, sum(group.total_byte_size for group in groups))
        return int(opened.metadata.num_rows)


def _read(files: Mapping[str, Sequence[Path]]) -> Iterator[Sample]:
    for split, parts in files.items():
        index = 0
        for file in parts:
            with _opened(file) as opened:
                for row, (image, label) in enumerate(_cells(opened)):
                    yield _sample(split, index, image, label, f"{file}: row {row}")
                    index += 1


def _cells(opened: Any) -> Iterator[tuple[Any, int | None]]:
    """Image and label of each row, the image as a scalar of pyarrow, whose bytes are not copied yet."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for batch in opened.iter_batches(batch_size=_BATCH, columns=["image", "label"]):
        images = batch.column("image")
        if pa.types.is_struct(images.type):
            images = pc.struct_field(images, "bytes")
        yield from zip(images, batch.column("label").to_pylist(), strict=True)


def _sample(split: str, index: int, image: Any, label: int | None, origin: str) -> Sample:
    if image.is_valid:
        check_size(origin, image.as_buffer().size, MAX_IMAGE_BYTES)
    png = image.as_py()
    if png is None:
        raise UserError(f"{origin}: no bytes of an image; parquet that only names files elsewhere is not accepted")
    if label is None:
        raise UserError(f"{origin}: no label; accepted are 0 to {len(CLASSES) - 1}")
    return Sample(split=split, index=index, label=label, png=png, origin=origin)
