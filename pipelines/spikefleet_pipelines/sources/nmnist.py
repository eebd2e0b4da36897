"""N-MNIST: Train/ and Test/ with a folder of .bin files for each digit."""

from collections import Counter
from pathlib import Path

from spikefleet_pipelines.events.readers.options import ReadOptions
from spikefleet_pipelines.sources.nmnist_config import NMNIST, NMnistOptions
from spikefleet_pipelines.sources.recording_files import hold_out, labelled_files, root_with, without_empty
from spikefleet_pipelines.sources.recordings import RecordingContents
from spikefleet_pipelines.store.event_format import EventFormat

_SENSOR = (34, 34)
_DIGITS = tuple(map(str, range(10)))


def read_nmnist(root: Path, options: NMnistOptions, seed: int) -> RecordingContents:
    """Find the recordings.

    Raises:
        SourceError: folders are missing, or a digit has no recording.
    """
    folder = root_with(root, ("NMNIST",), ("Train", "Test"))
    if folder is None:
        raise NMNIST.missing(root)
    unused: Counter[str] = Counter()
    given, test = (labelled_files(folder / name, _DIGITS, frozenset({".bin"}), unused) for name in ("Train", "Test"))
    train, val = hold_out(given, options.holdout, seed)
    return RecordingContents(
        _DIGITS,
        without_empty(train=train, val=val, test=test),
        EventFormat.of(_SENSOR),
        ReadOptions(sensor=_SENSOR),
        unused=unused,
    )
