"""N-Caltech101: Caltech101/ with a folder of .bin files for each class, and Caltech101_annotations/ with their boxes.

A recording has one box. It is that of the image, before the camera moves by up to 7 pixels and back; its label time is
the end of the three saccades.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.options import ReadOptions
from spikefleet_pipelines.sources.ncaltech101_config import NCALTECH101, NCaltech101Options
from spikefleet_pipelines.sources.recording_files import (
    class_names,
    hold_out,
    labelled_files,
    root_with,
    without_empty,
)
from spikefleet_pipelines.sources.recordings import RecordingContents, RecordingFile
from spikefleet_pipelines.store.event_format import EventFormat

_SENSOR = (180, 240)
_FOLDER, _BOXES = "Caltech101", "Caltech101_annotations"
_WITHOUT_BOXES = "BACKGROUND_Google"


def read_ncaltech101(root: Path, options: NCaltech101Options, seed: int) -> RecordingContents:
    """Find the recordings.

    Raises:
        SourceError: folders are missing, a class has no recording, or a recording or an annotation has no partner.
    """
    boxes = options.task == "detection"
    folder = root_with(root, ("NCALTECH101",), (_FOLDER, _BOXES) if boxes else (_FOLDER,))
    classes = () if folder is None else class_names(folder / _FOLDER)
    if boxes:
        classes = tuple(name for name in classes if name != _WITHOUT_BOXES)
    if folder is None or not classes:
        raise NCALTECH101.missing(root)
    unused: Counter[str] = Counter()
    every = labelled_files(folder / _FOLDER, classes, frozenset({".bin"}), unused)
    if boxes:
        every = [_with_box(file, folder / _BOXES / classes[file.label or 0]) for file in every]
        _refuse_boxes_alone(every, folder / _BOXES, classes)
    rest, test = hold_out(every, options.test, seed)
    train, val = hold_out(rest, options.holdout, seed)
    return RecordingContents(
        classes,
        without_empty(train=train, val=val, test=test),
        EventFormat.of(_SENSOR),
        ReadOptions(sensor=_SENSOR),
        category_ids=tuple(range(len(classes))) if boxes else None,
        unused=unused,
    )


def _with_box(file: RecordingFile, folder: Path) -> RecordingFile:
    boxes = folder / file.path.name.replace("image_", "annotation_", 1)
    if not boxes.is_file():
        raise SourceError(f"{file.path} has no {boxes}; add that file or remove the recording")
    return replace(file, boxes=boxes)


def _refuse_boxes_alone(files: Sequence[RecordingFile], folder: Path, classes: Sequence[str]) -> None:
    known = {file.boxes for file in files}
    for name in classes:
        for path in sorted((folder / name).glob("*.bin")):
            if path not in known:
                raise SourceError(f"{path} has no recording in {_FOLDER}/{name}; add it or remove the annotation")
