"""Any data set of tonic, read by tonic itself: its events and classes, in an order that is the same on every machine.

tonic lists folders in the directory's order, which differs between machines, so samples are sorted here: by the paths
of their files, or by class and content where a data set keeps its events in memory. tonic is GPL-3.0 while spikefleet
is Apache-2.0; it is an extra, imported here when such a data set is prepared, and nowhere else.
"""

import contextlib
import hashlib
import inspect
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.recording import EventArrays, Sensor
from spikefleet_pipelines.sources.contents import held_out
from spikefleet_pipelines.sources.source import Progress
from spikefleet_pipelines.sources.tonic_config import TONIC, TonicOptions
from spikefleet_pipelines.store.event_format import EventFormat
from spikefleet_pipelines.store.event_shard_writer import SourceRecording
from spikefleet_pipelines.store.event_writer import EventStoreWriter
from spikefleet_pipelines.store.manifest import is_text

_FIELDS = ("t", "x", "y", "p")
_MOST_CLASSES = 100_000


@dataclass(frozen=True)
class _Part:
    """The training or the test part of a data set, with the numbers of its samples in the order of the store."""

    samples: Any
    order: tuple[int, ...]
    labels: NDArray[np.int64]
    """Of the samples in that order, [n]."""

    def chosen(self, mask: NDArray[np.bool_]) -> "_Part":
        numbers = np.flatnonzero(mask)
        return _Part(self.samples, tuple(self.order[number] for number in numbers), self.labels[numbers])


@dataclass(frozen=True)
class TonicContents:
    """Recordings that tonic reads while the store is written."""

    data_set: str
    class_names: tuple[str, ...]
    splits: Mapping[str, _Part]
    events: EventFormat
    category_ids: tuple[int, ...] | None = None
    stand_ins: Mapping[str, str] = field(default_factory=dict)

    def write(self, writer: EventStoreWriter, progress: Progress, parallel: int | None) -> None:
        """Write all splits, in this process; see `EventContents`."""
        total, done = sum(len(part.order) for part in self.splits.values()), 0
        for split, part in self.splits.items():
            writer.write_recordings(split, self._recordings(split, part, done, total, progress))
            done += len(part.order)

    def _recordings(
        self, split: str, part: _Part, before: int, total: int, progress: Progress
    ) -> Iterator[SourceRecording]:
        for place, (number, label) in enumerate(zip(part.order, part.labels.tolist(), strict=True), 1):
            name = f"sample {number} of {self.data_set} ({split})"
            events = _events(name, _sample(self.data_set, part.samples, number)[0], self.events.layout.sensor)
            yield SourceRecording([events], label, name=name)
            progress(before + place, total)


def read_tonic(root: Path, options: TonicOptions, seed: int) -> TonicContents:
    """Open a data set of tonic.

    Raises:
        SourceError: tonic is not installed or has no such data set, files are missing, or samples are no events of
            pixels with a class.
    """
    name, of_tonic = _class(options.data_set)
    has_test = "train" in inspect.signature(of_tonic.__init__).parameters
    parts = {
        split: _open(name, of_tonic, root, options.download, split)
        for split in (("train", "test") if has_test else ("train",))
    }
    sensor, names = _sensor(name, parts["train"], options), _class_names(name, parts)
    train, test = _ordered(name, parts["train"], names), parts.get("test")
    if test is not None:
        reported = _ordered(name, test, names)
    else:
        chosen = held_out(train.labels, lambda count: round(count * options.test), seed)
        reported, train = train.chosen(chosen), train.chosen(~chosen)
    val = held_out(train.labels, lambda count: round(count * options.holdout), seed)
    splits = {"train": train.chosen(~val), "val": train.chosen(val), "test": reported}
    return TonicContents(
        name,
        tuple(names.values()),
        {split: part for split, part in splits.items() if part.order},
        EventFormat.of(sensor),
    )


def _class(name: str | None) -> tuple[str, Any]:
    try:
        from tonic import datasets
        from tonic.dataset import Dataset
    except ImportError as error:
        raise SourceError(
            f"source 'tonic' needs the library tonic ({error}); install the extra: pip install 'spikefleet[tonic]'"
        ) from None
    known = {key: one for key, one in vars(datasets).items() if inspect.isclass(one) and issubclass(one, Dataset)}
    if name is None or name not in known:
        what = "source 'tonic' reads many data sets" if name is None else f"tonic has no data set {name!r}"
        raise SourceError(f"{what}; set the option data_set to one of {', '.join(known)}")
    return name, known[name]


