"""DVS-CIFAR10: a folder of AEDAT 2.0 files, as published, or of AEDAT 4 files, as tonic has them, for each class.

The two releases may differ by a half turn and by polarity, so the manifest's orientation says which one a store is of.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.finding import find_reader
from spikefleet_pipelines.events.readers.options import ReadOptions
from spikefleet_pipelines.sources.dvs_cifar10_config import DVS_CIFAR10, DvsCifar10Options
from spikefleet_pipelines.sources.recording_files import hold_out, labelled_files, root_with, without_empty
from spikefleet_pipelines.sources.recordings import RecordingContents, RecordingFile
from spikefleet_pipelines.store.event_format import EventFormat

_SENSOR = (128, 128)
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SUFFIXES = frozenset({".aedat", ".aedat4"})
ORIENTATIONS = {"AEDAT 2.0": "aedat2-spikingjelly", "AEDAT 4": "aedat4"}
"""Format of a release -> how x, y and polarity are read from it."""
_FIRST_HUNDRED = 100


def read_dvs_cifar10(root: Path, options: DvsCifar10Options, seed: int) -> RecordingContents:
    """Find the recordings.

    Raises:
        SourceError: folders are missing, a class has no recording, files are of both releases or of neither, or a name
            has no number where the split needs it.
    """
    folder = root_with(root, ("CIFAR10DVS",), _CLASSES)
    if folder is None:
        raise DVS_CIFAR10.missing(root)
    unused: Counter[str] = Counter()
    every = labelled_files(folder, _CLASSES, _SUFFIXES, unused)
    rest, test = _divided(every, options.split_rule, seed)
    train, val = hold_out(rest, options.holdout, seed)
    return RecordingContents(
        _CLASSES,
        without_empty(train=train, val=val, test=test),
        EventFormat.of(_SENSOR, _orientation(every)),
        ReadOptions(sensor=_SENSOR),
        unused=unused,
    )


def _divided(files: Sequence[RecordingFile], rule: str, seed: int) -> tuple[list[RecordingFile], list[RecordingFile]]:
    """Divide recordings into those for training and those for test."""
    if rule == "random":
        return hold_out(files, 0.1, seed)
    rest: list[RecordingFile] = []
    test: list[RecordingFile] = []
    for label in range(len(_CLASSES)):
        of_class = [file for file in files if file.label == label]  # by name as text
        if rule == "sew":
            chosen = [place >= len(of_class) * 9 // 10 for place in range(len(of_class))]
        else:
            chosen = [_number(file.path) < _FIRST_HUNDRED for file in of_class]
        rest += [file for file, is_test in zip(of_class, chosen, strict=True) if not is_test]
        test += [file for file, is_test in zip(of_class, chosen, strict=True) if is_test]
    return rest, test


def _number(path: Path) -> int:
    found = re.search(r"([0-9]{1,9})$", path.stem)
    if found is None:
        raise SourceError(
            f"{path} has no number at the end of its name, which split_rule=first_hundred needs, as in "
            "cifar10_airplane_17.aedat; choose split_rule=sew or random"
        )
    return int(found[1])


def _orientation(files: Sequence[RecordingFile]) -> str:
    """Which release the files are of; the conversion refuses damaged ones by name."""
    first: tuple[Path, str] | None = None
    for file in files:
        try:
            found = find_reader(file.path).name
        except SourceError:
            continue
        first = first or (file.path, found)
        if found not in ORIENTATIONS or found != first[1]:
            raise SourceError(
                f"{first[0]} is {first[1]} and {file.path} is {found}, expected all AEDAT 2.0 or all AEDAT 4, which "
                "differ in orientation; give files of one release"
            )
    return ORIENTATIONS["AEDAT 2.0" if first is None else first[1]]
