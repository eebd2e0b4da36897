"""AEDAT 4 through the library `aedat` (MIT), which the extra `spikefleet[tonic]` brings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.options import DEFAULT_OPTIONS, ReadOptions
from spikefleet_pipelines.events.readers.reader import Decoded, EventReader, ReadAudit, damaged, reading
from spikefleet_pipelines.events.recording import Sensor


def read_aedat4(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> EventReader:
    """Open an AEDAT 4 file; a file that was cut is refused, since its packets are compressed.

    Raises:
        SourceError: the extra is not installed, the file cannot be read, or it has not exactly one stream of events.
    """
    sensor = _sensor(path, _streams(path, _decoder(path)))
    return EventReader(path, sensor, lambda audit: _decode(path, audit), options)


def _decoder(path: Path) -> Any:
    try:
        import aedat
    except ImportError as error:
        raise SourceError(
            f"{path} is AEDAT 4, which needs the library aedat; install the extra: pip install 'spikefleet[tonic]'"
        ) from error
    with reading(path), path.open("rb"):
        pass
    try:
        return aedat.Decoder(str(path))
    except Exception as error:  # the library raises its own classes
        raise damaged(path, _reason(error)) from error


def _streams(path: Path, decoder: Any) -> dict[int, dict[str, Any]]:
    try:
        return {int(key): dict(value) for key, value in decoder.id_to_stream().items()}
    except Exception as error:  # see above
        raise damaged(path, _reason(error)) from error


def _sensor(path: Path, streams: dict[int, dict[str, Any]]) -> Sensor | None:
    events = [stream for stream in streams.values() if stream.get("type") == "events"]
    if len(events) != 1:
        raise SourceError(
            f"{path} has {len(events)} streams of events, expected 1; export the stream to a file of its own"
        )
    height, width = events[0].get("height"), events[0].get("width")
    return (int(height), int(width)) if height and width else None


def _decode(path: Path, audit: ReadAudit) -> Iterator[Decoded]:
    packets = iter(_decoder(path))
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except Exception as error:  # see above
            raise damaged(path, _reason(error)) from error
        events = packet.get("events")
        if events is None:
            audit.other_words += 1
            continue
        yield Decoded(
            events["t"].astype(np.int64),
            events["x"].astype(np.uint16),
            events["y"].astype(np.uint16),
            events["on"].astype(np.uint8),
        )


def _reason(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__
