"""A YAML value or a flag's text as the type of a field."""

from __future__ import annotations

import math
import reprlib
import types
import typing
from typing import Any, Literal

from mnistm_dist.errors import UserError


def parse_value(name: str, value: Any, kind: Any, metadata: Any) -> Any:
    """A YAML value or a flag's text as ``kind``; raises `UserError` naming the field and what is accepted."""
    parsed = _convert(value, kind)
    if parsed is _NO:
        raise UserError(f"{name}: {shown(value)} is not accepted; use {_accepted(kind)}")
    low, high = metadata.get("low", -math.inf), metadata.get("high", math.inf)
    for number in parsed if isinstance(parsed, tuple) else (parsed,):
        if isinstance(number, int | float) and not isinstance(number, bool) and not low <= number <= high:
            bound = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise UserError(f"{name}: {shown(value)} is not accepted; use a number {bound}")
    return parsed


def shown(value: Any) -> str:
    """A value as a message shows it: a few lines of YAML can stand for more than any memory holds."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxstring, short.maxlong, short.maxother = 2, 3, 120, 40, 120
    return short.repr(value)


_NO = object()


def _convert(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``, or `_NO`."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        # None and literals first, so that "auto" is never read as a path.
        for arm in sorted(
            typing.get_args(kind), key=lambda a: (a is not type(None), typing.get_origin(a) is not Literal)
        ):
            found = _convert(value, arm)
            if found is not _NO:
                return found
        return _NO
    if origin is Literal:
        return value if value in typing.get_args(kind) else _NO
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        found = tuple(_convert(item, typing.get_args(kind)[0]) for item in items)
        return _NO if not found or _NO in found else found
    if kind is type(None):
        return None if value is None or value == "none" else _NO
    if kind is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "yes": True, "false": False, "no": False}.get(str(value).lower(), _NO)
    if kind is str:
        return value if isinstance(value, str) and value else _NO
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _NO
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return _NO
    if isinstance(number, float) and not math.isfinite(number):
        return _NO
    return number if kind is float or not isinstance(value, float) or number == value else _NO


def _accepted(kind: Any) -> str:
    """The values of a type, in words."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_accepted(arm) for arm in typing.get_args(kind))
    if origin is Literal:
        return ", ".join(str(choice) for choice in typing.get_args(kind))
    if origin is tuple:
        return "whole numbers with commas between"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}[kind]
