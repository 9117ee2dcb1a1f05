"""Files of columns: parquet, as on the Hugging Face hub, and Arrow, as `Dataset.save_to_disk` writes it.

They are read in batches of rows. Class names come from the schema, where `datasets` keeps them.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mnistm_dist.data.image_io import explain_decode_errors
from mnistm_dist.data.sources.archives import Tree, check_expansion, check_size
from mnistm_dist.data.sources.base import (
    IMAGE_NAMES,
    LABEL_NAMES,
    NoLabelsError,
    Table,
    choose,
    list_some,
    parse_labels,
    split_of,
)
from mnistm_dist.errors import UserError, import_optional

_ROWS = 16  # decoded together: a few bytes of a file can stand for one large image in each of them


def open_columns(layout: str, tree: Tree, files: Sequence[str]) -> tuple[list[Table], tuple[str, ...]]:
    """Return a table of each file of a set, and notes.

    A column of images is a struct with the field `bytes`, or binary; a column of labels has whole numbers or text.
    Raises `UserError` for other columns, an empty cell and a damaged file. Needs pyarrow.
    """
    tables, notes = [], dict[str, None]()
    for file in files:
        origin, path = tree.origin(file), tree.local(file)
        with _opened(layout, path, origin) as opened:
            schema = opened.schema_arrow if layout == "parquet" else opened.schema
            types = {name: str(schema.field(name).type) for name in schema.names}
            of_images = [n for n, kind in types.items() if "bytes: " in kind or kind in ("binary", "large_binary")]
            of_labels = [
                n for n, kind in types.items() if "int" in kind.split("<")[0] or "string" in kind.split("<")[0]
            ]
            of_labels += [n for n, kind in types.items() if kind.startswith("dictionary<values=string")]
            image, label = choose(of_images, IMAGE_NAMES), choose(of_labels, LABEL_NAMES)
            if image is None or label is None:
                found = ", ".join(f"{name} {kind}" for name, kind in types.items())[:120]
                raise NoLabelsError(
                    f"{origin}: columns {found}; expected image, a struct with bytes, and label, an integer or text: "
                    "rename its columns so"
                )
            if others := [name for name in types if name not in (image, label)]:
                notes[f"columns {list_some(others)} are left out"] = None
            if layout == "parquet":
                groups = map(opened.metadata.row_group, range(opened.metadata.num_row_groups))
                check_expansion(origin, path.stat().st_size, sum(group.total_byte_size for group in groups))
            batches = _batches(layout, opened, [label])
            cells = [cell for batch in batches for cell in batch.column(0).to_pylist()]
        if None in cells:
            raise UserError(f"{origin}: row {cells.index(None)}: no label; every row needs both")
        are_numbers = all(isinstance(cell, int) for cell in cells)
        labels = np.array(cells, np.int64) if are_numbers else parse_labels(origin, list(map(str, cells)))
        read = partial(_read, layout, path, origin, image)
        names = _class_names(schema, label)
        tables.append(
            Table(origin=origin, labels=labels, splits=split_of(tree.context(file)), classes=names, read=read)
        )
    return tables, tuple(notes)


def _class_names(schema: Any, label: str) -> list[str] | None:
    """Return the names that `datasets` keeps of a column of class numbers, or None."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


@contextmanager
def _opened(layout: str, path: Path, origin: str) -> Iterator[Any]:
    names = ("pyarrow", "pyarrow.parquet", "pyarrow.ipc")
    pa, pq, ipc = (import_optional(name, f"layout {layout}", "formats") for name in names)
    with explain_decode_errors(origin, layout, pa.ArrowException):
        if layout == "parquet":
            # Without a buffer, pyarrow holds the images of a whole row group.
            with pq.ParquetFile(path, buffer_size=1 << 20) as opened:
                yield opened
        else:
            with pa.memory_map(str(path)) as file:
                yield ipc.open_stream(file)


def _batches(layout: str, opened: Any, columns: list[str]) -> Iterator[Any]:
    """Yield batches of `_ROWS` rows or so of some columns."""
    if layout == "parquet":
        yield from opened.iter_batches(batch_size=_ROWS, columns=columns)
    else:
        for batch in opened:
            yield batch.select(columns)


def _read(layout: str, path: Path, origin: str, image: str) -> Iterator[tuple[int, bytes, str]]:
    """Yield the row, the bytes and the origin of each image; a pyarrow scalar's bytes are not copied before."""
    row = 0
    with _opened(layout, path, origin) as opened:
        for batch in _batches(layout, opened, [image]):
            column = batch.column(0)
            if str(column.type).startswith("struct"):
                column = column.flatten()[column.type.get_field_index("bytes")]
            for cell in column:
                where = f"{origin}: row {row}"
                if not cell.is_valid:
                    raise UserError(f"{where}: no image bytes; every row needs both")
                check_size(where, cell.as_buffer().size)
                yield row, cell.as_py(), where
                row += 1
