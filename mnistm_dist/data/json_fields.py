"""Typed access to JSON from anywhere: whatever is not as needed is one `UserError` that says where."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from mnistm_dist.data.progress import AGAIN
from mnistm_dist.errors import UserError

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_INTEGER = 2**63 - 1
"""The largest whole number that is accepted."""


def read_json(data: bytes, where: str) -> Fields:
    """The JSON object in ``data``. Raises `UserError` where there is none; ``where`` names the file."""
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}): {AGAIN}") from error
    return Fields(value, where)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


class Fields:
    """One JSON object and where it stands: typed access that raises `UserError`."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: {_show(value)} where an object is needed: {AGAIN}")
        self.value: Mapping[str, object] = value
        self.where = where

    def _wrong(self, key: str, needed: str) -> UserError:
        found = _show(self.value[key]) if key in self.value else "missing"
        return UserError(f"{self.where}: {key} is {found}, it must be {needed}: {AGAIN}")

    def only(self, *keys: str) -> None:
        """Refuses every field that is none of ``keys``."""
        for key in self.value:
            if key not in keys:
                raise UserError(f"{self.where}: unknown field {_show(key)}: {AGAIN}")

    def fields(self, key: str) -> Fields:
        """An object."""
        if not isinstance(self.value.get(key), Mapping):
            raise self._wrong(key, "an object")
        return Fields(self.value[key], f"{self.where}: {key}")

    def items(self, key: str) -> list[object]:
        """A list of anything."""
        value = self.value.get(key)
        if not isinstance(value, list):
            raise self._wrong(key, "a list")
        return value

    def text(self, key: str) -> str:
        """One line of text."""
        value = self.value.get(key)
        if not isinstance(value, str) or not value.isprintable():
            raise self._wrong(key, "one line of text")
        return value

    def texts(self, key: str) -> list[str]:
        """Different texts of one line, one at least."""
        value = self.items(key)
        texts = [item for item in value if isinstance(item, str) and item and item.isprintable()]
        if not texts or len(set(texts)) != len(value):
            raise self._wrong(key, "a list of different names")
        return texts

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """One of ``choices``."""
        value = self.text(key)
        if value not in choices:
            raise self._wrong(key, f"one of {', '.join(choices)}")
        return value

    def name(self, key: str) -> str:
        """A file name that leads out of no folder."""
        value = self.text(key)
        if not _PLAIN_NAME.fullmatch(value):
            raise self._wrong(key, "a plain file name, with no folder")
        return value

    def sha256(self, key: str) -> str:
        """A sha256, hexadecimal."""
        value = self.text(key)
        if not _SHA256.fullmatch(value):
            raise self._wrong(key, "a sha256 of 64 hexadecimal digits")
        return value

    def integer(self, key: str) -> int:
        """A whole number from 0 to `MAX_INTEGER`."""
        value = self.value.get(key)
        if type(value) is not int or not 0 <= value <= MAX_INTEGER:
            raise self._wrong(key, "a whole number of 0 or more")
        return value

    def integers(self, key: str, length: int, low: int, high: int) -> list[int]:
        """``length`` whole numbers, each from ``low`` to ``high``."""
        value = self.items(key)
        numbers = [item for item in value if type(item) is int and low <= item <= high]
        if not len(numbers) == len(value) == length:
            raise self._wrong(key, f"a list of {length} whole numbers from {low}")
        return numbers

    def fractions(self, key: str) -> tuple[float, float, float]:
        """Three numbers from 0 to 1, one a colour channel."""
        value = self.items(key)
        numbers = [float(item) for item in value if isinstance(item, int | float) and 0 <= item <= 1]
        if not len(numbers) == len(value) == 3 or any(isinstance(item, bool) for item in value):
            raise self._wrong(key, "a list of 3 numbers from 0 to 1")
        return numbers[0], numbers[1], numbers[2]


def _show(value: object) -> str:
    text = f"{value!r:.120}"
    return text if len(text) <= 60 else f"{text[:57]}..."
