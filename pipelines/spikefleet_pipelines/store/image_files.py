"""Image files on disk: which files of a folder are images, why others are not, and their bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spikefleet_pipelines.store.image_header import IMAGE_SUFFIXES

MAX_FILE_BYTES = 1 << 29
"""Largest image file: no image of `MAX_PIXELS` needs as much."""

_HIDDEN = "hidden files (names that start with a dot)"
_OTHER_SUFFIX = "files that are named as no image"
_IN_FOLDER = "image files in a sub-folder"


@dataclass(frozen=True)
class FolderImages:
    """The files of a folder.

    Attributes:
        images: files that are named as images, in the order of their paths.
        unused: other files with the reason why they are no images of the folder, in the order of their paths.
    """

    images: tuple[Path, ...]
    unused: tuple[tuple[Path, str], ...]


def list_images(folder: Path, recursive: bool = False) -> FolderImages:
    """List the files of a folder that are named as images; a broken link that is named so is among them.

    Args:
        folder: an existing directory.
        recursive: list sub-folders too; without it their images are unused.

    Raises:
        OSError: a folder cannot be read.
    """
    images: list[Path] = []
    unused: list[tuple[Path, str]] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") and not path.is_dir():
            unused.append((path, _HIDDEN))
        elif path.is_dir() and path.suffix.lower() not in IMAGE_SUFFIXES:
            inside = FolderImages((), ()) if path.name.startswith(".") else _of_sub_folder(path, recursive)
            images += inside.images
            unused += inside.unused
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            unused.append((path, _OTHER_SUFFIX))
        else:
            images.append(path)
    return FolderImages(tuple(images), tuple(unused))


def _of_sub_folder(folder: Path, recursive: bool) -> FolderImages:
    # A link to a folder is not followed: it may lead to a folder above.
    if folder.is_symlink():
        return FolderImages((), ((folder, "links to folders"),))
    if recursive:
        return list_images(folder, recursive)
    return FolderImages((), tuple((path, _IN_FOLDER) for path in _images_below(folder)))


def _images_below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            yield path


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
