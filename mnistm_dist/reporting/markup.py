"""The few pieces of HTML that a report is made of. Every text is escaped here, and only here."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from mnistm_dist.reporting.page_style import SHEET
from mnistm_dist.reporting.style import to_svg


@dataclass(frozen=True)
class Markup:
    """Finished HTML, told apart from text that is still to be escaped."""

    html: str


Cell = str | int | float | Markup | None


def escape(text: object) -> str:
    """A text as HTML shows it; a number and its per cent sign stay on one line."""
    return html.escape(str(text)).replace(" %", "\u00a0%")


def render(cell: Cell) -> str:
    """Finished HTML as it is, text escaped, nothing as a dash."""
    if isinstance(cell, Markup):
        return cell.html
    return "–" if cell is None else escape(cell)


def join(parts: Iterable[Markup | None]) -> Markup:
    """The parts one after another, without those that are None."""
    return Markup("\n".join(part.html for part in parts if part is not None))


def paragraphs(text: str) -> Markup:
    """A paragraph for each line."""
    return Markup("".join(f"<p>{escape(line)}</p>" for line in text.splitlines() if line))


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], numbers: Sequence[int] = ()) -> Markup:
    """A table that scrolls by itself where the page is narrow.

    Args:
        head: names of the columns.
        rows: a cell for each column.
        numbers: places of the columns that are set right.
    """

    def line(tag: str, cells: Sequence[Cell]) -> str:
        classes = (' class="number"' if i in numbers else ' class="text"' for i in range(len(cells)))
        return "".join(f"<{tag}{c}>{render(cell)}</{tag}>" for c, cell in zip(classes, cells, strict=True))

    top = f"<thead><tr>{line('th', head)}</tr></thead>"
    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return Markup(f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>')


def facts(rows: Sequence[tuple[str, Cell]]) -> Markup:
    """Names and values; a long value breaks anywhere."""
    body = "".join(f"<tr><td>{escape(name)}</td><td>{render(value)}</td></tr>" for name, value in rows)
    return Markup(f'<table class="facts"><tbody>{body}</tbody></table>')


def section(title: str, anchor: str, *parts: Markup | None) -> Markup:
    """A part of the page that the list at its top leads to."""
    return Markup(f'<section id="{anchor}"><h2>{escape(title)}</h2>{join(parts).html}</section>')


def heading(text: str) -> Markup:
    """A heading within a section."""
    return Markup(f"<h3>{escape(text)}</h3>")


def pair(*parts: Markup | None) -> Markup:
    """Parts beside one another where there is room."""
    return Markup(f'<div class="pair">{"".join(f"<div>{p.html}</div>" for p in parts if p is not None)}</div>')


def drawn(figure: Figure, name: str, alternative: str, wide: bool = False) -> Markup:
    """A figure that follows the theme; a wide one scrolls on a phone instead of shrinking."""
    return Markup(f"<figure{' class=wide' if wide else ''}>{to_svg(figure, name, alternative)}</figure>")


def picture(path: Path, alternative: str) -> Markup:
    """A PNG file, put into the page, on paper of its own."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return Markup(
        f'<figure class="paper"><img src="data:image/png;base64,{data}" alt="{escape(alternative)}"></figure>'
    )


def tiles(values: Sequence[tuple[str, str]]) -> Markup:
    """Large numbers, each with what it is."""
    return Markup(
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in values
        )
        + "</div>"
    )


def note(title: str, lines: Sequence[str]) -> Markup | None:
    """What the reader must know before the rest; None where there is nothing."""
    if not lines:
        return None
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return Markup(f'<div class="note" role="note"><b>{escape(title)}</b><ul>{items}</ul></div>')


def code(text: str) -> Markup:
    """A command."""
    return Markup(f"<pre><code>{escape(text)}</code></pre>")


def checksum(text: object) -> Markup:
    """A long sum that may break anywhere."""
    return Markup(f'<span class="hash">{escape(text)}</span>')


def document(title: str, top: Markup, sections: Sequence[tuple[str, str, Markup]], foot: str) -> str:
    """The page: title, top, a list of the sections, the sections (title, anchor, content), and a last line.

    It loads nothing: the policy in its head forbids it, scripts too.
    """
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for name, anchor, _ in sections)
    body = "".join(section(name, anchor, content).html for name, anchor, content in sections)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{SHEET}</style></head>\n"
        f"<body><main>\n{top.html}\n<nav>{links}</nav>\n{body}\n<footer>{escape(foot)}</footer></main></body></html>\n"
    )
