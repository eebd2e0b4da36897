"""Anybody's recordings of events in class folders; `event_folder.py` reads them."""

from typing import Literal

from pydantic import Field

from spikefleet_pipelines.sources.source import Source, SourceOptions

SENSOR = r"^[0-9]{1,5}x[0-9]{1,5}$"


class EventFolderOptions(SourceOptions):
    """What the files do not say; nothing is guessed."""

    holdout: float | None = Field(
        default=None,
        ge=0.0,
        lt=1.0,
        description="fraction of the training recordings of each class that becomes val, where there is no val folder",
    )
    columns: str = Field(
        default="",
        max_length=1000,
        description="order of unnamed columns, as x,y,t,p (- for one that is not read), or which named field is which, "
        "as t:time,x:col,y:row,p:sign",
    )
    time: Literal["us", "ms", "s"] = Field(default="us", description="unit of the times in files that do not state it")
    sensor: str | None = Field(
        default=None, pattern=SENSOR, description="HxW, size of the sensor in pixels, for files that do not state it"
    )
    outside: Literal["refuse", "drop"] = Field(
        default="refuse", description="drop leaves events outside the sensor out, and counts them"
    )
    empty: Literal["keep", "drop"] = Field(
        default="keep", description="drop leaves recordings without events out, and counts them"
    )
    y_axis: Literal["down", "up"] = Field(default="down", description="up: y is counted from below")
    evt21: Literal["little", "legacy"] | None = Field(
        default=None, description="order of the halves of EVT2.1 words, where the header does not state it"
    )
    strict: bool = Field(default=False, description="refuse files that end inside an event or have invalid events")


EVENT_FOLDER = Source(
    name="event_folder",
    description="recordings of an event camera in class folders: train/<class>/, val/<class>/, test/<class>/",
    reader="spikefleet_pipelines.sources.event_folder:read_event_folder",
    options=EventFolderOptions,
    files="train/<class>/, val/<class>/ and, if there is one, test/<class>/ with recordings (.dat, .raw, .bin, .aedat, "
    ".aedat4, .npy, .npz, .mat, .csv, .h5), or class folders alone, with option holdout,",
    events=True,
)
