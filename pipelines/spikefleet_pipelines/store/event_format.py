"""Format and audit of the events in a store, as its manifest has them."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.events.words import WordLayout


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EventFormat(_Record):
    """Format of the words of all recordings."""

    sensor: tuple[int, int] = Field(description="height and width in pixels")
    address_bits: int = Field(description="low bits of a word: column, row, polarity")
    tick_bits: int = Field(description="high bits of a word: the time within a tick of 2^tick_bits us")
    orientation: str = Field(
        default="as-read",
        pattern=r"^[a-z0-9][a-z0-9-]{0,63}$",
        description="how x, y and p were read where releases of a data set differ, for example aedat2-spikingjelly",
    )

    @model_validator(mode="after")
    def _bits_fit(self) -> Self:
        try:
            layout = self.layout
        except StoreError as error:
            raise ValueError(str(error)) from error
        if (self.address_bits, self.tick_bits) != (layout.address_bits, layout.tick_bits):
            raise ValueError(
                f"bits of address and tick are {self.address_bits} and {self.tick_bits}, expected "
                f"{layout.address_bits} and {layout.tick_bits} for a sensor of {self.sensor[0]} x {self.sensor[1]}"
            )
        return self

    @classmethod
    def of(cls, sensor: tuple[int, int], orientation: str = "as-read") -> Self:
        """The format for a sensor of (height, width).

        Raises:
            StoreError: the sensor has too many pixels for words of 32 bits.
        """
        layout = WordLayout(*sensor)
        return cls(
            sensor=layout.sensor,
            address_bits=layout.address_bits,
            tick_bits=layout.tick_bits,
            orientation=orientation,
        )

    @property
    def layout(self) -> WordLayout:
        """The bits of a word."""
        return WordLayout(*self.sensor)


class HotPixel(_Record):
    """A pixel with far more events than others."""

    x: int = Field(ge=0)
    y: int = Field(ge=0)
    events: int = Field(ge=1)


class EventAudit(_Record):
    """Statistics of the recordings of one split."""

    recordings: int = Field(ge=0)
    empty_recordings: int = Field(ge=0, description="without an event: kept")
    dropped_recordings: int = Field(ge=0, description="without an event: left out, as was asked for")
    events: int = Field(ge=0)
    on_share: float = Field(ge=0, le=1, description="fraction of the events that are ON")
    duration_us: int = Field(ge=0, description="of all recordings together")
    shortest_us: int = Field(ge=0)
    longest_us: int = Field(ge=0)
    rate_min: float = Field(ge=0, description="events per second of a recording")
    rate_median: float = Field(ge=0)
    rate_max: float = Field(ge=0)
    out_of_order: int = Field(ge=0, description="events earlier than one before them: sorted")
    dropped: int = Field(ge=0, description="events outside the sensor: left out, as was asked for")
    early_labels: int = Field(ge=0, description="boxes in the first 0.5 s of a recording")
    late_labels: int = Field(ge=0, description="boxes after the last event, by at most 1 s")
    repeated_boxes: int = Field(ge=0, description="boxes equal to the one before of the same track")
    hot_pixels: int = Field(ge=0, description="pixels with over 20 times the events of the median of all with events")
    hot_share: float = Field(ge=0, le=1, description="their fraction of the events")
    hottest: tuple[HotPixel, ...] = Field(description="at most 20 of them, most events first")
