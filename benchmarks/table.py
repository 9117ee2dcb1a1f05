"""A result as a table: by rich in a terminal, in plain lines in a pipe."""

from __future__ import annotations

from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import Result

PLAIN_WIDTH = 160
"""Columns in a pipe: wide enough that no name is cut."""


def show(bench: str, result: Result, stream: TextIO) -> None:
    """Prints the rows, and under them the conditions but the details."""
    live = stream.isatty()
    console = Console(file=stream, highlight=False, width=None if live else PLAIN_WIDTH)
    table = Table(title=f"bench {bench}" if live else None, box=box.SIMPLE_HEAD if live else None)
    table.add_column("name")
    table.add_column("output")
    for name in ("images/s", "spread", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("against")
    for row in result.rows:
        rate = "-" if row.images_per_second is None else f"{row.images_per_second:,.1f}"
        ratio = "-" if row.ratio is None else f"{row.ratio:,.3f} x"
        table.add_row(row.name, row.output, rate, f"{100 * row.spread:.1f} %", ratio, row.against)
    console.print(table)
    for name, value in result.conditions.items():
        if name != "details":
            console.print(f"{name}: {value}", markup=False, soft_wrap=True)
    for name, found in result.conditions["details"].items():
        more = ", ".join(f"{key} {value:g}" for key, value in found.items() if isinstance(value, int | float))
        if more:
            console.print(f"{name}: {more}", markup=False, soft_wrap=True)
