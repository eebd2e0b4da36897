"""Rows of tables of labels: which files are tables, what their columns are, and the values of a row."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.csv_table_config import COLUMNS, CSV, CsvOptions, plain_name
from spikefleet_pipelines.sources.own_splits_config import SPLIT_FOLDERS
from spikefleet_pipelines.sources.text_files import plain_number, read_text, short

_USUAL = {
    "path": ("path", "file", "filename", "filepath", "image", "imagepath", "imagename", "imagefile", "img", "imgpath"),
    "label": ("label", "class", "category", "classname", "labelname", "categoryname", "target"),
    "split": ("split", "subset", "partition", "set"),
    "group": ("group", "groupid"),
    "x1": ("x1", "xmin", "left"),
    "y1": ("y1", "ymin", "top"),
    "x2": ("x2", "xmax", "right"),
    "y2": ("y2", "ymax", "bottom"),
    "width": ("width", "imagewidth", "imgwidth"),
    "height": ("height", "imageheight", "imgheight"),
}
"""Names of columns, as `plain_name` gives them."""
_EDGES = ("x1", "y1", "x2", "y2")
_WITHOUT_HEADER = {2: ("path", "label"), 3: ("path", "label", "split"), 6: ("path", *_EDGES, "label")}
_CLASS_TABLES = frozenset({"classes.csv", "class_mapping.csv"})
_SUFFIXES = (".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    where: str
    """File and line."""
    path: str
    label: str
    """Empty for an image without objects."""
    split: str | None
    group: str | None
    edges: tuple[float, float, float, float] | None
    """x1 y1 x2 y2 in pixels; None in a table of classes, and for an image without objects."""
    size: tuple[float, float] | None = None
    """Height and width that the table states beside the edges, of the image as a rule."""


@dataclass(frozen=True)
class Table:
    """The rows of a file."""

    path: Path
    split: str | None
    """The split that the file is of; None where its rows say it, or nothing does."""
    with_boxes: bool
    rows: tuple[Row, ...]


def find_tables(root: Path, table: str | None) -> list[tuple[str | None, Path]]:
    """Find the tables of a directory, each with its split, or None.

    Raises:
        SourceError: there is none, or it is not clear which one is meant.
    """
    if table is not None:
        if not (root / table).is_file():
            raise SourceError(f"source 'csv': option table is {table!r}, but {root / table} is not a file; set another")
        return [(None, root / table)]
    found: dict[str, Path] = {}
    for split, names in SPLIT_FOLDERS.items():
        places = [
            root / place
            for name in names
            for suffix in _SUFFIXES
            for place in (f"{name}{suffix}", f"{name}_labels{suffix}", f"{name}/_annotations{suffix}")
        ]
        if there := [place for place in places if place.is_file()]:
            if len(there) > 1:
                raise SourceError(
                    f"{root} has {there[0].relative_to(root)} and {there[1].relative_to(root)}, which are both "
                    f"{split}; "
                    "remove one, or name a table by the option table"
                )
            found[split] = there[0]
    if "train" in found:
        return list(found.items())
    for suffixes in (_SUFFIXES[:2], _SUFFIXES[2:]):
        files = sorted(path for path in root.iterdir() if path.suffix.lower() in suffixes and path.is_file())
        files = [path for path in files if path.name not in _CLASS_TABLES and not path.name.startswith((".", "README"))]
        if len(files) > 1:
            raise SourceError(
                f"{root} has the tables {', '.join(path.name for path in files[:5])}; name one by the option table"
            )
        if files:
            return [(None, files[0])]
    raise CSV.missing(root / "labels.csv")


def read_table(path: Path, split: str | None, options: CsvOptions) -> Table:
    """Read a table.

    Raises:
        SourceError: its columns are not clear, or a row is invalid; the message names the line.
    """
    lines = _lines(path)
    number, first = next(lines, (1, []))
    if not first:
        raise SourceError(f"{path} is empty; write a row `path,label` for each image")
    columns, has_header = _columns(path, first, options.columns)
    rows = [] if has_header else [_row(path, number, first, columns, len(first))]
    rows += [_row(path, number, values, columns, len(first)) for number, values in lines]
    if not rows:
        raise SourceError(f"{path} has a header and no row; write a row for each image")
    return Table(path, split, "x1" in columns, tuple(rows))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number and the fields of each line that is not empty."""
    text = read_text(path)
    if path.suffix.lower() == ".txt":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, line.rsplit(maxsplit=1)  # a path may have spaces
        return
    first = text.partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else "," if "," in first or ";" not in first else ";"
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield reader.line_num, [field.strip() for field in fields]
    except csv.Error as error:
        raise SourceError(f"{path}, line {reader.line_num}: it is no CSV ({error}); correct the line") from None


