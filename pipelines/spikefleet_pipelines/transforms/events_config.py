"""The config of the transform of recordings with classes; `events.py` implements it.

Training, in this order: augmentation of the events of the window, binning, deletion of slices, normalisation,
augmentation of the frames.
Evaluation: binning, order of the slices, normalisation.
"""

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from spikefleet_pipelines.events.augmentation_config import EventAugmentation
from spikefleet_pipelines.events.durations import duration_us
from spikefleet_pipelines.events.frame_augmentation_config import FrameAugmentation
from spikefleet_pipelines.transforms.event_frames_config import EventFramesConfig

if TYPE_CHECKING:
    from torch import Tensor

    from spikefleet_pipelines.store.rows import Rows
    from spikefleet_pipelines.transforms.events import EventsTransform


class EventsTransformConfig(EventFramesConfig):
    """Window, augmentation and representation of recordings of events with classes."""

    store_task: ClassVar[Literal["classification", "detection"]] = "classification"

    kind: Literal["events"] = Field(default="events", description="events: recordings of an event camera with classes")
    window: str = Field(
        default="recording",
        description="recording: from its start to its end; span: from its first to its last event; or a length such "
        "as 250ms: the last part of the recording, with nothing before its start",
    )
    augmentation: EventAugmentation = EventAugmentation()
    frame_augmentation: FrameAugmentation = FrameAugmentation()
    keep_slices: int | None = Field(
        default=None, ge=1, le=4096, description="training: number of slices that are kept, at random; none: all"
    )
    keep_per: Literal["sample", "batch"] = Field(
        default="sample", description="the slices are drawn for each sample, or for all samples of a worker's step"
    )
    keep_fill: Literal["drop", "zero"] = Field(
        default="drop", description="deleted slices are left out, so that the network runs fewer steps, or are zeros"
    )
    slice_order: Literal["recorded", "shuffled", "reversed"] = Field(
        default="recorded",
        description="evaluation: order of the slices; shuffled: one permutation for each sample",
    )

    @model_validator(mode="after")
    def _frames_are_here(self) -> Self:
        if self.bin_on == "device" and not self.frame_augmentation.is_none:
            raise ValueError(
                "frame_augmentation changes frames in the loader, but bin_on is 'device'; set bin_on=loader"
            )
        return self

    @field_validator("window")
    @classmethod
    def _is_window(cls, window: str) -> str:
        if window not in ("recording", "span"):
            try:
                duration_us(window)
            except ValueError as error:
                raise ValueError(f"{error}, recording or span") from None
        return window

    @property
    def drops_steps(self) -> bool:
        """Whether deleted slices are left out."""
        return self.keep_slices is not None and self.keep_fill == "drop"

    def check_frames(self, sensor: tuple[int, int]) -> None:
        """Check the config against recordings of a sensor; see `EventFramesConfig.check_frames`."""
        super().check_frames(sensor)
        if self.keep_slices is not None and self.keep_slices > self.timesteps:
            raise ValueError(
                f"keep_slices is {self.keep_slices}, expected 1 to {self.timesteps}, the time steps of the network"
            )

    @property
    def interrupts_streams(self) -> str | None:
        """A field that does something else to each window of a recording; see `EventFramesConfig`."""
        if not self.augmentation.is_none:
            return "augmentation draws anew for each window"
        if not self.frame_augmentation.is_none:
            return "frame_augmentation draws anew for each window"
        if self.keep_slices is not None:
            return f"keep_slices={self.keep_slices} deletes other slices of each window"
        return None if self.slice_order == "recorded" else f"slice_order={self.slice_order} changes their order"

    def pixels(self, images: "Tensor") -> "list[Tensor]":
        """Draw samples as strips over time, uint8 [3, H, T W + gaps] each."""
        from spikefleet_pipelines.transforms.shown import shown_strips

        return shown_strips(images, self.normalise, self.representation.kind)

    def build(self, split: "Rows", train: bool, seed: int, epochs: int | None = None) -> "EventsTransform":
        """Build the transform of a split; see `BatchTransformConfig.build`."""
        from spikefleet_pipelines.transforms.events import EventsTransform

        return EventsTransform.of(split, self, train, seed)
