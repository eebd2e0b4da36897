"""The config that all transforms of recordings of events have in common: representation, slices, where it is binned."""

from typing import ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from spikefleet_pipelines.events.binning_config import BinningConfig, RepresentationConfig
from spikefleet_pipelines.events.durations import duration_us
from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig
from spikefleet_pipelines.transforms.normalise_config import Normalisation, check_channels


class EventFramesConfig(BatchTransformConfig):
    """Frames [T, C, H, W] of windows of events. T is no field: it is the network's, see `for_timesteps`.

    `normalise` has means and standard deviations of the frames' own values: a value becomes (value - mean) / std.
    """

    reads_events: ClassVar[bool] = True

    representation: RepresentationConfig = RepresentationConfig()
    bin_on: Literal["loader", "device"] = Field(
        default="loader",
        description="where events are counted; device: loaders send four bytes an event, and the training's device "
        "counts them; both give the same frames to the bit",
    )

    _timesteps: int | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _device_counts(self) -> Self:
        chosen = self.representation
        wrong = {
            "kind": chosen.kind not in ("count", "binary"),
            "normalise": chosen.normalise == "std",
            "resize": chosen.size is not None and chosen.resize == "bilinear",
        }
        if self.bin_on == "device" and any(wrong.values()):
            name = next(name for name, refused in wrong.items() if refused)
            raise ValueError(
                f"representation.{name} is {getattr(chosen, name)!r}, which bin_on=device does not compute; set "
                "bin_on=loader"
            )
        return self

    def for_timesteps(self, timesteps: int) -> Self:
        """Return the config for a network of T time steps: windows have T slices."""
        bound = self.model_copy()
        bound._timesteps = timesteps
        return bound

    @property
    def timesteps(self) -> int:
        """T.

        Raises:
            ValueError: the config is of no network yet.
        """
        if self._timesteps is None:
            raise ValueError(
                f"the transform of kind {self.kind!r} has no number of time slices; call for_timesteps(T) with the "
                "time steps of the network"
            )
        return self._timesteps

    @property
    def binning(self) -> BinningConfig:
        """Settings of binning with T slices. Raises ValueError as `timesteps`."""
        return self.representation.with_slices(self.timesteps)

    def stream_window_us(self) -> int:
        """Return the length of windows; see `BatchTransformConfig.stream_window_us`."""
        window = self.model_dump().get("window")
        try:
            length = duration_us(str(window))
        except ValueError:
            raise ValueError(f"window={window}: windows of a stream have one length; set, for example, 50ms") from None
        if self.interrupts_streams is not None:
            raise ValueError(f"{self.interrupts_streams}, but the windows of a recording belong together; leave it out")
        return length

    @property
    def interrupts_streams(self) -> str | None:
        """A field that does something else to each window of a recording, in words; None where there is none."""
        return None

    @property
    def binary_input(self) -> bool:
        """Whether frames hold nothing but 0 and 1: binary ones that neither a resize nor a scale has changed."""
        chosen = self.representation
        scaled = chosen.normalise == "std" or (chosen.clip or 1.0) < 1.0 or self.normalise != Normalisation()
        return chosen.kind == "binary" and not scaled and (chosen.size is None or chosen.resize == "nearest")

    def input_shape(
        self, image_shape: tuple[int, int, int] | None, sensor: tuple[int, int] | None
    ) -> tuple[int, int, int] | None:
        """Return the shape [C, H, W] of the frames of a sensor; see `BatchTransformConfig.input_shape`."""
        return None if sensor is None else self.representation.frame_shape(sensor)

    def check_frames(self, sensor: tuple[int, int]) -> None:
        """Check the config against recordings of a sensor.

        Raises:
            ValueError: a field does not fit.
        """
        chosen = self.representation
        check_channels(self.normalise, chosen.channels)
        if chosen.size is not None and chosen.resize == "area":
            for name, length, side in zip(("height", "width"), chosen.size, sensor, strict=True):
                if side % length:
                    raise ValueError(
                        f"representation.size has {name} {length}, which does not divide the sensor's {side}; set a "
                        "divisor, or representation.resize=nearest"
                    )
