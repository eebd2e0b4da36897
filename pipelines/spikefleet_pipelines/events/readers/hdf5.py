""".h5 through h5py: a group `events` or the top level with t, x, y, p, or such a compound data set."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.fields import BLOCK, FieldValues, choose_fields
from spikefleet_pipelines.events.readers.options import DEFAULT_OPTIONS, FIELDS, ReadOptions
from spikefleet_pipelines.events.readers.reader import Decoded, EventReader, damaged, reading
from spikefleet_pipelines.events.recording import Sensor

_ECF = 0x8ECF
_GROUP = "events"
_ECF_PLACE = "CD/events"
_MOST_EXPANSION = 1100  # of a compressed data set, as zlib's


def read_hdf5(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> EventReader:
    """Open a .h5 file.

    Raises:
        SourceError: h5py is not installed, the file cannot be read, is compressed by a filter that is missing (such as
            the vendor's ECF), or its fields are not clear.
    """
    with _opened(path) as file:
        _find_fields(path, file, options)
        sensor = _sensor(path, file)
    return EventReader(path, sensor, lambda audit: _decode(path, options), options)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise SourceError(
            f"{path} is HDF5, which needs h5py; install the extra: pip install 'spikefleet[hdf5]'"
        ) from error
    with suppress(ImportError):
        import hdf5plugin  # noqa: F401, registers blosc and others where it is installed
    with reading(path), path.open("rb"):
        pass
    try:
        with h5py.File(path, "r") as file:
            yield file
    except SourceError:
        raise
    except Exception as error:  # h5py passes on many classes of errors of the HDF5 library
        raise damaged(path, str(error)[:200] or type(error).__name__) from error


@dataclass(frozen=True)
class _Fields:
    """Where the fields of a file are: data sets by field, or one compound data set and the names in it."""

    sets: Mapping[str, Any]
    compound: Any = None
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def events(self) -> int:
        return len(self.compound) if self.compound is not None else max(map(len, self.sets.values()))

    def block(self, start: int) -> dict[str, Any]:
        if self.compound is None:
            return {name: self.sets[name][start : start + BLOCK] for name in FIELDS}
        rows = self.compound[start : start + BLOCK]
        return {name: rows[self.names[name]] for name in FIELDS}


def _find_fields(path: Path, file: Any, options: ReadOptions) -> _Fields:
    """Find the fields, and refuse what cannot be decoded or states more values than its bytes can hold."""
    place = _ECF_PLACE if _ECF_PLACE in file else _GROUP if _GROUP in file else "/"
    found = file[place]
    if hasattr(found, "dtype"):  # a data set
        if found.dtype.names is None:
            raise SourceError(f"{path}: {place} is {found.dtype} {list(found.shape)}, expected fields t, x, y and p")
        _check(path, place, found)
        return _Fields({}, found, choose_fields(path, found.dtype.names, options))
    names = [name for name in found if hasattr(found[name], "dtype")]
    sets = {name: found[chosen] for name, chosen in choose_fields(path, names, options).items()}
    for name, data_set in sets.items():
        _check(path, name, data_set)
    return _Fields(sets)


def _check(path: Path, name: str, data_set: Any) -> None:
    _refuse_filters(path, name, data_set)
    items = 1
    for side in data_set.shape:
        items *= int(side)
    stored = int(data_set.id.get_storage_size())
    if len(data_set.shape) != 1 or items * data_set.dtype.itemsize > stored * _MOST_EXPANSION:
        raise damaged(path, f"{name} states {list(data_set.shape)} {data_set.dtype} in {stored:,} bytes")


def _refuse_filters(path: Path, name: str, data_set: Any) -> None:
    import h5py

    properties = data_set.id.get_create_plist()
    for at in range(properties.get_nfilters()):
        number = int(properties.get_filter(at)[0])
        if number == _ECF:
            raise SourceError(
                f"{path} is compressed with the vendor's codec ECF, which only its own software decodes; convert it to "
                ".dat with the vendor's metavision_file_to_dat"
            )
        if not h5py.h5z.filter_avail(number):
            raise SourceError(
                f"{path}: {name} is compressed by filter {number}, which is not installed; install the extra: pip "
                "install 'spikefleet[hdf5]'"
            )


def _sensor(path: Path, file: Any) -> Sensor | None:
    """Return the size that data sets or attributes height and width state."""
    for place in (file, file.get(_GROUP, file)):
        attributes: Mapping[str, Any] = getattr(place, "attrs", {})
        sides = []
        for name in ("height", "width"):
            if name in attributes:
                sides.append(attributes[name])
            elif not hasattr(place, "dtype") and name in place and hasattr(place[name], "dtype"):
                sides.append(place[name][()])
        if sides:
            values = [int(side) for side in sides if getattr(side, "size", 1) == 1]
            if len(values) != 2 or min(values) < 1 or max(values) > 1 << 16:
                raise damaged(path, f"its height and width are {sides}")
            return values[0], values[1]
    return None


def _decode(path: Path, options: ReadOptions) -> Iterator[Decoded]:
    convert = FieldValues(path, options)
    with _opened(path) as file:
        fields = _find_fields(path, file, options)
        for start in range(0, fields.events, BLOCK):
            yield convert(fields.block(start))
