"""ASL-DVS: a folder of .mat files for each letter; y is counted from below."""

from collections import Counter
from pathlib import Path

from spikefleet_pipelines.events.readers.options import ReadOptions
from spikefleet_pipelines.sources.asl_dvs_config import ASL_DVS, AslDvsOptions
from spikefleet_pipelines.sources.recording_files import hold_out, labelled_files, root_with, without_empty
from spikefleet_pipelines.sources.recordings import RecordingContents
from spikefleet_pipelines.store.event_format import EventFormat

_SENSOR = (180, 240)
_LETTERS = tuple("abcdefghiklmnopqrstuvwxy")  # j and z are movements


def read_asl_dvs(root: Path, options: AslDvsOptions, seed: int) -> RecordingContents:
    """Find the recordings.

    Raises:
        SourceError: folders are missing, or a letter has no recording.
    """
    folder = root_with(root, ("ASLDVS",), _LETTERS)
    if folder is None:
        raise ASL_DVS.missing(root)
    unused: Counter[str] = Counter()
    rest, test = hold_out(labelled_files(folder, _LETTERS, frozenset({".mat"}), unused), options.test, seed)
    train, val = hold_out(rest, options.holdout, seed)
    return RecordingContents(
        _LETTERS,
        without_empty(train=train, val=val, test=test),
        EventFormat.of(_SENSOR),
        ReadOptions(sensor=_SENSOR, y_axis="up"),
        unused=unused,
    )
