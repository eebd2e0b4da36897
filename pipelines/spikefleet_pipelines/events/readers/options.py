"""What a user says about recordings whose files do not say it: nothing is guessed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.recording import Sensor

TimeUnit = Literal["us", "ms", "s"]
Outside = Literal["refuse", "drop"]
YAxis = Literal["down", "up"]
Evt21Halves = Literal["little", "legacy"]

FIELDS = ("t", "x", "y", "p")
SKIPPED = "-"
"""Name of an unnamed column that is not read."""
MOST_PIXELS = 1 << 16  # of a side: coordinates are uint16


@dataclass(frozen=True)
class ReadOptions:
    """Options of all readers.

    Attributes:
        sensor: size of the sensor, for files without one. A file that has another size is refused.
        time: unit of the times in formats that have none (.npy, .npz, .mat, .csv, .h5).
        columns: names of unnamed columns in their order, "-" for one that is not read; or pairs "t:NAME", which say
            what the file's own field NAME is.
        outside: what becomes of events outside the sensor: the file is refused, or they are left out and counted.
        strict: refuse a file that ends inside an event or has events marked as invalid.
        y_axis: direction in which y is counted in the file; events always count it down.
        evt21: order of the 32-bit halves of EVT2.1 words, for headers that do not say it: "legacy" has the high half
            first.
    """

    sensor: Sensor | None = None
    time: TimeUnit = "us"
    columns: tuple[str, ...] = ()
    outside: Outside = "refuse"
    strict: bool = False
    y_axis: YAxis = "down"
    evt21: Evt21Halves | None = None

    def __post_init__(self) -> None:
        if self.columns:
            _check_columns(self.columns)


DEFAULT_OPTIONS = ReadOptions()


def parse_options(given: Mapping[str, str]) -> ReadOptions:
    """Options from text as on the command line: sensor=HxW, time=ms, columns=x,y,t,p, outside=drop, strict=true.

    Raises:
        SourceError: an option is unknown, or its value is not allowed.
    """
    known = {
        "sensor", "time", "columns", "outside", "strict", "y_axis", "evt21",
    }  # fmt: skip
    for name in given:
        if name not in known:
            raise SourceError(f"option {name!r} is unknown; set one of {', '.join(sorted(known))}")
    default = ReadOptions()
    return ReadOptions(
        sensor=parse_sensor(given["sensor"]) if "sensor" in given else None,
        time=_one_of(given, "time", get_args(TimeUnit), default.time),
        columns=tuple(name.strip() for name in given["columns"].split(",")) if "columns" in given else (),
        outside=_one_of(given, "outside", get_args(Outside), default.outside),
        strict=_one_of(given, "strict", ("true", "false"), "false") == "true",
        y_axis=_one_of(given, "y_axis", get_args(YAxis), default.y_axis),
        evt21=_one_of(given, "evt21", get_args(Evt21Halves), None),
    )


def parse_sensor(text: str) -> Sensor:
    """Parse "HxW".

    Raises:
        SourceError: it is not two numbers of pixels.
    """
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text.strip())
    sensor = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(0 < side <= MOST_PIXELS for side in sensor):
        raise SourceError(f"sensor={text} is not a size; set sensor=HxW in pixels, for example sensor=240x304")
    return sensor


def _one_of(given: Mapping[str, str], name: str, allowed: tuple[str, ...], default: Any) -> Any:
    value = given.get(name, default)
    if name in given and value not in allowed:
        raise SourceError(f"{name}={value} is not allowed; set {name} to {' or '.join(allowed)}")
    return value


def _check_columns(columns: tuple[str, ...]) -> None:
    fields = [name.partition(":")[0] for name in columns]
    pairs = [":" in name for name in columns]
    read = [name for name in fields if name != SKIPPED]
    if sorted(read) != sorted(FIELDS) or (any(pairs) and not all(pairs)):
        raise SourceError(
            f"columns={','.join(columns)} does not name t, x, y and p once each; set columns in their order, for "
            "example columns=x,y,t,p (- for one that is not read), or which field of the file each is, for example "
            "columns=t:time,x:col,y:row,p:sign"
        )
