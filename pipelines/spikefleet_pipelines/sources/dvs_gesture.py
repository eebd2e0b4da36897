"""DVS128 Gesture: recordings of several gestures as published, or one file a gesture as tonic has them.

As published, a gesture's recording is the events with start <= t < end of its label; gestures overlap in places.
Tonic's files have times in ms as floats, so a store of them has other events.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.gesture_labels import read_gesture_labels
from spikefleet_pipelines.events.readers.options import ReadOptions
from spikefleet_pipelines.events.readers.reader import reading
from spikefleet_pipelines.sources.contents import held_out
from spikefleet_pipelines.sources.dvs_gesture_config import DVS_GESTURE, DvsGestureOptions
from spikefleet_pipelines.sources.recording_files import root_with, without_empty
from spikefleet_pipelines.sources.recordings import RecordingContents, RecordingFile
from spikefleet_pipelines.store.event_format import EventFormat

_SENSOR = (128, 128)
_CLASSES = (
    "hand clapping", "right hand wave", "left hand wave", "right arm clockwise", "right arm counter clockwise",
    "left arm clockwise", "left arm counter clockwise", "arm roll", "air drums", "air guitar", "other gestures",
)  # fmt: skip
_LISTS = ("trials_to_train.txt", "trials_to_test.txt")
_TONIC = ("ibmGestureTrain", "ibmGestureTest")
_MOST_BYTES = 1 << 20


def read_dvs_gesture(root: Path, options: DvsGestureOptions, seed: int) -> RecordingContents:
    """Find the recordings.

    Raises:
        SourceError: a list, a listed file or a folder is missing, or a line of labels is wrong.
    """
    unused: Counter[str] = Counter()
    published = root_with(root, ("DvsGesture",), _LISTS)
    if published is not None:
        read_options = ReadOptions(sensor=_SENSOR)
        given, test = (_listed(published, name) for name in _LISTS)
    else:
        folder = root_with(root, ("DVSGesture",), _TONIC)
        if folder is None:
            raise DVS_GESTURE.missing(root)
        read_options = ReadOptions(sensor=_SENSOR, columns=("x", "y", "p", "t"), time="ms")
        given, test = (_of_tonic(folder / name, unused) for name in _TONIC)
    train, val = _hold_out_people(given, options.holdout, seed)
    return RecordingContents(
        _CLASSES,
        without_empty(train=train, val=val, test=test),
        EventFormat.of(_SENSOR),
        read_options,
        unused=unused,
    )


def _hold_out_people(
    files: list[RecordingFile], fraction: float, seed: int
) -> tuple[list[RecordingFile], list[RecordingFile]]:
    """Divide by people, as train and test are: gestures of one recording share events where they overlap."""
    people = sorted(set(map(_person, files)))
    chosen = held_out(np.zeros(len(people), np.int64), lambda count: round(count * fraction), seed).tolist()
    held = {person for person, one in zip(people, chosen, strict=True) if one}
    return [file for file in files if _person(file) not in held], [file for file in files if _person(file) in held]


def _person(file: RecordingFile) -> str:
    """Such as user07, of user07_led.aedat or user07_led/3.npy."""
    name = file.path.parent.name if file.between is None else file.path.stem
    return name.partition("_")[0]


def _listed(folder: Path, name: str) -> list[RecordingFile]:
    """The gestures of the recordings that a list names, one a line."""
    place = folder / name
    with reading(place):
        text = place.read_bytes()[:_MOST_BYTES].decode("utf-8", "replace")
    files = []
    for line in filter(None, map(str.strip, text.splitlines())):
        path = folder / line
        labels = path.with_name(f"{path.stem}_labels.csv")
        if "/" in line or "\\" in line or not path.is_file() or not labels.is_file():
            raise SourceError(
                f"{place} names {line[:100]!r}, which is not in {folder} with its _labels.csv; add both, or remove the "
                "line"
            )
        files += [
            RecordingFile(path, gesture.label, between=(gesture.start, gesture.end))
            for gesture in read_gesture_labels(labels)
        ]
    if not files:
        raise SourceError(f"{place} names no recording; give the original file")
    return files


def _of_tonic(folder: Path, unused: Counter[str]) -> list[RecordingFile]:
    """The files of all people, user*/CLASS.npy."""
    files = []
    for user in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        for path in sorted(user.iterdir()):
            if path.suffix == ".npy" and path.stem.isdecimal() and int(path.stem) < len(_CLASSES):
                files.append(RecordingFile(path, int(path.stem)))
            else:
                unused["files that are not named CLASS.npy with a class from 0 to 10"] += 1
    if not files:
        raise DVS_GESTURE.missing(folder)
    return files
