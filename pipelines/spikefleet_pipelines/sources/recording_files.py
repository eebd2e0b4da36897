"""Which files of a folder are recordings, of which class and split they are, and the size of their sensor."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.labelled_boxes import BOXES_SUFFIX
from spikefleet_pipelines.events.readers.options import ReadOptions
from spikefleet_pipelines.events.recording import Sensor
from spikefleet_pipelines.sources.contents import held_out
from spikefleet_pipelines.sources.recordings import RecordingFile, open_recording
from spikefleet_pipelines.store.manifest import is_text

_HIDDEN = "hidden files (names that start with a dot)"
_OTHER_SUFFIX = "files that are named as no recording"
_LABELS = "files of labels, beside recordings"
_FOLDER = "folders in a class folder"


def root_with(root: Path, inside: Sequence[str], needed: Sequence[str]) -> Path | None:
    """Return the directory that has the needed folders or files: the root, or one of those in it; None if none has.

    Args:
        root: as the user gave it.
        inside: names of folders that may be between it and the data, as archives and other programs make them.
        needed: what must be there.
    """
    for folder in (root, *(root / name for name in inside)):
        if all((folder / name).exists() for name in needed):
            return folder
    return None


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the class folders, sorted.

    Raises:
        SourceError: a name is not UTF-8.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        if not is_text(name):
            raise SourceError(f"class folder {name!r} of {folder} has a name that is not UTF-8; rename it")
    return tuple(names)


def labelled_files(
    folder: Path, classes: Sequence[str], suffixes: frozenset[str], unused: Counter[str]
) -> list[RecordingFile]:
    """List the recordings of all classes, by class and within it by name (as text).

    Args:
        folder: has a folder for each class.
        classes: names of the folders, in the order of the class indices.
        suffixes: of recordings, in lower case.
        unused: other files are counted here by reason.

    Raises:
        SourceError: a class folder is missing or has no recording.
    """
    files: list[RecordingFile] = []
    for label, name in enumerate(classes):
        place = folder / name
        if not place.is_dir():
            raise SourceError(f"class folder {place} is missing; add it, or give the directory that has all classes")
        found = []
        for path in sorted(place.iterdir(), key=lambda path: path.name):
            reason = _reason_unused(path, suffixes)
            unused.update([] if reason is None else [reason])
            if reason is None:
                found.append(RecordingFile(path, label))
        if not found:
            raise SourceError(
                f"class folder {place} contains no recording ({', '.join(sorted(suffixes))}); add recordings or remove "
                "it"
            )
        files += found
    return files


def hold_out(
    files: Sequence[RecordingFile], fraction: float, seed: int
) -> tuple[list[RecordingFile], list[RecordingFile]]:
    """Divide recordings into those that stay and those that are held out: a fraction of each class, by seeded hashes.

    Args:
        files: in their order.
        fraction: of each class, rounded to whole recordings.
        seed: of the choice.
    """
    labels = np.array([file.label for file in files], np.int64)
    chosen = held_out(labels, lambda count: round(count * fraction), seed).tolist()
    pairs = list(zip(files, chosen, strict=True))
    return [file for file, held in pairs if not held], [file for file, held in pairs if held]


def without_empty(**splits: Sequence[RecordingFile]) -> dict[str, Sequence[RecordingFile]]:
    """Splits that have recordings."""
    return {name: files for name, files in splits.items() if files}


def common_sensor(files: Sequence[RecordingFile], options: ReadOptions) -> Sensor:
    """Return the size of the sensor of all recordings; the conversion refuses those that do not state it.

    Raises:
        SourceError: two have different sizes, or none has a size, from its file or the options.
    """
    first: tuple[Path, Sensor] | None = None
    failed: SourceError | None = None
    for file in files:
        try:
            sensor = open_recording(file.path, options).require_sensor()
        except SourceError as error:
            failed = failed or error
            continue
        first = first or (file.path, sensor)
        if sensor != first[1]:
            raise SourceError(
                f"{first[0]} has sensor {_size(first[1])} and {file.path} has {_size(sensor)} (height x width), but a "
                "store holds recordings of one size; prepare each size from a directory of its own"
            )
    if first is None:
        raise failed or SourceError("there is no recording; add recordings")
    return first[1]


def _size(sensor: Sensor) -> str:
    return f"{sensor[0]}x{sensor[1]}"


def _reason_unused(path: Path, suffixes: frozenset[str]) -> str | None:
    """Why an entry of a class folder is no recording; None for a recording."""
    if path.name.startswith("."):
        return _HIDDEN
    if path.is_dir():
        return _FOLDER
    if path.name.endswith((BOXES_SUFFIX, "_labels.csv")):
        return _LABELS
    return None if path.suffix.lower() in suffixes else _OTHER_SUFFIX
