"""Reading a large JSON object one list element at a time.

COCO's training annotations are 450 MB of text and six times as much as Python objects, nearly all of them unused
polygons. This reader frees each element before it reads the next one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spikefleet_pipelines.errors import SourceError

_CHUNK = 1 << 20
_SPACE = " \t\n\r"
_AFTER_NUMBER = frozenset(",]}" + _SPACE)


def list_elements(path: Path, lists: set[str] | None = None) -> Iterator[tuple[str, int, Any]]:
    """Yield the elements of all lists in the JSON object of a file; other values of the object are skipped.

    Args:
        path: of the file.
        lists: gets the names of the lists that were begun, also of empty ones.

    Yields:
        (name of the list, position in it, element).

    Raises:
        SourceError: the file cannot be read or is not a JSON object; the message says where.
    """
    try:
        with path.open(encoding="utf-8-sig") as stream:
            yield from _Reader(path, stream).elements(set() if lists is None else lists)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not a JSON file: it is not text in UTF-8 ({error.reason})") from error


class _Reader:
    def __init__(self, path: Path, stream: Any) -> None:
        self._path = path
        self._stream = stream
        self._decode = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0  # where in the text
        self._before = 0  # characters before the text
        self._complete = False

    def elements(self, lists: set[str]) -> Iterator[tuple[str, int, Any]]:
        self._take("{")
        seen: set[str] = set()
        while self._next() != "}":
            if seen:
                self._take(",")
            name = self._value()
            if not isinstance(name, str):
                raise self._error("expected a name in quotes")
            if name in seen:
                raise self._error(f"{name!r} occurs twice")
            seen.add(name)
            self._take(":")
            if self._next() != "[":
                self._value()
                continue
            self._at += 1
            lists.add(name)
            position = 0
            while self._next() != "]":
                if position:
                    self._take(",")
                yield name, position, self._value()
                position += 1
            self._at += 1
        self._at += 1
        if self._next():
            raise self._error("expected the end of the file")

    def _next(self) -> str:
        """Return the next non-space character; "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def _take(self, expected: str) -> None:
        if (found := self._next()) != expected:
            raise self._error(f"expected {expected!r}, found {repr(found) if found else 'the end of the file'}")
        self._at += 1

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except RecursionError:
                raise self._error("it is nested too deeply") from None
            except ValueError as error:
                # An incomplete value and an invalid one look alike until more has been read.
                if not self._more():
                    raise self._error(str(error)) from error
                continue
            # A number ends only where another token follows: "-2." may continue.
            ended = not isinstance(value, (int, float)) or self._text[end : end + 1] in _AFTER_NUMBER
            if ended or not self._more():
                self._at = end
                return value

    def _more(self) -> bool:
        """Read more text, doubling what is buffered, so that a long value is not decoded again and again."""
        if self._complete:
            return False
        waiting = self._text[self._at :]
        self._before += self._at
        more = self._stream.read(max(_CHUNK, len(waiting)))
        self._complete = not more
        self._text, self._at = waiting + more, 0
        return bool(more)

    def _error(self, what: str) -> SourceError:
        return SourceError(
            f"{self._path} is not the JSON of a COCO data set: {what}, near character {self._before + self._at:,}"
        )
