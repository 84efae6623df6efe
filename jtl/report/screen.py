"""The one way to write on the console: text as it is, tables without frames."""

import sys
from collections.abc import Sequence
from typing import Any

from jtl.report.tables import Table

_PIPE_WIDTH, _GAP = 100, 2


def make_console() -> Any:
    """Return a `rich` console on standard output, 100 columns wide where that is no terminal."""
    from rich.console import Console

    out = Console(file=sys.stdout)
    if not out.is_terminal and not out.is_jupyter:
        out.width = max(out.width, _PIPE_WIDTH)
    return out


def say(out: Any, line: str, *, style: str = "") -> None:
    """Print a line as it is; only a terminal or a notebook breaks it where it is too long."""
    shown = out.is_terminal or out.is_jupyter
    out.print(line, style=style, markup=False, highlight=False, soft_wrap=not shown)


def fits(out: Any, table: Table) -> bool:
    """Return whether `draw` has room for the table."""
    columns = zip(table.headers, *table.rows, strict=True)
    widths = [max(len(cell) for cell in column) for column in columns]
    return sum(widths) + _GAP * len(widths) + 1 <= out.width


def draw(out: Any, table: Table, *, strong: Sequence[str] = (), dim: Sequence[str] = ()) -> None:
    """Print a table.

    Args:
        out: a `rich` console.
        table: of text.
        strong: first cells of rows that stand out.
        dim: cells that stand back.
    """
    from rich import box
    from rich import table as tables
    from rich.text import Text

    drawn = tables.Table(
        box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0)
    )
    for i, header in enumerate(table.headers):
        left = i < table.left
        drawn.add_column(Text(header), justify="left" if left else "right", no_wrap=not left)
    for row in table.rows:
        cells = [Text(cell, style="dim" if cell in dim else "") for cell in row]
        drawn.add_row(*cells, style="bold" if row[0] in strong else "")
    out.print(drawn)
