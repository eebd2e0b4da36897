"""What is to be predicted, as it is named: files, folders, patterns, URIs, videos, and lists of them."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

from spikefleet.errors import UserError
from spikefleet.inference.cloud_images import cloud_entries, shown_uri
from spikefleet.inference.image_entry import FailedEntry, FileEntry, ImageEntry
from spikefleet.inference.video_frames import VideoEntry, is_video
from spikefleet_pipelines.store.image_files import counted_reasons, is_named_as_image, list_images, reason_unused
from spikefleet_pipelines.store.image_header import IMAGE_SUFFIXES

_PATTERN = re.compile(r"[*?[]")
_VIDEO = "videos, which are read where they are named themselves"


@dataclass
class ImageList:
    """Entries in the order in which they were named, and what of the folders is none."""

    entries: list[ImageEntry] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)

    @property
    def summary(self) -> str:
        """Numbers of other files in the folders by reason, such as images in sub-folders."""
        return counted_reasons(self.unused)

    @property
    def local(self) -> list[Path]:
        """The files on this machine."""
        return [entry.local for entry in self.entries if entry.local is not None]

    @property
    def has_videos(self) -> bool:
        """Whether there is a video among them, even one that cannot be read."""
        return any(is_video(entry.place) for entry in self.entries)

    @property
    def expected(self) -> int:
        """How many images there are, of videos as their headers say."""
        return sum(entry.frames or 1 for entry in self.entries)


def list_of_images(
    names: Sequence[str], *, listed: Iterable[str] | None = None, recursive: bool = False, every: int = 1
) -> ImageList:
    """Finds what names stand for.

    Args:
        names: files, folders, patterns (`photos/**/*.jpg`), URIs of `pyarrow.fs` (`s3://BUCKET/photos`), videos; `-`
            for those of `listed`.
        listed: more of them, but no patterns: programs write the names of files. One that is missing, that has no
            images or cannot be opened becomes an entry with the reason, so that the others have their answers.
        recursive: of folders, the images in sub-folders too.
        every: of videos, every `every`-th frame.

    Raises:
        UserError: something is missing, a folder or a pattern has no images, a URI cannot be opened, or there is no
            PyAV.
    """
    found = ImageList()
    for name in names:
        if name != "-":
            _add(found, name, recursive, every, listed=False)
            continue
        lines = [line for line in listed or () if line.strip()]
        if not lines:
            raise UserError("-: no image is listed on stdin; give one path a line")
        for line in lines:
            try:
                _add(found, line, recursive, every, listed=True)
            except (ValueError, OSError) as error:
                found.entries.append(_failed(line, error))
    return found


def _add(found: ImageList, name: str, recursive: bool, every: int, *, listed: bool) -> None:
    if "://" in name and not name.startswith("file://"):
        entries, unused = cloud_entries(name, recursive)
        found.entries += entries
        found.unused += unused
        return
    path = Path(unquote(urlparse(name).path)) if name.startswith("file://") else Path(name)
    if path.is_dir() and path.suffix.lower() not in IMAGE_SUFFIXES:
        _add_folder(found, path, recursive)
    elif path.exists() or path.is_symlink():
        found.entries.append(_of_file(path, PurePosixPath(path.name), every))
    elif listed:
        found.entries.append(FileEntry(path, PurePosixPath(path.name), str(path)))
    elif _PATTERN.search(name):
        _add_matches(found, name, every)
    else:
        raise UserError(f"image {name} does not exist")


def _failed(line: str, error: Exception) -> FailedEntry:
    path = Path(line)
    name = shown_uri(line) if "://" in line else line
    return FailedEntry(path if is_video(path) else None, PurePosixPath(path.name or "_"), name, str(error))


def _add_folder(found: ImageList, folder: Path, recursive: bool) -> None:
    """Hidden files that are named as images are among them, so that those of macOS beside each image are named."""
    inside = list_images(folder, recursive, hidden=True)
    video = next((path for path, _ in inside.unused if is_video(path)), None)
    if not inside.images and video is not None:
        pattern = folder / f"*{video.suffix}"
        raise UserError(f"folder {folder} has videos and no images; name the videos, or give a pattern: '{pattern}'")
    if not inside.images:
        others = f"; it has {inside.summary}" if inside.unused else ""
        raise UserError(f"folder {folder} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}){others}")
    found.entries += [
        FileEntry(path, PurePosixPath(path.relative_to(folder).as_posix()), str(path)) for path in inside.images
    ]
    found.unused.update(_VIDEO if is_video(path) else reason for path, reason in inside.unused)


def _add_matches(found: ImageList, pattern: str, every: int) -> None:
    paths = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207, takes whole patterns
    files = [path for path in paths if not path.is_dir()]
    images = [path for path in files if is_named_as_image(path) or is_video(path)]
    if not images:
        others = f"; the {len(paths):,} matches are folders or other files" if paths else ""
        raise UserError(f"pattern {pattern} matches no image{others}")
    fixed = Path(*Path(pattern).parts[: _first_pattern(pattern)])
    found.entries += [_of_file(path, PurePosixPath(path.relative_to(fixed).as_posix()), every) for path in images]
    chosen = set(images)
    found.unused.update(reason_unused(path) for path in files if path not in chosen)


def _first_pattern(pattern: str) -> int:
    return next(place for place, part in enumerate(Path(pattern).parts) if _PATTERN.search(part))


def _of_file(path: Path, place: PurePosixPath, every: int) -> ImageEntry:
    return VideoEntry.of(path, place, every) if is_video(path) else FileEntry(path, place, str(path))
