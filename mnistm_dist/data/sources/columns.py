"""Files of columns: parquet, as on the Hugging Face hub, and Arrow, as `Dataset.save_to_disk` writes it.

They are read in batches of rows. Class names come from the schema, where `datasets` keeps them.
"""

import json
import re
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
    SPLIT_NAMES,
    ImageSet,
    NoLabelsError,
    Table,
    check_labels,
    choose,
    list_some,
    split_of,
)
from mnistm_dist.errors import UserError, import_optional

_ROWS = 16  # decoded together: a few bytes of a file can stand for one large image in each of them


def open_columns(layout: str, tree: Tree, files: Sequence[str]) -> ImageSet:
    """Return a table of each file of a set.

    A column of images is a struct with the field `bytes`, or binary; a column of labels has whole numbers or text; a
    column of splits has text. Raises `UserError` for other columns, an empty cell and a damaged file. Needs pyarrow.
    """
    tables, notes = [], dict[str, None]()
    for file in files:
        origin, path = tree.origin(file), tree.local(file)
        with _opened(layout, path, origin) as opened:
            schema = opened.schema_arrow if layout == "parquet" else opened.schema
            types = {name: str(schema.field(name).type) for name in schema.names}
            of_images = [n for n, kind in types.items() if "bytes: " in kind or kind in ("binary", "large_binary")]
            of_text = [
                n for n, kind in types.items() if re.match(r"(large_)?string|dictionary<values=(large_)?string", kind)
            ]
            of_numbers = [n for n, kind in types.items() if re.match(r"u?int\d", kind)]
            image, label = choose(of_images, IMAGE_NAMES), choose(of_numbers + of_text, LABEL_NAMES)
            if image is None or label is None:
                found = ", ".join(f"{name} {kind}" for name, kind in types.items())[:120]
                raise NoLabelsError(
                    f"{origin}: columns {found}; expected image, a struct with bytes, and label, an integer or text: "
                    "rename its columns so"
                )
            split = choose(of_text, SPLIT_NAMES)
            if others := [name for name in types if name not in (image, label, split)]:
                notes[f"columns {list_some(others)} are left out"] = None
            if layout == "parquet":
                groups = map(opened.metadata.row_group, range(opened.metadata.num_row_groups))
                check_expansion(origin, path.stat().st_size, sum(group.total_byte_size for group in groups))
            wanted = [label] if split is None else [label, split]
            batches = [batch.to_pydict() for batch in _batches(layout, opened, wanted)]
        cells, words = ([cell for batch in batches for cell in batch[name]] for name in (label, wanted[-1]))
        if None in cells:
            raise UserError(f"{origin}: row {cells.index(None)}: no label; every row needs both")
        splits = [split_of(tree.context(file)) if split is None else split_of(str(word)) for word in words]
        if split is not None and None in splits:
            row = splits.index(None)
            raise UserError(f"{origin}: row {row}: split {words[row]!r:.20}; accepted: train, val, test")
        tables.append(
            Table(
                origin=origin,
                labels=check_labels(origin, np.array(cells), len(cells)),
                splits=splits,
                classes=_class_names(schema, label),
                read=partial(_read, layout, tree, file, image),
            )
        )
    place = list_some(list(map(tree.origin, files)))
    return ImageSet(layout=layout, place=place, tables=tables, used=files, notes=list(notes))


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


def _read(layout: str, tree: Tree, file: str, image: str) -> Iterator[tuple[int, bytes, str]]:
    """Yield the row, the bytes and the origin of each image; a pyarrow scalar's bytes are not copied before."""
    row, origin = 0, tree.origin(file)
    with _opened(layout, tree.local(file), origin) as opened:
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
