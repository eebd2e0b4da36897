"""Which source reads a directory: its layout says it, as exports of labelling programs and published sets have it."""

from collections.abc import Callable, Iterator
from pathlib import Path

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.own_splits_config import SPLIT_FOLDERS
from spikefleet_pipelines.store.image_files import images_below

_OF_COCO = ("annotations/*.json", "instances_*.json", "*coco*.json")
"""Files of boxes that are named as people name them; which images are of which is not said."""

_SPLITS = tuple(name for names in SPLIT_FOLDERS.values() for name in names)


def source_of(root: Path) -> str:
    """Return the name of the source that reads a directory.

    Args:
        root: directory of images and labels.

    Raises:
        SourceError: it is no directory, no source is known by its layout, or several are.
    """
    if not root.is_dir():
        raise SourceError(f"{root} is not a directory; give the one with the images and the labels")
    found = [name for name, is_layout in _LAYOUTS.items() if is_layout(root)]
    if len(found) > 1:
        raise SourceError(
            f"{root} can be read as {' and as '.join(found)}; name the source: spikefleet data prepare {found[0]} "
            f"{root}"
        )
    if found:
        return found[0]
    if (boxes := next(filter(None, (next(root.glob(one), None) for one in _OF_COCO)), None)) is not None:
        raise SourceError(
            f"{root} has {boxes.relative_to(root)}; if that is COCO's format, prepare each split from its images and "
            f"its file: spikefleet data prepare coco --images DIR --annotations {boxes} --split train --out STORE"
        )
    if any(next(images_below(folder), None) for folder in _class_folders(root)):
        return "image_folder"
    inside = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    raise SourceError(
        f"{root} has no layout that is known (it holds {inside}); see `spikefleet data sources` for the files of "
        "each source"
    )


def _is_coco(root: Path) -> bool:
    names = [
        "result.json",
        "annotations/instances_train2017.json",
        *(f"{one}/_annotations.coco.json" for one in _SPLITS),
    ]
    return any((root / name).is_file() for name in names)


def _is_yolo(root: Path) -> bool:
    if any(root.glob("*.yaml")) or any(root.glob("*.yml")):
        return True
    names = ("classes.txt", "obj.names")
    return any((root / name).is_file() or (root / "labels" / name).is_file() for name in names)


def _is_voc(root: Path) -> bool:
    places = [root, root / "Annotations", *(root / name for name in _SPLITS)]
    kits = (root, root / "VOCdevkit")
    return any(next(place.glob("*.xml"), None) for place in places) or any(
        next(kit.glob("VOC20[0-9][0-9]/Annotations"), None) for kit in kits
    )


def _is_csv(root: Path) -> bool:
    names = [*(f"{one}/_annotations.csv" for one in _SPLITS)]
    return any((root / name).is_file() for name in names) or any(
        next(root.glob(pattern), None) for pattern in ("*.csv", "*.tsv")
    )


def _holds(pattern: str) -> Callable[[Path], bool]:
    """Such a file below the directory and no image, so that an archive beside images is none."""
    return lambda root: next(root.rglob(pattern), None) is not None and next(images_below(root), None) is None


def _class_folders(root: Path) -> Iterator[Path]:
    yield from (folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))


_LAYOUTS: dict[str, Callable[[Path], bool]] = {
    "coco": _is_coco,
    "yolo": _is_yolo,
    "voc": _is_voc,
    "csv": _is_csv,
    "parquet": _holds("*.parquet"),
    "webdataset": _holds("*.tar"),
    "npz": _holds("*.npz"),
}
