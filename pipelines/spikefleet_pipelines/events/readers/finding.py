"""The table of formats: which reader a file has, by its suffix and its first bytes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.aedat2 import read_aedat2
from spikefleet_pipelines.events.readers.aedat3 import read_aedat3
from spikefleet_pipelines.events.readers.aedat4 import read_aedat4
from spikefleet_pipelines.events.readers.atis_bin import read_atis_bin
from spikefleet_pipelines.events.readers.blocks import head
from spikefleet_pipelines.events.readers.csv_table import read_csv
from spikefleet_pipelines.events.readers.dat import read_dat
from spikefleet_pipelines.events.readers.hdf5 import read_hdf5
from spikefleet_pipelines.events.readers.labelled_boxes import BOXES_SUFFIX
from spikefleet_pipelines.events.readers.mat import read_mat
from spikefleet_pipelines.events.readers.numpy_files import read_npy, read_npz
from spikefleet_pipelines.events.readers.options import DEFAULT_OPTIONS, ReadOptions
from spikefleet_pipelines.events.readers.prophesee_raw import read_prophesee_raw
from spikefleet_pipelines.events.readers.reader import EventReader, reading

Read = Callable[[Path, ReadOptions], EventReader]


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        name: for messages.
        suffixes: of its files, in lower case.
        magic: first bytes of its files, one of these; none: any, but those of another format.
        read: opens a file.
    """

    name: str
    suffixes: tuple[str, ...]
    magic: tuple[bytes, ...]
    read: Read


FORMATS = (
    Format("Prophesee .dat", (".dat",), (), read_dat),
    Format("Prophesee RAW", (".raw",), (b"% ",), read_prophesee_raw),
    Format("N-MNIST .bin", (".bin",), (), read_atis_bin),
    Format("AEDAT 2.0", (".aedat", ".aedat2"), (b"#!AER-DAT2.0",), read_aedat2),
    Format("AEDAT 3.1", (".aedat", ".aedat3"), (b"#!AER-DAT3.1",), read_aedat3),
    Format("AEDAT 4", (".aedat4", ".aedat"), (b"#!AER-DAT4.0",), read_aedat4),
    Format(".npy", (".npy",), (b"\x93NUMPY",), read_npy),
    Format(".npz", (".npz",), (b"PK\x03\x04", b"PK\x05\x06"), read_npz),
    Format("MATLAB .mat", (".mat",), (), read_mat),
    Format(".csv", (".csv",), (), read_csv),
    Format("HDF5", (".h5", ".hdf5"), (b"\x89HDF\r\n\x1a\n",), read_hdf5),
)
RECORDING_SUFFIXES = frozenset(suffix for format_ in FORMATS for suffix in format_.suffixes)
"""Suffixes of all files that may be recordings, in lower case."""
_LONGEST_MAGIC = 16
_OWN_NAMES = ((BOXES_SUFFIX, "boxes"), ("_labels.csv", "labels"))


def find_reader(path: Path) -> Format:
    """Return the format of a file, by its suffix and its first bytes.

    Raises:
        SourceError: it cannot be read, its suffix is none of the table, or its content is that of another format.
    """
    for ending, what in _OWN_NAMES:
        if path.name.endswith(ending):
            raise SourceError(f"{path} holds {what}, not events; give the recording beside it")
    if path.name.startswith("annotation_") and path.suffix == ".bin":
        raise SourceError(f"{path} is an annotation, not events; give the recording image_*.bin")
    candidates = [format_ for format_ in FORMATS if path.suffix.lower() in format_.suffixes]
    if not candidates:
        raise SourceError(
            f"{path} has suffix {path.suffix!r}, expected one of {', '.join(sorted(RECORDING_SUFFIXES))}; convert it"
        )
    with reading(path):
        first = head(path, _LONGEST_MAGIC)
    by_content = [format_ for format_ in FORMATS if format_.magic and first.startswith(format_.magic)]
    for format_ in candidates:
        if format_ in by_content or (not format_.magic and not _is_other(format_, by_content)):
            return format_
    found = by_content[0].name if by_content else f"of no known format ({first[:8]!r})"
    raise SourceError(
        f"{path} is named as {' or '.join(format_.name for format_ in candidates)}, but its content is {found}; rename "
        "or replace it"
    )


def read_recording(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> EventReader:
    """Open a recording of any format.

    Raises:
        SourceError: as `find_reader`, or as the format's reader.
    """
    return find_reader(path).read(path, options)


def _is_other(format_: Format, by_content: Iterable[Format]) -> bool:
    # "% " starts the headers of both .dat and RAW; their own readers tell them apart.
    return any(other.magic != (b"% ",) for other in by_content) and format_.suffixes != (".bin",)
