"""The config of the transform of label times with boxes; `event_detection.py` implements it.

A sample is a label time of a recording: the events of a window that ends there, and the boxes at that time. Training,
in this order: choice of the boxes, binning, zoom, horizontal flip, normalisation. Evaluation: binning, normalisation.
"""

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from spikefleet_pipelines.events.durations import duration_us
from spikefleet_pipelines.transforms.event_frames_config import EventFramesConfig

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from spikefleet_pipelines.sampling import TrainingRows
    from spikefleet_pipelines.store.reader import Samples
    from spikefleet_pipelines.store.rows import Rows
    from spikefleet_pipelines.transforms.event_detection import EventDetectionTransform


class TrainingBoxes(BaseModel):
    """Which boxes are trained on, by their size after they were cut to the sensor; the others are background.

    RVT on Gen1: least_diagonal 30, least_side 10 (those of the `prophesee` protocol), largest_width 0.9, since some
    labels span the image without an object; on 1Mpx: least_side 5, largest_width 0.9.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    least_diagonal: float = Field(default=0.0, ge=0.0, description="least diagonal in pixels of the sensor")
    least_side: float = Field(default=0.0, ge=0.0, description="least width and least height in pixels of the sensor")
    largest_width: float = Field(default=1.0, gt=0.0, le=1.0, description="largest share of the sensor's width")

    def keeps(
        self, widths: "NDArray[np.float64]", heights: "NDArray[np.float64]", sensor_width: "NDArray[Any] | int"
    ) -> "NDArray[np.bool_]":
        """Return which boxes are trained on, [n].

        Args:
            widths: in pixels of the sensor, [n].
            heights: likewise.
            sensor_width: in pixels, of all or of each.
        """
        large = (widths >= self.least_side) & (heights >= self.least_side)
        large &= widths**2 + heights**2 >= self.least_diagonal**2
        kept: NDArray[np.bool_] = large & (widths <= self.largest_width * sensor_width)
        return kept


class EventDetectionTransformConfig(EventFramesConfig):
    """Window, place on the canvas, augmentation and representation of recordings of events with boxes.

    RVT on Gen1: zoom 0.8 with zoom_in 1.5 and zoom_out 1.2, horizontal_flip 0.5, and its filter of `TrainingBoxes`. The
    released SpikeYOLO: window 250ms, representation.kind last_polarity, fit letterbox with size 320, reverse_time, no
    augmentation.

    Raises:
        ValueError: fields contradict each other; the message names them.
    """

    store_task: ClassVar[Literal["classification", "detection"]] = "detection"

    kind: Literal["event_detection"] = Field(
        default="event_detection", description="event_detection: recordings of an event camera with boxes"
    )
    window: str = Field(
        default="250ms",
        description="length of the window that ends at the label time; nothing where it begins before the recording",
    )
    reverse_time: bool = Field(
        default=False, description="show the last slice first, as converted weights of the released SpikeYOLO need it"
    )
    fit: Literal["pad", "letterbox"] = Field(
        default="pad",
        description="pad: add empty pixels to the right and below, to multiples of divisor; letterbox: scale into the "
        "centre of a square (nearest pixels)",
    )
    size: int | None = Field(default=None, ge=32, le=4096, description="letterbox: side of the square")
    divisor: int = Field(default=32, ge=1, le=256, description="sides of a batch are multiples of this")
    horizontal_flip: float = Field(default=0.0, ge=0.0, le=1.0, description="training: probability")
    zoom: float = Field(default=0.0, ge=0.0, le=1.0, description="training: probability of a zoom, in or out")
    zoom_in: float = Field(default=1.5, ge=1.0, le=8.0, description="largest factor by which a zoom enlarges")
    zoom_out: float = Field(default=1.2, ge=1.0, le=8.0, description="largest factor by which a zoom makes smaller")
    zoom_in_share: float = Field(default=0.8, ge=0.0, le=1.0, description="share of the zooms that enlarge")
    training_boxes: TrainingBoxes = TrainingBoxes()
    skip_empty: bool = Field(default=False, description="training: leave out label times without a box for the loss")

    @field_validator("window")
    @classmethod
    def _is_length(cls, window: str) -> str:
        duration_us(window)
        return window

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if (self.fit == "letterbox") != (self.size is not None):
            raise ValueError(
                f"size is {self.size}, but fit is {self.fit}; set size for fit=letterbox, and none for fit=pad"
            )
        if self.size is not None and self.size % self.divisor:
            raise ValueError(f"size is {self.size}, expected a multiple of divisor={self.divisor}")
        return self

    @property
    def side_multiple(self) -> int:
        """The sides of a batch are multiples of this many pixels: `divisor`."""
        return self.divisor

    @property
    def interrupts_streams(self) -> str | None:
        """A field that does something else to each window of a recording; see `EventFramesConfig`."""
        if self.reverse_time:
            return "reverse_time=true turns each window round"
        return "skip_empty=true leaves out label times" if self.skip_empty else None

    def canvas(self, sensor: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the network's input for a sensor (height, width)."""
        if self.size is not None:
            return self.size, self.size
        height, width = (-(-side // self.divisor) * self.divisor for side in self.representation.size or sensor)
        return height, width

    def input_shape(
        self, image_shape: tuple[int, int, int] | None, sensor: tuple[int, int] | None
    ) -> tuple[int, int, int] | None:
        """Return the shape [C, H, W] of the input; see `BatchTransformConfig.input_shape`."""
        return None if sensor is None else (self.representation.channels, *self.canvas(sensor))

    def training_rows(self, split: "Samples") -> "TrainingRows":
        """Choose the label times with boxes (`skip_empty`).

        Raises:
            ValueError: no label time has a box for the loss.
        """
        from spikefleet_pipelines.transforms.event_detection import training_rows

        return training_rows(split, self)

    def pixels(self, images: "Tensor") -> "list[Tensor]":
        """Draw the events of each sample, summed over time, uint8 [3, H, W] each."""
        from spikefleet_pipelines.transforms.shown import shown_sums

        return shown_sums(images, self.normalise, self.representation.kind)

    def build(self, split: "Rows", train: bool, seed: int, epochs: int | None = None) -> "EventDetectionTransform":
        """Build the transform of a split; see `BatchTransformConfig.build`."""
        from spikefleet_pipelines.transforms.event_detection import EventDetectionTransform

        return EventDetectionTransform.of(split, self, train, seed)
