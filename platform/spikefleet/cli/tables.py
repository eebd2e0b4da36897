"""Tables that can be read at any width: no name and no number is ever cut.

Where a table is too wide, text is wrapped between words; then columns that are worth less are left out and named below;
then each row becomes a block of lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from spikefleet.status import one_line, print_line, printable, wrapped_words

_LEAST_TEXT = 16
"""Text that may be wrapped gets at least so many cells of width, or all that it needs."""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    kind: Literal["name", "number", "text"] = "name"
    """Names and numbers are never broken; text is wrapped between words. Numbers stand to the right."""
    optional: bool = False
    """Left out where the table is too wide, the last one first."""
    styles: Mapping[str, str] = field(default_factory=dict)
    """Styles of cells by what they hold, such as `{"bad": "red"}`."""


def number(title: str, optional: bool = False) -> Column:
    """A column of numbers."""
    return Column(title, "number", optional)


def text(title: str, optional: bool = False) -> Column:
    """A column of words that may be wrapped."""
    return Column(title, "text", optional)


def print_table(
    console: Console, columns: Sequence[Column | str], rows: Sequence[Sequence[str]], title: str | None = None
) -> None:
    """Prints a table in the form that the console's width allows.

    Args:
        console: where; one that is no terminal has the width of COLUMNS, or 80.
        columns: a string is a column of names.
        rows: cells in the order of the columns.
        title: above it.
    """
    shown = [Column(column) if isinstance(column, str) else column for column in columns]
    rows = [
        [(printable if column.kind == "text" else one_line)(cell) for column, cell in zip(shown, row, strict=True)]
        for row in rows
    ]
    cells = [list(row) for row in rows]
    left_out: list[str] = []
    while (widths := _widths(shown, cells, console.width)) is None:
        position = next((i for i in reversed(range(len(shown))) if shown[i].optional), None)
        if position is None:
            break
        left_out.insert(0, shown.pop(position).title)
        for row in cells:
            row.pop(position)
    if title is not None:
        print_line(console, title)
    if widths is None:
        everything = [Column(column) if isinstance(column, str) else column for column in columns]
        _print_blocks(console, everything, rows)
        return
    _print_grid(console, shown, cells, widths)
    if left_out:
        print_line(console, f"not shown at this width: {', '.join(left_out)} (a wider terminal or --json shows them)")


def print_record(console: Console, items: Sequence[tuple[str, str]], title: str | None = None) -> None:
    """Prints names with their values, a line or more each."""
    if title is not None:
        print_line(console, title)
    _print_items(console, items, "  " if title is not None else "")


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """A width for each column, or None where the table does not fit."""
    least, most = [], []
    for position, column in enumerate(columns):
        lines = [line for row in rows for line in row[position].split("\n")]
        head = max(map(cell_len, column.title.split()), default=1)
        longest = max([head, *map(cell_len, lines)])
        most.append(max(longest, cell_len(column.title)))
        if column.kind == "text":
            word = max([head, *(cell_len(word) for line in lines for word in line.split())])
            least.append(max(word, min(_LEAST_TEXT, longest)))
        else:
            least.append(longest)
    room = width - 3 * len(columns) - 1 - sum(least)
    if room < 0:
        return None
    widths = least
    while room > 0 and (narrow := [i for i in range(len(widths)) if widths[i] < most[i]]):
        share = max(1, room // len(narrow))
        for i in narrow:
            more = min(share, most[i] - widths[i], room)
            widths[i] += more
            room -= more
    return widths


def _print_grid(
    console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]], widths: Sequence[int]
) -> None:
    from rich.table import Table

    table = Table()
    for column, width in zip(columns, widths, strict=True):
        table.add_column(Text(column.title), width=width, justify="right" if column.kind == "number" else "left")
    for row in rows:
        table.add_row(*(Text(cell, column.styles.get(cell, "")) for column, cell in zip(columns, row, strict=True)))
    console.print(table)


def _print_blocks(console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    for row in rows:
        items = [(column.title, cell) for column, cell in zip(columns, row, strict=True)]
        print_line(console, f"{items[0][0]}: {items[0][1]}")
        _print_items(console, items[1:], "  ")


def _print_items(console: Console, items: Sequence[tuple[str, str]], indent: str) -> None:
    items = [(printable(name), printable(value)) for name, value in items]
    label = max((cell_len(name) for name, _ in items), default=0)
    for name, value in items:
        head = f"{indent}{name}{' ' * (label - cell_len(name))}  "
        widest = max(map(cell_len, value.split()), default=0)
        if len(head) + widest > console.width >= len(indent) + 2 + widest:  # whole on a line of its own
            print_line(console, head.rstrip())
            head = f"{indent}  "
            lines = _wrapped(value, console.width - len(head))
        else:
            first, *lines = _wrapped(value, max(_LEAST_TEXT, console.width - len(head)))
            print_line(console, (head + first).rstrip())
        for line in lines:
            print_line(console, " " * len(head) + line)


def _wrapped(value: str, width: int) -> list[str]:
    """Lines of a text, wrapped between words; at least one."""
    return [part for line in value.split("\n") for part in wrapped_words(line, width)]
