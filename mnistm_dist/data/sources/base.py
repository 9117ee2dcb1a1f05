"""A source of labelled images, made of tables, and the one vocabulary of split, image and label names.

A table is what a reader finds in a file or folder: images, each with a label and perhaps a split. `make_source` puts
the tables of a set together: it decides the splits, and names the classes.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mnistm_dist.errors import UserError, escape_control

# Class names of MNIST and of what is made from it.
CLASSES = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
# Split names, in the order in which splits are packed and listed in a manifest.
SPLITS = ("train", "val", "test")
MAX_CLASSES = 10_000
# Images of the training split that Ganin and Lempitsky published, and of its end, which is val here: 55,000 remain.
_OFFICIAL_TRAIN_SIZE, _OFFICIAL_VAL_SIZE = 59_001, 4_001


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One labelled image as its source holds it: the bytes of an image file, or pixels."""

    split: str
    """`train`, `val` or `test`."""
    index: int
    """Position within its split, 0 to n - 1, in the source's order. Samples may be read in any order."""
    label: int
    """Index into the classes of the source."""
    encoded: bytes | None = None
    """The source's own image file, unchanged and not yet checked; None if the source holds pixels."""
    pixels: np.ndarray | None = None
    """uint8 (height, width, 3), RGB; None if the source holds image files."""
    origin: str
    """`FILE: MEMBER`, for messages."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A set of labelled images on disk: opened and indexed, its images not yet read."""

    layout: str
    """A key of `catalog.KNOWN_LAYOUTS`."""
    description: str
    """One line: which files the images come from."""
    counts: Mapping[str, int]
    """Number of images per split, in the order of `SPLITS`."""
    read: Callable[[], Iterator[Sample]] = field(repr=False)
    """Yield every sample once, in whatever order is cheapest; raise `UserError` if one is broken."""
    classes: tuple[str, ...] = CLASSES
    """Class names, in the order of the labels."""
    lineage: str | None = None
    """`official` or `regenerated` if the layout implies it, else None."""
    notes: tuple[str, ...] = ()
    """One line per thing that was left out, to be shown to the user."""

    def samples(self) -> Iterator[Sample]:
        """Yield every sample of every split once, in any order, in memory of one byte per image.

        Raises `UserError` for a label out of range, and if the samples are not those that were counted when the source
        was opened.
        """
        unread = {split: np.ones(count, dtype=bool) for split, count in self.counts.items()}
        for sample in self.read():
            if not 0 <= sample.label < len(self.classes):
                raise UserError(f"{sample.origin}: label {sample.label}; accepted are 0 to {len(self.classes) - 1}")
            left = unread[sample.split]
            if not 0 <= sample.index < len(left) or not left[sample.index]:
                raise UserError(f"{sample.origin}: {self.description} has changed since it was opened; run again")
            left[sample.index] = False
            yield sample
        for split, left in unread.items():
            if left.any():
                raise UserError(f"{self.description}: {left.sum()} of {len(left)} {split} images are gone; run again")

    def val_size(self) -> int | None:
        """Return how many of the last train samples become val by the official split, or None if it does not apply.

        It applies to a train split of the official size, in any layout, unless the source has a val split of its own.
        """
        applies = "val" not in self.counts and self.counts.get("train") == _OFFICIAL_TRAIN_SIZE
        return _OFFICIAL_VAL_SIZE if applies else None


# Words for the splits: alone, or with what they hold, as in train_set, testImages and x_train.
_SPLIT = re.compile(
    r"(?:(?<![a-z])|(?<=\b[xy])|(?<=_[xy]))(?:(train(?:ing)?|trn)|(val(?:id(?:ation)?)?|dev)|(te?st(?:ing)?|t10k))"
    r"(?=(?:sets?|images?|imgs?|labels?|data|[xy])?(?![a-z]))",
    re.IGNORECASE,
)
# Names of columns, keys and arrays, in lower case, words joined by _; of several columns, the first one here counts.
IMAGE_NAMES = (
    *(
        "image",
        "images",
        "img",
        "imgs",
        "image_name",
        "image_path",
        "image_file",
        "image_filename",
        "image_id",
        "img_name",
    ),
    *("img_path", "filename", "file_name", "filenames", "file", "filepath", "file_path", "fname", "path", "paths"),
    *("picture", "pictures", "photo", "pixels", "x", "data", "input", "inputs", "features", "samples", "id", "name"),
    *("jpg", "jpeg", "png", "webp"),
)
LABEL_NAMES = (
    *("label", "labels", "target", "targets", "y", "class", "cls", "classes", "category", "digit", "class_name"),
    *("label_name", "class_id", "label_id", "class_label", "fine_label", "fine_labels", "ground_truth", "annotation"),
)
SPLIT_NAMES = ("split", "subset", "partition", "set", "usage", "fold")
_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LISTED = 5  # things that are named in one line


