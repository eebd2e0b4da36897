"""Tables of labels (RFC 4180 for .csv; tab-separated .tsv; .txt with `path label` on each line).

With a header, columns are found by their usual names, or by the option `columns`. Without one, a table has 2 columns
(path, label), 3 (path, label, split) or 6 (path, x1, y1, x2, y2, class: the format of keras-retinanet, whose images
without objects have five empty fields). Boxes are edges in pixels, from 0, of the image as it is seen, after its EXIF
rotation; an image with several objects has several rows, and columns `width` and `height` must be its size. Paths are
relative to the option `images`, the table's directory, or the root. Classes are in the order of their names (of their
values, if all are whole numbers), numbered from 1 for boxes.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.box_rows import FoundImage, boxed_contents, drop_repeated, path_below
from spikefleet_pipelines.sources.boxed_images import BoxedContents
from spikefleet_pipelines.sources.csv_rows import Row, Table, find_tables, read_table
from spikefleet_pipelines.sources.csv_table_config import CSV, CsvOptions
from spikefleet_pipelines.sources.labelled_images import LabelledContents, LabelledImages
from spikefleet_pipelines.sources.own_splits_config import SPLIT_FOLDERS
from spikefleet_pipelines.sources.split_rules import STAND_INS, divide_splits, group_names
from spikefleet_pipelines.sources.text_files import listed_path, short
from spikefleet_pipelines.store.decode import upright_size
from spikefleet_pipelines.store.manifest import is_text

_ADVICE = "replace the file, or remove its row"
_SPLIT_OF = {name: split for split, names in SPLIT_FOLDERS.items() for name in (*names, f"{split}ing")}


def read_csv(root: Path, options: CsvOptions, seed: int) -> LabelledContents | BoxedContents:
    """Read the tables of a directory.

    Raises:
        SourceError: a table is missing, or a row is invalid; the message names file, line and value.
    """
    tables = [read_table(path, split, options) for split, path in find_tables(root, options.table)]
    if len({table.with_boxes for table in tables}) > 1:
        names = " and ".join(table.path.name for table in tables)
        raise SourceError(f"source 'csv': of {names} in {root}, some have boxes and some have none; give both the same")
    if options.group is not None and any(row.group is not None for table in tables for row in table.rows):
        raise SourceError(
            f"source 'csv': option group={options.group!r}, but {tables[0].path.name} has a column of groups; remove "
            "one"
        )
    images = _by_image(root, tables, options)
    if "train" not in images:
        raise SourceError(f"source 'csv': no row of {tables[0].path} is of split train; correct the column of splits")
    classes = _classes(tables)
    if tables[0].with_boxes:
        return _boxes(root, images, classes, options, seed)
    return _labels(root, images, classes, options, seed)


def _by_image(root: Path, tables: Sequence[Table], options: CsvOptions) -> dict[str, dict[Path, list[Row]]]:
    """The rows of each image, by split."""
    of: dict[Path, tuple[str, list[Row]]] = {}
    for table in tables:
        bases = (root / options.images,) if options.images is not None else (table.path.parent, root)
        for row in table.rows:
            split = _split(row, table.split)
            path = listed_path(row.where, root, row.path, bases)
            there = of.setdefault(path, (split, []))
            if there[1] and (split != there[0] or row.group != there[1][0].group):
                raise SourceError(
                    f"{row.where}: image {short(row.path)} is of another split or group than at {there[1][0].where}; "
                    "correct one of them"
                )
            if there[1] and not table.with_boxes:
                raise SourceError(
                    f"{row.where}: image {short(row.path)} has a class at {there[1][0].where} already; remove one (an "
                    "image has one class)"
                )
            there[1].append(row)
    splits: dict[str, dict[Path, list[Row]]] = {}
    for name in ("train", "val", "test"):
        if found := {path: rows for path, (split, rows) in of.items() if split == name}:
            splits[name] = found
    return splits


def _split(row: Row, of_table: str | None) -> str:
    if of_table is not None or row.split is None:
        return of_table or "train"
    split = _SPLIT_OF.get(row.split.casefold())
    if split is None:
        raise SourceError(f"{row.where}: split is {short(row.split)}, expected train, val or test; correct the line")
    return split


def _classes(tables: Sequence[Table]) -> list[str]:
    names = {row.label: row for table in tables for row in table.rows if row.label}
    for name, row in names.items():
        if not is_text(name):
            raise SourceError(f"{row.where}: class {short(name)} is not Unicode text; rename it")
    if not names:
        raise SourceError(f"source 'csv': no row of {tables[0].path} has a class; write the classes")
    if all(name.isdecimal() for name in names):  # by value, without int(), which refuses thousands of digits
        return sorted(names, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name))
    return sorted(names)


def _labels(
    root: Path, images: dict[str, dict[Path, list[Row]]], classes: Sequence[str], options: CsvOptions, seed: int
) -> LabelledContents:
    index = {name: label for label, name in enumerate(classes)}
    given = {
        split: LabelledImages(tuple(found), np.array([index[rows[0].label] for rows in found.values()], np.int64))
        for split, found in images.items()
    }
    grouped = any(rows[0].group is not None for found in images.values() for rows in found.values())
    groups = {
        split: [rows[0].group or path_below(root, path) for path, rows in found.items()]
        if grouped
        else group_names(CSV.name, [path_below(root, path) for path in found], options.group)
        for split, found in images.items()
    }
    splits = divide_splits(CSV.name, given, given["train"].labels, groups, options, seed, grouped or None)
    return LabelledContents(tuple(classes), splits, stand_ins=STAND_INS, advice=_ADVICE)


def _boxes(
    root: Path, images: dict[str, dict[Path, list[Row]]], classes: Sequence[str], options: CsvOptions, seed: int
) -> BoxedContents:
    index = {name: label for label, name in enumerate(classes)}
    unused: Counter[str] = Counter()
    splits: dict[str, list[FoundImage]] = {}
    for split, found in images.items():
        splits[split] = []
        for path, rows in found.items():
            height, width = upright_size(path) or (0, 0)
            image = FoundImage(path, height, width, group=rows[0].group)
            for row in rows:
                if row.edges is not None:
                    _check_size(row, height, width)
                    x1, y1, x2, y2 = row.edges
                    image.boxes.append((x1, y1, x2 - x1, y2 - y1))
                    image.labels.append(index[row.label])
            drop_repeated(image, unused)
            splits[split].append(image)
    ids = range(1, len(classes) + 1)
    return boxed_contents(CSV.name, root, classes, ids, splits, options, seed, unused, _ADVICE)


def _check_size(row: Row, height: int, width: int) -> None:
    """Compare the size that a table states with that of the image: boxes of another size would be of other pixels."""
    if row.size is None or row.edges is None or not height:
        return
    x1, y1, x2, y2 = row.edges
    if row.size not in ((height, width), (y2 - y1, x2 - x1), (y2 - y1 + 1, x2 - x1 + 1)):
        raise SourceError(
            f"{row.where} says {row.size[1]:g} x {row.size[0]:g} pixels (width, height), but {short(row.path)} has "
            f"{width} x {height}, upright; the boxes are of another image: correct one of them, or remove the columns"
        )
