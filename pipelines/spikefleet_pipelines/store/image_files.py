"""Image files on disk: which files of a folder are images, why others are not, and their bytes."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from spikefleet_pipelines.store.image_header import IMAGE_SUFFIXES

MAX_FILE_BYTES = 1 << 29
"""Largest image file: no image of `MAX_PIXELS` needs as much."""

_HIDDEN = "hidden files (names that start with a dot)"
_OTHER_SUFFIX = "files that are named as no image"
_IN_FOLDER = "image files in a sub-folder"
_LINK = "links to folders"


@dataclass(frozen=True)
class FolderImages:
    """The files of a folder.

    Attributes:
        images: files that are named as images, in the order of their paths.
        unused: other files with the reason why they are no images of the folder, in the order of their paths.
    """

    images: tuple[Path, ...]
    unused: tuple[tuple[Path, str], ...]

    @property
    def summary(self) -> str:
        """Numbers of the unused files by reason, for messages."""
        return counted_reasons(Counter(reason for _, reason in self.unused))


def counted_reasons(unused: Mapping[str, int]) -> str:
    """Numbers of unused files by reason, as one line."""
    return "; ".join(f"{count:,} {reason}" for reason, count in sorted(unused.items()))


def is_named_as_image(path: Path) -> bool:
    """Whether the suffix of a file that is not hidden is one of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def reason_unused(path: Path) -> str:
    """Why a file that is not named as an image is not used."""
    return _HIDDEN if path.name.startswith(".") else _OTHER_SUFFIX


def list_images(folder: Path, recursive: bool = False, hidden: bool = False) -> FolderImages:
    """List the files of a folder that are named as images; a broken link that is named so is among them.

    Args:
        folder: an existing directory.
        recursive: list sub-folders too; without it their images are unused.
        hidden: list files whose names start with a dot too, where they are named as images.

    Raises:
        OSError: a folder cannot be read.
    """
    images: list[Path] = []
    unused: list[tuple[Path, str]] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.suffix.lower() not in IMAGE_SUFFIXES:
            inside = _of_sub_folder(path, recursive and not path.name.startswith("."), hidden)
            images += inside.images
            unused += inside.unused
        elif is_named_as_image(path) or (hidden and path.suffix.lower() in IMAGE_SUFFIXES):
            images.append(path)
        else:
            unused.append((path, reason_unused(path)))
    return FolderImages(tuple(images), tuple(unused))


def _of_sub_folder(folder: Path, recursive: bool, hidden: bool) -> FolderImages:
    # A link to a folder is not followed: it may lead to a folder above.
    if folder.is_symlink():
        return FolderImages((), ((folder, _LINK),))
    if recursive:
        return list_images(folder, recursive, hidden)
    return FolderImages((), tuple((path, _IN_FOLDER) for path in images_below(folder)))


def images_below(folder: Path) -> Iterator[Path]:
    """Iterate over the files in a folder and its sub-folders that are named as images; links are not followed."""
    for place, _, names in os.walk(folder):
        yield from (path for name in sorted(names) if is_named_as_image(path := Path(place, name)))


def check_image_file(path: Path) -> int:
    """Check that there is a file, and return its size in bytes; its content is not read.

    Raises:
        ValueError: it is a link to nothing, a folder, missing, empty, or too large; the message does not name it.
    """
    try:
        status = path.stat()
    except OSError as error:
        if path.is_symlink():
            raise ValueError(f"it is a link to {path.readlink()}, which does not exist") from None
        raise ValueError(error.strerror or str(error)) from None
    if path.is_dir():
        raise ValueError("it is a folder, although it is named as an image")
    if not path.is_file():
        raise ValueError("it is not a regular file")
    if not 0 < status.st_size <= MAX_FILE_BYTES:
        raise ValueError(f"the file has {status.st_size:,} bytes, expected 1 to {MAX_FILE_BYTES:,}")
    return status.st_size


def read_image_file(path: Path) -> bytes:
    """Read the bytes of an image file.

    Raises:
        ValueError: as for `check_image_file`, or the file cannot be read.
    """
    check_image_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
