"""The description of a data set in YOLO's format: `data.yaml`, or a file with one class name a line.

Fields of `data.yaml` that are read, by docs.ultralytics.com/datasets/detect and .../pose: `path` (directory of the data
set), `train`, `val` and `test` (a directory, a text file with a path on each line, or a list of those), `names` (a
list, or a mapping of 0 to K - 1), `nc` (K) and `kpt_shape`. Every scalar is text, so that a class `no` is not a
boolean. Nothing is downloaded or executed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.own_splits_config import SPLIT_FOLDERS, only_place
from spikefleet_pipelines.sources.text_files import place_below, read_text, short
from spikefleet_pipelines.sources.yolo_config import YOLO
from spikefleet_pipelines.store.image_files import images_below
from spikefleet_pipelines.store.manifest import is_text

_LARGEST_YAML = 1 << 20
_DEEPEST = 20
_NAMES = ("classes.txt", "obj.names", "predefined_classes.txt")
_ABSENT = ("", "~", "null")


@dataclass(frozen=True)
class YoloDescription:
    """Classes and places of a data set."""

    path: Path
    """The file that says it."""
    class_names: tuple[str, ...]
    places: Mapping[str, tuple[Path, ...]]
    """For each split, directories of images and text files that list images."""
    keypoints: int = 0
    """Numbers of keypoints after each box."""


def describe_yolo(root: Path, given: str | None) -> YoloDescription:
    """Find and read the description of a data set.

    Args:
        root: directory of the data set.
        given: name of the description; None to find it.

    Raises:
        SourceError: it is missing or invalid, or a place that it names does not exist.
    """
    path = _find(root, given)
    if path.suffix.lower() in (".yaml", ".yml"):
        return _read_yaml(root, path)
    places = {split: (place,) for split, place in _usual_places(root)}
    if "train" not in places:
        raise SourceError(
            f"{root} has no images; put them into {root / 'images'}, and the labels into {root / 'labels'}"
        )
    return YoloDescription(path, _checked(path, [name.strip() for name in read_text(path).split("\n")]), places)


def _find(root: Path, given: str | None) -> Path:
    if given is not None:
        if not (root / given).is_file():
            raise SourceError(f"source 'yolo': option yaml is {given!r}, but {root / given} is not a file; set another")
        return root / given
    found = [*root.glob("*.yaml"), *root.glob("*.yml")]
    yamls = sorted(path for path in found if not path.name.startswith("."))  # macOS writes ._NAME beside
    named = [path for path in yamls if path.stem == "data"] or yamls
    if len(named) > 1:
        raise SourceError(
            f"{root} has several descriptions ({', '.join(path.name for path in named)}); choose one by the option yaml"
        )
    for path in [*named, *(root / name for name in _NAMES), *(root / "labels" / name for name in _NAMES)]:
        if path.is_file():
            return path
    raise YOLO.missing(root / "data.yaml")


def _usual_places(root: Path) -> Iterator[tuple[str, Path]]:
    """The places of the splits, in the layouts that have no `data.yaml`."""
    for split, names in SPLIT_FOLDERS.items():
        of_names = [(root / "images" / name, root / name, root / f"{name}.txt") for name in names]
        there = [place for places in of_names if (place := next(filter(Path.exists, places), None)) is not None]
        place = only_place(root, split, there)
        if place is None and split == "train":
            place = next((one for one in (root / "images", root) if next(images_below(one), None) is not None), None)
        if place is not None:
            yield split, place


class _PlainLoader(yaml.BaseLoader):
    """Every scalar is text; refuses aliases, which can make a small file large, and duplicate keys."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.MarkedYAMLError(None, None, "an alias (*) is not read; write the value out", event.start_mark)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.MarkedYAMLError(None, None, f"it is nested deeper than {_DEEPEST}", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value!r} occurs twice; remove one", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(root: Path, path: Path) -> YoloDescription:
    text = read_text(path, _LARGEST_YAML)
    try:
        content = yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SourceError(f"{path}{where} is not YAML that can be read: {reason}") from None
    if not isinstance(content, dict):
        raise SourceError(f"{path} holds {short(content)}, expected fields train, val and names")
    names = _class_names(path, content)
    base = _base(path, content)
    places = {}
    for split in ("train", "val", "test"):
        entries = content.get(split)
        if entries is None and split == "val":
            entries = content.get("valid")
        if entries is None or entries in _ABSENT:
            continue
        entries = entries if isinstance(entries, list) else [entries]
        places[split] = tuple(_place(root, path, base, split, entry) for entry in entries)
    if "train" not in places:
        raise SourceError(f"{path}: field train is missing; name the directory of the training images")
    return YoloDescription(path, names, places, _keypoints(path, content.get("kpt_shape")))


def _class_names(path: Path, content: Mapping[str, Any]) -> tuple[str, ...]:
    names = content.get("names")
    if isinstance(names, dict):
        numbers = [str(number) for number in range(len(names))]
        if wrong := sorted(set(names) - set(numbers), key=str):
            raise SourceError(
                f"{path}: names has the key {short(wrong[0])}, expected 0 to {len(names) - 1}, one for each of its "
                f"{len(names)} classes; number the classes without gaps"
            )
        names = [names[number] for number in numbers]
    if not isinstance(names, list) or not names:
        raise SourceError(
            f"{path}: names is {short(names)}, expected a list of class names, or a mapping of 0 to K - 1"
        )
    checked = _checked(path, names)
    count = content.get("nc")
    if count is not None and count != str(len(checked)):
        raise SourceError(f"{path}: nc is {short(count)}, but names has {len(checked)} classes; correct one of them")
    return checked


def _checked(path: Path, names: list[Any]) -> tuple[str, ...]:
    while names and names[-1] == "":  # a line feed at the end of a file
        names = names[:-1]
    numbers: dict[str, int] = {}
    for position, name in enumerate(names):
        if not is_text(name):
            raise SourceError(f"{path}: class {position} has the name {short(name)}, expected text; name it")
        if numbers.setdefault(name, position) != position:
            raise SourceError(f"{path}: classes {numbers[name]} and {position} have the same name {name!r}; rename one")
    if not names:
        raise SourceError(f"{path} names no class; write one name on each line")
    return tuple(names)


def _keypoints(path: Path, shape: Any) -> int:
    if shape is None or shape in _ABSENT:
        return 0
    if isinstance(shape, list) and len(shape) == 2 and all(re.fullmatch(r"[0-9]{1,4}", str(part)) for part in shape):
        return int(shape[0]) * int(shape[1])
    raise SourceError(f"{path}: kpt_shape is {short(shape)}, expected [keypoints, 2 or 3]; correct or remove it")


def _base(path: Path, content: Mapping[str, Any]) -> Path:
    """The directory that the places are relative to: `path` where it is one here, else that of the file."""
    named = content.get("path")
    if isinstance(named, str) and named not in _ABSENT and "\0" not in named and (path.parent / named).is_dir():
        return path.parent / named
    return path.parent


def _place(root: Path, path: Path, base: Path, split: str, entry: Any) -> Path:
    if not is_text(entry):
        raise SourceError(f"{path}: {split} has {short(entry)}, expected a directory or a text file of paths")
    found = place_below(root, entry, (base, path.parent))
    if found is None:
        raise SourceError(
            f"{path}: {split} is {short(entry)}, which is not found in {root}; correct it, or remove it if there is no "
            f"such split"
        )
    return found
