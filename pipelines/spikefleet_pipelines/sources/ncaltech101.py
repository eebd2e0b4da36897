"""N-Caltech101: Caltech101/ with a folder of .bin files for each class."""

from collections import Counter
from pathlib import Path

from spikefleet_pipelines.events.readers.options import ReadOptions
from spikefleet_pipelines.sources.ncaltech101_config import NCALTECH101, NCaltech101Options
from spikefleet_pipelines.sources.recording_files import (
    class_names,
    hold_out,
    labelled_files,
    root_with,
    without_empty,
)
from spikefleet_pipelines.sources.recordings import RecordingContents
from spikefleet_pipelines.store.event_format import EventFormat

_SENSOR = (180, 240)
_FOLDER = "Caltech101"


def read_ncaltech101(root: Path, options: NCaltech101Options, seed: int) -> RecordingContents:
    """Find the recordings.

    Raises:
        SourceError: folders are missing, or a class has no recording.
    """
    folder = root_with(root, ("NCALTECH101",), (_FOLDER,))
    classes = () if folder is None else class_names(folder / _FOLDER)
    if folder is None or not classes:
        raise NCALTECH101.missing(root)
    unused: Counter[str] = Counter()
    every = labelled_files(folder / _FOLDER, classes, frozenset({".bin"}), unused)
    rest, test = hold_out(every, options.test, seed)
    train, val = hold_out(rest, options.holdout, seed)
    return RecordingContents(
        classes,
        without_empty(train=train, val=val, test=test),
        EventFormat.of(_SENSOR),
        ReadOptions(sensor=_SENSOR),
        unused=unused,
    )
