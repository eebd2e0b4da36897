"""Headers of lines of text before binary events."""

from dataclasses import dataclass
from pathlib import Path

from spikefleet_pipelines.events.readers.blocks import head

_MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class TextHeader:
    """Lines of a header, without the mark of a line and its end, and where the events start, in bytes."""

    lines: tuple[str, ...]
    offset: int


def read_text_header(path: Path, mark: bytes, last: bytes | None = None) -> TextHeader:
    """Read the lines at the start of a file that start with a mark.

    Args:
        path: of the file.
        mark: first bytes of each line.
        last: content of the line that ends the header, where the format has one.
    """
    raw = head(path, _MOST_BYTES)
    lines: list[str] = []
    at = 0
    while raw.startswith(mark, at):
        end = raw.find(b"\n", at)
        if end < 0:
            break
        line = raw[at + len(mark) : end].strip()
        lines.append(line.decode("latin-1"))
        at = end + 1
        if line == last:
            break
    return TextHeader(tuple(lines), at)
