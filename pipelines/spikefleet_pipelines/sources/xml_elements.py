"""Small XML files as elements that know their line, for messages.

A document type is refused: entities can make a small file large or name other files, and files of labels have none.
"""

from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from spikefleet_pipelines.errors import SourceError

_LARGEST = 1 << 24
_DEEPEST = 50


@dataclass
class Element:
    """One element of an XML file."""

    name: str
    line: int
    text: str = ""
    children: "list[Element]" = field(default_factory=list)

    def find(self, name: str) -> "Element | None":
        """Return the first child of a name."""
        return next((child for child in self.children if child.name == name), None)

    def all(self, name: str) -> "list[Element]":
        """Return the children of a name."""
        return [child for child in self.children if child.name == name]


def read_xml(path: Path) -> Element:
    """Read a file, and return its root element.

    Raises:
        SourceError: it cannot be read, is too large, is no XML, or has a document type.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise SourceError(f"{path} has more than {_LARGEST:,} bytes; give the XML file of one image")
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}; replace the file") from None
    parser = expat.ParserCreate()
    top = Element("", 0)
    stack = [top]

    def start(name: str, attributes: object) -> None:
        if len(stack) > _DEEPEST:
            raise SourceError(f"{path}, line {parser.CurrentLineNumber}: elements are nested deeper than {_DEEPEST}")
        element = Element(name, parser.CurrentLineNumber)
        stack[-1].children.append(element)
        stack.append(element)

    def end(name: str) -> None:
        stack.pop()

    def text(characters: str) -> None:
        stack[-1].text += characters

    def refuse(*unused: object) -> None:
        raise SourceError(
            f"{path}, line {parser.CurrentLineNumber}: a document type (<!DOCTYPE>) is not read; remove it"
        )

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    parser.StartDoctypeDeclHandler = refuse
    parser.buffer_text = True
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise SourceError(
            f"{path}, line {error.lineno}: it is no XML ({expat.ErrorString(error.code)}); replace the file"
        ) from None
    except (LookupError, ValueError) as error:  # an encoding that Python does not know, or of several bytes
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{path}: its encoding cannot be read ({error}); save the file as UTF-8") from None
    return top.children[0]
