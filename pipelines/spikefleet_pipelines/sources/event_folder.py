"""Recordings in class folders: train/<class>/, val/<class>/, test/<class>/, or <class>/ alone.

Splits are what the folders are named. Without a val folder the option `holdout` takes val out of train; without a test
folder `test` is another name of val.
"""

from collections import Counter
from pathlib import Path

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.finding import RECORDING_SUFFIXES
from spikefleet_pipelines.events.readers.options import ReadOptions, parse_sensor
from spikefleet_pipelines.sources.event_folder_config import EVENT_FOLDER, EventFolderOptions
from spikefleet_pipelines.sources.recording_files import (
    class_names,
    common_sensor,
    hold_out,
    labelled_files,
    without_empty,
)
from spikefleet_pipelines.sources.recordings import RecordingContents
from spikefleet_pipelines.store.event_format import EventFormat

_SPLITS = ("train", "val", "test")
_BESIDE = "files in no class folder"


def read_event_folder(root: Path, options: EventFolderOptions, seed: int) -> RecordingContents:
    """Find the recordings.

    Raises:
        SourceError: folders, classes or splits are not clear, or the size of the sensor is not stated or not the same.
    """
    folders = {name: root / name for name in _SPLITS if (root / name).is_dir()}
    if folders and "train" not in folders:
        raise SourceError(f"{root} has {' and '.join(folders)}, but no train; add train/<class>/ with recordings")
    folders = folders or {"train": root}
    classes = class_names(folders["train"])
    if not classes:
        raise EVENT_FOLDER.missing(root)
    _check_holdout(root, options.holdout, set(folders))
    for name, folder in folders.items():
        _check_same_classes(folders["train"], classes, folder, class_names(folder), name)
    unused = Counter(_BESIDE for folder in {root, *folders.values()} for path in folder.iterdir() if not path.is_dir())
    splits = {name: labelled_files(folder, classes, RECORDING_SUFFIXES, unused) for name, folder in folders.items()}
    given = ReadOptions(
        sensor=None if options.sensor is None else parse_sensor(options.sensor),
        time=options.time,
        columns=tuple(name.strip() for name in options.columns.split(",")) if options.columns else (),
        outside=options.outside,
        strict=options.strict,
        y_axis=options.y_axis,
        evt21=options.evt21,
    )
    sensor = common_sensor([file for files in splits.values() for file in files], given)
    if options.holdout is not None:
        splits["train"], splits["val"] = hold_out(splits["train"], options.holdout, seed)
    ordered = {name: splits.get(name, []) for name in _SPLITS}
    return RecordingContents(
        classes,
        without_empty(**ordered),
        EventFormat.of(sensor),
        given,
        options.empty,
        stand_ins={"test": "val"},
        unused=unused,
    )


def _check_holdout(root: Path, holdout: float | None, folders: set[str]) -> None:
    if "val" in folders and holdout is not None:
        raise SourceError(f"option holdout={holdout:g}: {root / 'val'} is val; leave the option or the folder out")
    if folders == {"train"} and holdout is None:
        raise SourceError(
            f"{root} has neither val nor test; add val/<class>/ beside train/<class>/, or say which fraction of each "
            "class becomes val, for example --option holdout=0.1"
        )


def _check_same_classes(
    train: Path, classes: tuple[str, ...], folder: Path, others: tuple[str, ...], split: str
) -> None:
    only = [
        f"only in {name}: {', '.join(sorted(extra)[:5])}{' ...' if len(extra) > 5 else ''}"
        for name, extra in (("train", set(classes) - set(others)), (split, set(others) - set(classes)))
        if extra
    ]
    if only:
        raise SourceError(
            f"class folders of {train} and {folder} differ ({'; '.join(only)}); give both the same classes"
        )