class NoLabelsError(UserError):
    """There are images, or what might be some, without labels: another part of the source may have them."""


@functools.lru_cache  # folders are the same for many images
def split_of(name: str, *, whole: bool = False) -> str | None:
    """Return the split that a name contains, or None. ``whole``: the name must be that word alone."""
    match = _SPLIT.search(name)
    if match is None or (
        whole and not re.fullmatch(r"[^a-z]*(?:[\W_]*(?:sets?|images?|imgs?|data))?", without_split(name))
    ):
        return None
    return SPLITS[int(match.lastindex or 1) - 1]


def without_split(name: str) -> str:
    """Return a name in lower case without its word for a split."""
    return _SPLIT.sub(" ", name).strip().lower()


def key_of(name: str) -> str:
    """Return the name of a file up to the first dot after its folder, as WebDataset does."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def role_of(name: str) -> str | None:
    """Return `image` or `label` if a name of a key or file says one of them, else None."""
    words = set(re.split(r"[^a-z]+", without_split(name)))
    return "label" if words & set(LABEL_NAMES) else "image" if words & set(IMAGE_NAMES) else None


def choose(columns: Sequence[str], accepted: Sequence[str]) -> str | None:
    """Return the column with the first of the accepted names, or None."""
    normal = {re.sub(r"[^a-z0-9]+", "_", column.strip().lower()).strip("_"): column for column in reversed(columns)}
    return next((normal[name] for name in accepted if name in normal), None)


def list_some(names: Sequence[str]) -> str:
    """Return the first few names in one line, and how many more there are."""
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return escape_control(", ".join(names[:_LISTED])) + more


@dataclass(frozen=True, kw_only=True)
class Table:
    """Images with their labels and splits, in the order of the source."""

    origin: str
    """Where they come from, for messages."""
    labels: np.ndarray
    """(n,): int64, numbers of classes, or text, names of classes."""
    splits: Sequence[str | None]
    """The split of each image, (n,); None if the source does not say."""
    classes: Sequence[str] | None = None
    """Names of the numbers, or of all classes, if the source has them."""
    read: Callable[[], Iterator[tuple[int, bytes | np.ndarray, str]]] = field(repr=False)
    """Yield the row of every image once, in any order, with an image file or pixels, and its origin for messages."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """The tables of one set, as a reader found them."""

    layout: str
    place: str
    """Where the set is, for messages."""
    tables: Sequence[Table]
    used: Collection[str]
    """The files that they are made of."""
    notes: Sequence[str] = ()


def make_source(found: ImageSet, description: str, notes: Sequence[str]) -> Source:
    """Return a source of the tables of a set.

    Raises `UserError` for a label that is no class, for class names that differ, and if only some of the images have a
    split.
    """
    classes, labels = _name_classes(found.tables, description)
    counts = dict.fromkeys(SPLITS, 0)
    places: list[tuple[np.ndarray, np.ndarray]] = []
    named = any(split for table in found.tables for split in table.splits)
    for table in found.tables:
        codes, index = np.zeros(len(table.labels), np.int8), np.zeros(len(table.labels), np.int64)
        for row, split in enumerate(table.splits):
            if split is None and named:
                raise UserError(
                    f"{table.origin}: not train, val or test, but other images of {description} are: name its split"
                )
            split = split or "train"
            codes[row], index[row] = SPLITS.index(split), counts[split]
            counts[split] += 1
        places.append((codes, index))

    def read() -> Iterator[Sample]:
        for table, numbers, (codes, index) in zip(found.tables, labels, places, strict=True):
            for row, image, origin in table.read():
                if row >= len(numbers):
                    raise UserError(f"{origin}: {description} has changed since it was opened; run again")
                yield Sample(
                    split=SPLITS[codes[row]],
                    index=int(index[row]),
                    label=int(numbers[row]),
                    encoded=image if isinstance(image, bytes) else None,
                    pixels=None if isinstance(image, bytes) else image,
                    origin=origin,
                )

    return Source(
        layout=found.layout,
        description=description,
        counts={split: count for split, count in counts.items() if count},
        classes=classes,
        notes=(*found.notes, *notes),
        read=read,
    )


def _name_classes(tables: Sequence[Table], description: str) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Return the class names, and the labels of each table as int64 indices into them.

    Without names in the source, the classes are the numbers from 0 to the largest label (or, if they do not start at 0
    or most of them are unused, the numbers that occur), or the distinct names, sorted; words for digits are sorted as
    digits.
    """
    given = {tuple(table.classes): table.origin for table in tables if table.classes is not None}
    if len(given) > 1:
        first, second = [*given.values()][:2]
        raise UserError(f"{second}: its class names differ from those of {first}")
    labels = set().union(*(table.labels.tolist() for table in tables))
    are_numbers = {isinstance(label, int) for label in labels}
    if len(are_numbers) > 1:
        raise UserError(f"{description}: some labels are numbers and others are names: use one of the two")
    distinct = sorted(labels)
    if given:
        (classes,) = given
        distinct = list(range(len(classes))) if are_numbers == {True} else list(classes)
    else:
        if are_numbers == {True} and distinct[0] == 0 and 2 * len(distinct) > distinct[-1]:
            distinct = list(range(distinct[-1] + 1))
        elif are_numbers == {False} and {name.lower() for name in distinct} <= set(_DIGIT_WORDS):
            distinct.sort(key=lambda name: _DIGIT_WORDS.index(name.lower()))
        classes = tuple(map(str, distinct)) or CLASSES
    if not 1 <= len(classes) <= MAX_CLASSES:
        raise UserError(f"{description}: {len(classes):,} classes; accepted are 1 to {MAX_CLASSES:,}: check its labels")
    if bad := [name for name in classes if not name or not name.isprintable()]:
        raise UserError(f"{description}: class {bad[0]!a:.40}: a name that is empty or cannot be printed; rename it")
    if len(set(classes)) < len(classes):
        raise UserError(f"{description}: two classes have the same name; rename one of the two")
    places = {label: index for index, label in enumerate(distinct)}
    for table in tables:
        for row, label in enumerate(table.labels.tolist()):
            if label not in places:
                accepted = list_some(list(map(str, distinct)))
                raise UserError(f"{table.origin}: label {label!r:.40} at index {row}; accepted are {accepted}")
    return classes, [np.array([places[label] for label in table.labels.tolist()], np.int64) for table in tables]


