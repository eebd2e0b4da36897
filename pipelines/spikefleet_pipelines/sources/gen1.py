"""Gen1: train/, val/ and test/ with pairs NAME_td.dat and NAME_bbox.npy.

All boxes are stored: which of them count is a matter of the evaluation.
"""

from pathlib import Path

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.labelled_boxes import pair_recordings
from spikefleet_pipelines.events.readers.options import ReadOptions
from spikefleet_pipelines.sources.gen1_config import GEN1
from spikefleet_pipelines.sources.recording_files import root_with
from spikefleet_pipelines.sources.recordings import RecordingContents, RecordingFile
from spikefleet_pipelines.sources.source import SourceOptions
from spikefleet_pipelines.store.event_format import EventFormat

_SENSOR = (240, 304)
_SPLITS = ("train", "val", "test")
_CLASSES = ("car", "pedestrian")


def read_gen1(root: Path, options: SourceOptions, seed: int) -> RecordingContents:
    """Find the recordings.

    Raises:
        SourceError: a folder is missing or empty, or a file has no partner.
    """
    folder = root_with(root, (), _SPLITS)
    if folder is None:
        raise GEN1.missing(root)
    splits = {}
    for name in _SPLITS:
        pairs = pair_recordings(folder / name)
        if not pairs:
            raise SourceError(f"{folder / name} has no recording NAME_td.dat; add the pairs of this split")
        splits[name] = [RecordingFile(events, boxes=boxes) for events, boxes in pairs]
    return RecordingContents(
        _CLASSES,
        splits,
        EventFormat.of(_SENSOR),
        ReadOptions(sensor=_SENSOR),
        category_ids=tuple(range(len(_CLASSES))),
    )