def _columns(path: Path, first: Sequence[str], given: str | None) -> tuple[dict[str, int], bool]:
    """The position of each kind of column, and whether the first line is a header."""
    if given is not None:
        found = {}
        for item in given.split(","):
            kind, _, name = item.partition(":")
            if name not in first:
                raise SourceError(
                    f"{path}: option columns names {name!r}, expected one of its columns {', '.join(first)[:200]}"
                )
            found[kind] = first.index(name)
        return _complete(path, found, first), True
    plain = [plain_name(name) for name in first]
    found = {}
    for kind, usual in _USUAL.items():
        positions = [position for position, name in enumerate(plain) if name in usual]
        if len(positions) > 1 and {"path", "label"} & {kind}:
            raise SourceError(
                f"{path}: columns {first[positions[0]]!r} and {first[positions[1]]!r} can both be the {kind}; choose "
                "one "
                f"by --option columns={kind}:{first[positions[0]]},..."
            )
        if positions:
            found[kind] = positions[0]
    if "path" in found or "label" in found:
        return _complete(path, found, first), True
    if len(first) not in _WITHOUT_HEADER:
        raise SourceError(
            f"{path}, line 1 has {len(first)} columns without a header that is known ({', '.join(first)[:200]}); "
            "expected "
            "path,label or path,label,split or path,x1,y1,x2,y2,class; name them by --option "
            "columns=path:NAME,label:NAME"
        )
    return {kind: position for position, kind in enumerate(_WITHOUT_HEADER[len(first)])}, False


def _complete(path: Path, found: dict[str, int], first: Sequence[str]) -> dict[str, int]:
    needed = ("path", "label", *(_EDGES if set(_EDGES) & set(found) else ()))
    lacking = [kind for kind in needed if kind not in found]
    if lacking:
        raise SourceError(
            f"{path} has no column that is known as {' or '.join(lacking)} (it has {', '.join(first)[:200]}); name "
            "it by "
            f"--option columns={','.join(f'{kind}:NAME' for kind in COLUMNS if kind in needed)}"
        )
    return found


def _row(path: Path, number: int, values: Sequence[str], columns: Mapping[str, int], width: int) -> Row:
    where = f"{path}, line {number}"
    if len(values) != width:
        raise SourceError(f"{where} has {len(values)} columns, expected {width} as in the first line; correct the line")
    value = {kind: values[position] for kind, position in columns.items()}
    if not value["path"]:
        raise SourceError(f"{where} names no image; write its path, or remove the line")
    edges = [value[kind] for kind in _EDGES if kind in value]
    empty = bool(edges) and not any(edges) and not value["label"]
    if not value["label"] and not empty:
        raise SourceError(f"{where}: image {short(value['path'])} has no class; write it, or remove the line")
    box = _edges(where, edges) if edges and not empty else None
    stated = [plain_number(value.get(kind, "")) for kind in ("height", "width")]
    size = (stated[0], stated[1]) if stated[0] is not None and stated[1] is not None else None
    return Row(where, value["path"], value["label"], value.get("split"), value.get("group"), box, size)


def _edges(where: str, texts: Sequence[str]) -> tuple[float, float, float, float]:
    values = []
    for kind, text in zip(_EDGES, texts, strict=True):
        number = plain_number(text)
        if number is None:
            raise SourceError(f"{where}: {kind} is {short(text)}, expected a number of pixels; correct the line")
        values.append(number)
    x1, y1, x2, y2 = values
    if x2 < x1 or y2 < y1:
        raise SourceError(
            f"{where}: the box is {x1:g}, {y1:g}, {x2:g}, {y2:g}, expected x1, y1, x2, y2 with x2 of at least x1 and "
            "y2 of "
            "at least y1; correct the line (a width is no edge)"
        )
    return x1, y1, x2, y2