def parse_labels(origin: str, texts: Sequence[str]) -> np.ndarray:
    """Return labels that stand as text: int64 if all are whole numbers, else as they are, without blanks around them.

    Raises `UserError` for an empty one.
    """
    cleaned = [text.strip() for text in texts]
    if "" in cleaned:
        raise UserError(f"{origin}: row {cleaned.index('') + 1} has an empty label; fill it in")
    if all(re.fullmatch(r"\d{1,9}(\.0*)?", text) for text in set(cleaned)):
        return np.array([int(float(text)) for text in cleaned], np.int64)
    return np.array(cleaned, dtype=object)


def texts_of(values: np.ndarray) -> list[str]:
    """Return the elements of an array as text; bytes are UTF-8. Raises `UnicodeDecodeError`."""
    return [value.decode() if isinstance(value, bytes) else str(value) for value in np.asarray(values).ravel().tolist()]


def check_labels(origin: str, labels: np.ndarray, count: int) -> np.ndarray:
    """Return labels of an array: int64 (count,), or text.

    Accepted are text and whole numbers of shape (count,), (count, 1) or (1, count), and one-hot rows (count, classes).
    Raises `UserError` for anything else.
    """
    values = np.asarray(labels)
    if values.ndim == 2 and len(values) == count and values.shape[1] > 1 and values.dtype.kind in "iufb":
        if not (np.isin(values, (0, 1)).all() and (values.sum(axis=1) == 1).all()):
            raise UserError(f"{origin}: rows that are not one-hot; each row needs a single 1")
        values = values.argmax(axis=1)
    if values.shape in ((count, 1), (1, count)):
        values = values.reshape(-1)
    if values.shape == (count,) and values.dtype.kind in "SUO":
        return parse_labels(origin, texts_of(values))
    if values.shape != (count,) or values.dtype.kind not in "iufb":
        raise UserError(f"{origin}: {values.dtype} of shape {values.shape}; expected {count} whole numbers")
    for index in np.flatnonzero(~((values >= 0) & (values < 1e9) & (values == np.floor(values))))[:1]:
        raise UserError(f"{origin}: label {values[index]} at index {index}; accepted are whole numbers from 0")
    return values.astype(np.int64)
