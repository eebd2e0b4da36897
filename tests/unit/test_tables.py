"""Tables at every width: names and numbers are whole, and what is left out is named."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from spikefleet.cli.tables import Column, number, print_record, print_table, text

NAME = "cifar100_spiking_resnet34_shortcut"
WORDS = "Spiking ResNet34 with shortcut back-propagation, T=4 (Guo et al., NeurIPS 2024, table 1)"
COLUMNS = [Column("recipe"), text("what it is"), number("parameters"), number("share", optional=True)]
ROWS = [(NAME, WORDS, "21,282,404", "12.5%"), ("digits", "[bold] small", "1,234", "7.0%")]


def shown(width: int, terminal: bool = False) -> str:
    written = io.StringIO()
    console = Console(file=written, width=width, force_terminal=terminal, color_system=None)
    print_table(console, COLUMNS, ROWS, title="[title]")
    return written.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [10, 20, 40, 60, 70, 80, 100, 120, 200])
def test_no_name_and_no_number_is_cut(width: int, terminal: bool) -> None:
    written = shown(width, terminal)
    for whole in (NAME, "21,282,404", "digits", "1,234", "[title]", "[bold]"):
        assert whole in written
    for word in WORDS.split():
        assert word in written
    assert "…" not in written
    assert ("12.5%" in written) != ("not shown at this width: share" in written)


def test_forms_follow_the_width() -> None:
    assert max(map(len, shown(200).splitlines())) < 200
    assert WORDS in shown(200)
    assert WORDS not in shown(80)  # wrapped
    assert "not shown" not in shown(100)
    assert "not shown at this width: share" in shown(72)
    assert f"recipe: {NAME}" in shown(40)  # a block for each row
    assert "share       12.5%" in shown(40)


@pytest.mark.parametrize("width", [72, 80, 100])
def test_lines_of_a_grid_fit(width: int) -> None:
    assert all(len(line) <= width for line in shown(width).splitlines() if line.startswith(("│", "┃", "┏")))


def test_a_record_keeps_hashes_whole() -> None:
    written = io.StringIO()
    digest = "0123456789abcdef" * 4
    console = Console(file=written, width=60, color_system=None)
    print_record(console, [("content", digest), ("classes", "10: zero, one, two, three, four, five, six, seven")])
    assert digest in written.getvalue()
    assert all(len(line) <= 75 for line in written.getvalue().splitlines())


@pytest.mark.parametrize("width", [68, 72])
def test_a_hash_that_does_not_fit_beside_its_name_has_its_own_line(width: int) -> None:
    written = io.StringIO()
    digest = "0123456789abcdef" * 4
    console = Console(file=written, width=width, force_terminal=True, color_system=None)
    print_record(console, [("content", digest), ("of code", "deadbeef")], title="stores/digits")
    assert written.getvalue().splitlines() == [
        "stores/digits",
        "  content",
        f"    {digest}",
        "  of code  deadbeef",
    ]
