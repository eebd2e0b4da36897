"""N-CARS: n-cars_train/ and n-cars_test/ with .dat files of cars and of background."""

from collections import Counter
from pathlib import Path

from spikefleet_pipelines.events.readers.options import ReadOptions, parse_sensor
from spikefleet_pipelines.sources.ncars_config import NCARS, NCarsOptions
from spikefleet_pipelines.sources.recording_files import hold_out, labelled_files, root_with, without_empty
from spikefleet_pipelines.sources.recordings import RecordingContents
from spikefleet_pipelines.store.event_format import EventFormat

_CLASSES = ("background", "cars")
_INSIDE = ("Prophesee_Dataset_n_cars", "NCARS")
_NAMES = (("n-cars_train", "n-cars_test"), ("train", "test"))


def read_ncars(root: Path, options: NCarsOptions, seed: int) -> RecordingContents:
    """Find the recordings.

    Raises:
        SourceError: folders are missing, or a class has no recording.
    """
    found = next(((place, names) for names in _NAMES if (place := root_with(root, _INSIDE, names))), None)
    if found is None:
        raise NCARS.missing(root)
    folder, names = found
    unused: Counter[str] = Counter()
    given, test = (labelled_files(folder / name, _CLASSES, frozenset({".dat"}), unused) for name in names)
    train, val = hold_out(given, options.holdout, seed)
    sensor = parse_sensor(options.sensor)
    return RecordingContents(
        _CLASSES,
        without_empty(train=train, val=val, test=test),
        EventFormat.of(sensor),
        ReadOptions(sensor=sensor),
        unused=unused,
    )
