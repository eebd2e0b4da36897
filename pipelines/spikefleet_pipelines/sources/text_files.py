"""Text files of labels: read whole, in UTF-8, up to a limit; and the paths in them."""

import math
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from spikefleet_pipelines.errors import SourceError

MAX_TEXT_BYTES = 1 << 28


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """Read a text file; a byte-order mark is dropped.

    Args:
        path: of the file.
        limit: most bytes.

    Raises:
        SourceError: it cannot be read, is larger, or is not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise SourceError(f"{path} has {size:,} bytes, expected at most {limit:,}; give the file of labels")
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}; replace the file") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SourceError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise SourceError(f"{path}, line {line} has a NUL character, so it is no text; replace the file")
    return text


def plain_number(text: str) -> float | None:
    """The number that a text is in decimal or scientific notation; None if it is none, or not finite."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def short(value: object) -> str:
    """A value in a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def place_below(root: Path, name: str, bases: Sequence[Path]) -> Path | None:
    """Find what a path in a description or a list stands for; None if nothing below the root is there.

    Descriptions are written for another directory than the one they are in, so leading `../` (as in Roboflow's) and the
    first directory (as in Darknet's `data/...`) are also left out.

    Args:
        root: directory of the data set; nothing outside it is found.
        name: path, absolute or relative.
        bases: directories that it may be relative to, in this order.
    """
    if "\0" in name:
        return None
    plain = name.replace("\\", "/")
    without = plain
    while without.startswith("../"):
        without = without[3:]
    for tail in dict.fromkeys((plain, without, without.partition("/")[2])):
        for base in bases if tail else ():
            # An archive of macOS has other forms of accented letters than a list that was written elsewhere.
            for form in dict.fromkeys((tail, *(unicodedata.normalize(one, tail) for one in ("NFC", "NFD")))):
                place = Path(os.path.normpath(base / form))
                if _is_inside(root, place) and (place.exists() or place.is_symlink()):
                    return place
    return None


def _is_inside(root: Path, place: Path) -> bool:
    """Whether a path is below a directory, or is it; of relative paths alone, `../x` would be below `.`."""
    return Path(os.path.abspath(place)).is_relative_to(os.path.abspath(root))  # noqa: PTH100 -- follows no link


def listed_path(where: str, root: Path, name: str, bases: Sequence[Path]) -> Path:
    """Return the image that a list names; it may be missing, which is said when it is read.

    Args:
        where: file and line, for the message.
        root: directory of the data set.
        name: path in the list.
        bases: directories that it may be relative to.

    Raises:
        SourceError: the path leads out of the root.
    """
    found = place_below(root, name, bases)
    if found is not None:
        return found
    place = Path(os.path.normpath(bases[0] / name.replace("\\", "/")))
    if "\0" in name or not _is_inside(root, place):
        raise SourceError(f"{where}: {short(name)} is not found in {root}; correct the path, or remove the line")
    return place
