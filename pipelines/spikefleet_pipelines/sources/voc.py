"""Data sets in Pascal VOC's format (Everingham et al., VOC2012 Development Kit, section 4 and the annotation schema).

Each image has an XML file `annotation` with `object`s: `name` and `bndbox` of `xmin`, `ymin`, `xmax`, `ymax`, the first
and the last pixel of the object, counted from 1. So a box is x = xmin - 1, y = ymin - 1, width = xmax - xmin + 1,
height = ymax - ymin + 1. With `first_pixel=0`, for programs that write the edges of the box from 0, it is xmin, ymin,
xmax - xmin, ymax - ymin. Classes are numbered from 1 in the order of their names. Parts of objects, poses, and masks
are not used.

Layouts: the VOCdevkit (`ImageSets/Main/train.txt` names the images); folders `train`, `valid` or `val`, `test` of
images and XML files (Roboflow); `Annotations` and `images` or `JPEGImages` (Label Studio), or images and XML files in
one folder (LabelImg), of which a part is held out for val.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.box_rows import Box, FoundImage, boxed_contents, drop_repeated
from spikefleet_pipelines.sources.boxed_images import BoxedContents
from spikefleet_pipelines.sources.own_splits_config import SPLIT_FOLDERS, only_place
from spikefleet_pipelines.sources.text_files import plain_number, read_text, short
from spikefleet_pipelines.sources.voc_config import VOC, VocOptions
from spikefleet_pipelines.sources.xml_elements import Element, read_xml
from spikefleet_pipelines.store.decode import upright_size
from spikefleet_pipelines.store.image_files import list_images
from spikefleet_pipelines.store.manifest import is_text

_ADVICE = "replace the file, or remove it and its .xml"
_MARKED = "objects that are marked as difficult"
_WITHOUT_XML = "image files without an .xml of their name"


@dataclass(frozen=True)
class _Labelled:
    """An image and its file of labels."""

    image: Path
    xml: Path


@dataclass(frozen=True)
class _Object:
    name: str
    box: Box


@dataclass(frozen=True)
class _Labels:
    """The content of a file of labels."""

    size: tuple[int, int] | None
    """Height and width that it states; None if it states none, or zeros as some programs write."""
    objects: tuple[_Object, ...]


def read_voc(root: Path, options: VocOptions, seed: int) -> BoxedContents:
    """Read labels and sizes of the images.

    Raises:
        SourceError: a file is missing or invalid; the message names file, line and value.
    """
    unused: Counter[str] = Counter()
    pairs = _find(_devkit(root), unused)
    labels = {split: [_read(one.xml, options, unused) for one in of_split] for split, of_split in pairs.items()}
    names = sorted({one.name for of_split in labels.values() for found in of_split for one in found.objects})
    if not names:
        raise SourceError(f"source 'voc': no .xml file of {root} has an object; give the folder with the labels")
    index = {name: label for label, name in enumerate(names)}
    splits = {
        split: [_image(one, found, index, unused) for one, found in zip(pairs[split], of_split, strict=True)]
        for split, of_split in labels.items()
    }
    ids = range(1, len(names) + 1)
    return boxed_contents(VOC.name, root, names, ids, splits, options, seed, unused, _ADVICE)


def _devkit(root: Path) -> Path:
    """The folder of the year, where the root is that of the VOCdevkit."""
    if (root / "VOCdevkit").is_dir():
        root = root / "VOCdevkit"
    years = sorted(path for path in root.glob("VOC20[0-9][0-9]") if (path / "Annotations").is_dir())
    if len(years) > 1:
        raise SourceError(
            f"{root} has {', '.join(path.name for path in years)}; prepare each by itself: give {years[-1]} as ROOT"
        )
    return years[0] if years else root


def _find(root: Path, unused: Counter[str]) -> dict[str, list[_Labelled]]:
    lists = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val", "test")}
    if lists["train"].is_file():
        folder = _images_folder(root)
        by_name = {path.stem: path for path in list_images(folder).images}
        return {split: _listed(path, root, by_name, folder) for split, path in lists.items() if path.is_file()}
    folders = {}
    for split, names in SPLIT_FOLDERS.items():
        if (place := only_place(root, split, [root / name for name in names if (root / name).is_dir()])) is not None:
            folders[split] = place
    if "train" in folders:
        return {split: _in_folder(folder, unused) for split, folder in folders.items()}
    return {"train": _in_folder(root, unused)}


def _images_folder(root: Path) -> Path:
    return next((root / name for name in ("JPEGImages", "images", "Images") if (root / name).is_dir()), root)


def _listed(path: Path, root: Path, images: dict[str, Path], folder: Path) -> list[_Labelled]:
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        name = line.strip()
        if not name:
            continue
        if name not in images:  # lists of one class have -1, 0 or 1 after the name, which may have spaces
            name = re.sub(r"\s+(-1|0|1)$", "", name)
        image, xml = images.get(name), root / "Annotations" / f"{name}.xml"
        if image is None:
            raise SourceError(
                f"{path}, line {number}: image {short(name)} is not in {folder}; add it, or remove the line"
            )
        if not xml.is_file():
            raise SourceError(f"{path}, line {number}: {xml} is missing; add it, or remove the line")
        found.append(_Labelled(image, xml))
    if not found:
        raise SourceError(f"{path} names no image; write the names of the images, one a line, or remove the file")
    return found


def _in_folder(folder: Path, unused: Counter[str]) -> list[_Labelled]:
    """The images of a folder that have an XML file, in it or in `Annotations` beside them."""
    places = [place for name in ("Annotations", "annotations", "") if (place := folder / name).is_dir()]
    found = []
    listed = list_images(_images_folder(folder))
    for image in listed.images:
        names = [place / f"{image.stem}{suffix}" for place in places for suffix in (".xml", ".XML")]
        xml = next(filter(Path.is_file, names), None)
        if xml is None:
            unused[_WITHOUT_XML] += 1
        else:
            found.append(_Labelled(image, xml))
    unused.update(reason for path, reason in listed.unused if path.suffix.lower() != ".xml")
    if not found:
        raise SourceError(
            f"source 'voc': {_images_folder(folder)} has {len(listed.images):,} images, of which none has an .xml of "
            "its "
            f"name beside it or in {folder / 'Annotations'}; put the labels there"
        )
    return found


def _read(path: Path, options: VocOptions, unused: Counter[str]) -> _Labels:
    top = read_xml(path)
    if top.name != "annotation":
        raise SourceError(
            f"{path}, line {top.line}: it is <{top.name[:40]}>, expected <annotation>; give a file of labels"
        )
    found = []
    for element in top.all("object"):
        if _text(element, "difficult") == "1" and not options.difficult:
            unused[_MARKED] += 1
            continue
        name = _text(element, "name")
        if not is_text(name):
            raise SourceError(f"{path}, line {element.line}: the object has no <name>; name its class, or remove it")
        found.append(_Object(name, _box(path, element, options.first_pixel)))
    return _Labels(_size(top), tuple(found))


def _text(element: Element, name: str) -> str:
    child = element.find(name)
    return "" if child is None else child.text.strip()


def _box(path: Path, element: Element, first: int) -> Box:
    box = element.find("bndbox")
    if box is None:
        raise SourceError(f"{path}, line {element.line}: the object has no <bndbox>; add its box, or remove it")
    left, top, right, bottom = (_edge(path, box, name) for name in ("xmin", "ymin", "xmax", "ymax"))
    for low, high, axis in ((left, right, "x"), (top, bottom, "y")):
        if high < low:
            raise SourceError(
                f"{path}, line {box.line}: {axis}max is {high:g} and {axis}min {low:g}, expected {axis}max of at least "
                f"{axis}min; correct the box"
            )
        if low < first:
            also = ", or set --option first_pixel=0 if all boxes count pixels from 0" if first else ""
            raise SourceError(
                f"{path}, line {box.line}: {axis}min is {low:g}, expected at least {first}, the number of the first "
                f"pixel; correct the box{also}"
            )
    return left - first, top - first, right - left + first, bottom - top + first


def _edge(path: Path, box: Element, name: str) -> float:
    text = _text(box, name)
    value = plain_number(text)
    if value is None:
        raise SourceError(f"{path}, line {box.line}: {name} is {short(text)}, expected a number; correct the box")
    return value


def _size(top: Element) -> tuple[int, int] | None:
    size = top.find("size")
    texts = [] if size is None else [_text(size, "height"), _text(size, "width")]
    if not texts or not all(re.fullmatch(r"0*[1-9][0-9]{0,8}", text) for text in texts):
        return None
    return int(texts[0]), int(texts[1])


def _image(one: _Labelled, labels: _Labels, index: dict[str, int], unused: Counter[str]) -> FoundImage:
    height, width = upright_size(one.image) or (0, 0)
    objects = labels.objects
    image = FoundImage(one.image, height, width, [o.box for o in objects], [index[o.name] for o in objects])
    if labels.size is not None and height and labels.size != (height, width):
        raise SourceError(
            f"{one.xml} says {labels.size[1]} x {labels.size[0]} pixels (<size>), but {one.image.name} has {width} x "
            f"{height}, upright; the boxes are of another image: correct one of them"
        )
    drop_repeated(image, unused)
    return image
