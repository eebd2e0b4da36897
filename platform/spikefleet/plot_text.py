"""Text in plots: names in any script, drawn with a font of the system that has them, and never as empty boxes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from spikefleet.status import one_line, printable

_FAMILY = "DejaVu Sans"
"""Comes with matplotlib."""

_NO_TEXT = ("Last Resort", "STIXNonUnicode", "STIXSize", "cm")
"""Starts of the names of fonts that have boxes, or other glyphs than their codes say."""


def labels(names: Sequence[str]) -> list[str]:
    """Labels of classes in plots: their names or, where no font has them, `#` and the index of the class."""
    return [one_line(name) if not missing(one_line(name)) else f"#{index}" for index, name in enumerate(names)]


def in_table(names: Sequence[str]) -> list[str]:
    """Names of classes in the table beside a plot: with the label, where that is not the name."""
    return [
        name if label in (name, one_line(name)) else f"{name} ({label})"
        for name, label in zip(names, labels(names), strict=True)
    ]


def drawable(text: str) -> str:
    """A text for a plot: control characters, and those that no font has, are escaped."""
    absent = missing(text.replace("\n", " "))
    lines = "".join(character if character not in absent else _escaped(character) for character in text)
    return printable(lines)


def families(texts: Iterable[str]) -> list[str]:
    """The families of fonts that have the characters of texts, the one of all other plots first."""
    needed = {character for text in texts for character in text if not character.isspace()} - _glyphs(_standard())
    found = [_FAMILY]
    for family, path in _fonts():
        if not needed:
            break
        if needed & (has := _glyphs(path)):
            needed -= has
            found.append(family)
    return list(dict.fromkeys(found))


def font_file(texts: Sequence[str]) -> str:
    """The file of one font that has all characters of texts; of the standard family, where no single one has."""
    needed = {character for text in texts for character in text if not character.isspace()}
    if needed <= _glyphs(_standard()):
        return _standard()
    return next((path for _, path in _fonts() if needed <= _glyphs(path)), _standard())


def missing(text: str) -> frozenset[str]:
    """The characters of a text that no font of the system has."""
    if text.isascii():
        return frozenset()
    needed = {character for character in text if not character.isspace()} - _glyphs(_standard())
    for _, path in _fonts() if needed else ():
        needed -= _glyphs(path)
    return frozenset(needed)


def _escaped(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode()


@cache
def _standard() -> str:
    from matplotlib.font_manager import findfont

    return str(findfont(_FAMILY))


@cache
def _fonts() -> list[tuple[str, str]]:
    """Family and file of the upright fonts of the system."""
    from matplotlib.font_manager import fontManager

    entries = {
        (entry.name, entry.fname)
        for entry in fontManager.ttflist
        if entry.style == "normal" and not entry.name.startswith(_NO_TEXT)
    }
    return sorted(entries)


@cache
def _glyphs(path: str) -> frozenset[str]:
    """The characters of a font; none of a file that cannot be read."""
    from matplotlib.ft2font import FT2Font

    if not Path(path).is_file():
        return frozenset()
    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (RuntimeError, OSError, ValueError):
        return frozenset()