def _open(name: str, of_tonic: Any, root: Path, download: bool, split: str) -> Any:
    def refuse(*_: Any, **__: Any) -> None:
        raise TONIC.missing(root / name)

    # tonic names the folder after the class.
    kind = of_tonic if download else type(name, (of_tonic,), {"download": refuse})
    part = {"train": split == "train"} if "train" in inspect.signature(of_tonic.__init__).parameters else {}
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):  # it tells where to download by hand, and leaves the process
            return kind(save_to=str(root), **part)
    except SourceError:
        raise SourceError(
            f"{root} does not have the whole of tonic's {name} (its folder {name}/); put it there, or let tonic "
            "download it by --option download=true"
        ) from None
    except (Exception, SystemExit) as error:
        reason = " ".join(said.getvalue().split()) or f"{type(error).__name__}: {error}"
        raise SourceError(f"tonic cannot open {name} in {root}: {reason[:500]}") from None


def _sample(name: str, samples: Any, number: int) -> tuple[Any, Any]:
    try:
        events, target = samples[number]
    except Exception as error:
        raise SourceError(
            f"tonic cannot read sample {number} of {name} as events and a class ({type(error).__name__}: {error}); "
            "replace its file, or choose a data set with classes"
        ) from None
    return events, target


def _ordered(name: str, samples: Any, names: Mapping[Any, str]) -> _Part:
    count = len(samples)
    if not count:
        raise SourceError(f"tonic's {name} has no sample there; add its files")
    labels = _targets(name, samples)
    paths = getattr(samples, "data", None)
    keys: Sequence[Any]
    if isinstance(paths, list) and len(paths) == count and all(isinstance(path, str | os.PathLike) for path in paths):
        keys = [Path(path).as_posix() for path in paths]
    else:
        keys = [(str(labels[n]), _digest(_sample(name, samples, n)[0])) for n in range(count)]
    order = tuple(sorted(range(count), key=keys.__getitem__))
    index = {target: place for place, target in enumerate(names)}
    return _Part(samples, order, np.array([index[labels[number]] for number in order], np.int64))


def _targets(name: str, samples: Any) -> list[Any]:
    """The class of each sample, as tonic numbers or names it."""
    given = getattr(samples, "targets", None)
    count = len(samples)
    if given is None or len(given) != count:
        given = [_sample(name, samples, number)[1] for number in range(count)]
    plain = [one.item() if isinstance(one, np.generic) else one for one in given]
    wrong = next((number for number, one in enumerate(plain) if isinstance(one, bool) or not _is_class(one)), None)
    if wrong is not None:
        raise SourceError(
            f"sample {wrong} of tonic's {name} has the target {plain[wrong]!r:.60}, expected a class; its samples are "
            "not for classification"
        )
    return plain


def _is_class(one: Any) -> bool:
    return is_text(one) if isinstance(one, str) else isinstance(one, int) and 0 <= one < _MOST_CLASSES


def _class_names(name: str, parts: Mapping[str, Any]) -> dict[Any, str]:
    """Target -> name of its class, in the order of the class indices, for classes that have samples."""
    found = {target for samples in parts.values() for target in _targets(name, samples)}
    given = getattr(parts["train"], "classes", None)
    numbered = given.items() if isinstance(given, Mapping) else [(text, n) for n, text in enumerate(given or ())]
    known = {number: str(text) for text, number in numbered}
    if all(isinstance(target, int) for target in found):
        if found <= known.keys():
            return {number: known[number] for number in sorted(found)}
        return {number: str(number) for number in sorted(found)}
    return {text: str(text) for text in sorted(found, key=str)}


def _sensor(name: str, samples: Any, options: TonicOptions) -> Sensor:
    if options.sensor is not None:
        height, width = map(int, options.sensor.split("x"))
        return height, width
    size = getattr(samples, "sensor_size", None)
    if not isinstance(size, tuple) or len(size) != 3 or not all(isinstance(side, int) for side in size):
        raise SourceError(f"tonic does not state the sensor of {name}; set --option sensor=HxW")
    return size[1], size[0]


def _events(name: str, given: Any, sensor: Sensor) -> EventArrays:
    """The events of a sample, in the order of time."""
    names = getattr(getattr(given, "dtype", None), "names", None) or ()
    if lacking := [one for one in _FIELDS if one not in names]:
        raise SourceError(
            f"{name} has the fields {', '.join(names) or 'none'} and no {lacking[0]}: it is not of an event camera"
        )
    t, x, y, p = (np.asarray(given[one]).ravel() for one in _FIELDS)
    for axis, values, side in (("x", x, sensor[1]), ("y", y, sensor[0])):
        if len(values) and not (values.min() >= 0 and values.max() < side):
            raise SourceError(
                f"{name} has {axis} from {values.min()} to {values.max()}, but the sensor is {sensor[0]}x{sensor[1]} "
                "(height x width); set --option sensor=HxW"
            )
    order = np.argsort(t, kind="stable")
    on = (p[order] > 0).astype(np.uint8)
    return EventArrays(t[order].astype(np.int64), x[order].astype(np.uint16), y[order].astype(np.uint16), on)


def _digest(events: Any) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(events).tobytes(), digest_size=16).digest()
