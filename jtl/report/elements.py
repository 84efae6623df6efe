"""What a page is put together from: sections, figures, tables, and the file that holds them."""

import pathlib
import re
from collections.abc import Sequence
from html import escape

from jtl.report import tables

_FORBID_NETWORK = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(title: str, parts: Sequence[str]) -> str:
    """Return one file with the parts that are not empty; it opens without network."""
    style = pathlib.Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_FORBID_NETWORK}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """Return a section under its title, "" where there is nothing to show."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def pair(*parts: str) -> str:
    """Return parts that stand side by side where there is room; empty ones are left out."""
    found = [part for part in parts if part]
    return "<div class='pair'>\n" + "\n".join(found) + "\n</div>" if found else ""


def figure(title: str, words: str, svg: str) -> str:
    """Return a plot under its title, with words on how to read it."""
    caption = f"{escape(title)}<small>{escape(words)}</small>"
    return f"<figure>\n<figcaption>{caption}</figcaption>\n{svg}\n</figure>"


def table(table: tables.Table, *, strong: str = "", names: int = -1, look: str = "wide") -> str:
    """Return a table; the row of first cell `strong` stands out, the column `names` may break."""
    sides = ["class=left" if i < table.left else "" for i in range(len(table.headers))]
    if names >= 0:
        sides[names] = "class='left names'"
    head = _cells("th", sides, table.headers)
    body = [
        f"<tr{' class=strong' if row[0] == strong else ''}>{_cells('td', sides, row)}</tr>"
        for row in table.rows
    ]
    return (
        f"<div class='{look}'><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def _cells(kind: str, sides: Sequence[str], cells: Sequence[str]) -> str:
    looks = [
        "class=held" if cell == tables.HELD else side
        for side, cell in zip(sides, cells, strict=True)
    ]
    bound = [re.sub(r"(?<=\d) (?=%|s\b)", "&nbsp;", escape(cell)) for cell in cells]
    return "".join(
        f"<{kind} {look}>{cell}</{kind}>" for look, cell in zip(looks, bound, strict=True)
    )
