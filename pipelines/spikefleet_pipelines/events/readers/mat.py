""".mat of MATLAB 5, as ASL-DVS was published: variables ts, x, y, pol, each `[N, 1]`."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.blocks import head
from spikefleet_pipelines.events.readers.fields import BLOCK, FieldValues, choose_fields
from spikefleet_pipelines.events.readers.matlab5 import VariableStream, list_variables
from spikefleet_pipelines.events.readers.options import DEFAULT_OPTIONS, FIELDS, ReadOptions
from spikefleet_pipelines.events.readers.reader import Decoded, EventReader, damaged, reading

_HDF5 = b"MATLAB 7.3"


def read_mat(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> EventReader:
    """Open a .mat file.

    Raises:
        SourceError: it cannot be read, is of version 7.3, or its variables are not clear.
    """
    with _understood(path):
        if head(path, len(_HDF5)) == _HDF5:
            raise SourceError(
                f"{path} is of MATLAB 7.3 (HDF5); save it with save(..., '-v7'), or as .h5 with fields t, x, y, p"
            )
        variables = {variable.name: variable for variable in list_variables(path)}
    chosen = {field: variables[name] for field, name in choose_fields(path, list(variables), options).items()}
    for variable in chosen.values():
        if not variable.shape or variable.items not in (0, max(variable.shape)):
            raise SourceError(
                f"{path}: variable {variable.name} has sizes {list(variable.shape)}, expected one real number an event"
            )
    lengths = {variable.name: variable.items for variable in chosen.values()}
    if len(set(lengths.values())) > 1:
        raise SourceError(f"{path} has fields of different lengths {lengths}; give all of them one value an event")
    places = {field: variable.at for field, variable in chosen.items()}
    return EventReader(path, None, lambda audit: _decode(path, places, options), options)


def _decode(path: Path, places: dict[str, int], options: ReadOptions) -> Iterator[Decoded]:
    """Read the four variables side by side, so that memory stays that of a block."""
    convert = FieldValues(path, options)
    with _understood(path), ExitStack() as opened:
        streams = [opened.enter_context(VariableStream(path, places[field])) for field in FIELDS]
        for blocks in zip(*(stream.blocks(BLOCK) for stream in streams), strict=True):
            yield convert(dict(zip(FIELDS, blocks, strict=True)))


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    with reading(path):
        try:
            yield
        except SourceError:
            raise
        except (ValueError, struct.error, zlib.error) as error:
            raise damaged(path, str(error)) from error
