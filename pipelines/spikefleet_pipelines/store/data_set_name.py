"""The name of a data set: what tracking, registry and reports call it.

A built-in or published set has the name of its source. Image folders and COCO's JSON may hold anybody's data: they have
the name of their folder, unless they are the published set of their format, which its classes and its number of images
identify. COCO 2017: the 80 categories with their ids and names, and 118,287 training images, 5,000 validation images,
or both; ImageNet-1k: the 1,000 WordNet ids as class folders, and 1,281,167 + 50,000 images. A part of such a set, or
other data in a folder of its name, is not that set: `own_coco`.

The name is no part of the content: renamed data keep their hash.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spikefleet_pipelines.errors import StoreError

LONGEST = 64
"""Characters of a name: with the name of a model family before it, it still is a name of a registered model."""

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST - 1}}}")
_PREPARED = re.compile(r"(.+?)(-[0-9a-f]{12})?(-[0-9a-f]{8})?")
"""Directory of a store; `train` adds digests where it has options, other files, or is prepared again."""
_PARTS = frozenset({"images", "train", "train2017", "val", "val2017", "valid", "test", "annotations"})
"""Folders that are named after their part of a data set."""


@dataclass(frozen=True)
class _Published:
    """The published data set of a format."""

    name: str
    classes: str
    """SHA-256 over the lines `ID NAME`, or `NAME` without category ids, in the order of the classes."""
    images: frozenset[int]
    """Its numbers of images, over all splits that are there."""


_FORMATS = {
    "coco": _Published(
        "coco",
        "bec11bedfa4a658f10d0867545dfd3e345684d9cf2cafedea89c5757c2b8ae62",
        frozenset({118_287, 5_000, 118_287 + 5_000}),
    ),
    "image_folder": _Published(
        "imagenet",
        "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd",
        frozenset({1_281_167 + 50_000}),
    ),
}
"""Sources that read anybody's data, with the published data set of each."""


_UNPUBLISHED = frozenset({"csv", "event_folder", "npz", "parquet", "tonic", "voc", "webdataset", "yolo"})
"""Sources that read anybody's data in a format without a published data set."""

PUBLISHED = frozenset(
    {
        "apparent_motion", "asl_dvs", "cifar10", "cifar100", "coco", "digits", "dvs_cifar10", "dvs_gesture",
        "fashion_mnist", "first_digit", "gen1", "imagenet", "ncaltech101", "ncars", "nmnist", "saccade_scenes",
        "saccades", "scenes",
    }
)  # fmt: skip
"""Names that stand for one data set, which anybody's data do not get from their folder."""


def without_digests(store: str) -> str:
    """Return the name of a store's directory without the digests that `train` adds."""
    found = _PREPARED.fullmatch(store)
    return store if found is None else found[1]


def is_data_set_name(name: str) -> bool:
    """Whether a text may be the name of a data set."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def check_data_set_name(name: str) -> str:
    """Return the name. Raises StoreError unless it can become a part of a registered model's name."""
    if not is_data_set_name(name):
        raise StoreError(
            f"name {name[:100]!r} of a data set must have 1 to {LONGEST} letters, digits, '.', '_' or '-', start with "
            "a letter or digit, and have no '..'; set another --name"
        )
    return name


def published_name(
    source: str, class_names: Sequence[str], category_ids: Sequence[int] | None, images: int
) -> str | None:
    """Return the name that data have by themselves, wherever they are; None for anybody's data.

    Args:
        source: name of the source that read them.
        class_names: in the order of the class indices.
        category_ids: the id of each class, for detection.
        images: number of images, over all splits that have their own.
    """
    known = _FORMATS.get(source)
    if known is None:
        return None if source in _UNPUBLISHED else source
    lines = class_names if category_ids is None else map("{} {}".format, category_ids, class_names)
    same = images in known.images and hashlib.sha256("\n".join(lines).encode()).hexdigest() == known.classes
    return known.name if same else None


def name_after(folder: Path, source: str) -> str:
    """Return the name of anybody's data: that of their folder, as far as a name may hold its characters.

    Args:
        folder: directory of the data. One that is named after a part of them, such as `train`, stands for the one
            above it.
        source: name of the source that reads them; their name where nothing is left of the folder's.
    """
    folder = folder.absolute()  # as it was named, whatever it links to
    if ".." in folder.parts:
        folder = folder.resolve()
    while folder.name.casefold() in _PARTS:
        folder = folder.parent
    plain = unicodedata.normalize("NFKD", folder.name).encode("ascii", "ignore").decode()
    plain = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "_", plain))
    name = plain.lstrip("._-")[:LONGEST].rstrip("._-") or source
    return f"own_{name}"[:LONGEST] if name.casefold() in PUBLISHED else name
