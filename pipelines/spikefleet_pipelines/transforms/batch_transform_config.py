"""The base config of all kinds of transforms, with pydantic alone."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from spikefleet_pipelines.transforms.normalise_config import NamedNormalisation, Normalisation, check_channels

if TYPE_CHECKING:
    from torch import Tensor

    from spikefleet_pipelines.sampling import TrainingRows
    from spikefleet_pipelines.store.reader import Samples
    from spikefleet_pipelines.store.rows import Rows
    from spikefleet_pipelines.transforms.batch_transform import BatchTransform


class BatchTransformConfig(BaseModel, ABC):
    """The config of a transform; a kind subclasses it with `kind: Literal["NAME"] = "NAME"` and registers the class.

    Attributes:
        store_task: task of the stores that this kind reads: classification (labels) or detection (annotations).
        reads_events: whether it reads recordings of events, else images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    store_task: ClassVar[Literal["classification", "detection"]]
    reads_events: ClassVar[bool] = False

    kind: str = Field(description="kind of the transform")
    normalise: NamedNormalisation = Normalisation()

    @property
    def side_multiple(self) -> int:
        """The sides of a batch are multiples of this many pixels."""
        return 1

    @property
    def binary_input(self) -> bool:
        """Whether batches hold nothing but 0 and 1, event by event, which a network takes as spikes."""
        return False

    @property
    def drops_steps(self) -> bool:
        """Whether batches of training have fewer time steps than those of evaluation."""
        return False

    @property
    def augments_on_device(self) -> bool:
        """Whether the device of a training changes pixels, instead of the loader."""
        return False

    def check_images(self, image_shape: tuple[int, int, int] | None) -> None:
        """Check the config against images of shape [C, H, W], or encoded ones of varying size (None).

        Raises:
            ValueError: a field does not fit such images.
        """
        check_channels(self.normalise, 3 if image_shape is None else image_shape[0])

    def for_timesteps(self, timesteps: int) -> Self:
        """Return the config for a network of T time steps; kinds that make one frame a time step keep T.

        Args:
            timesteps: T.
        """
        return self

    def input_shape(
        self, image_shape: tuple[int, int, int] | None, sensor: tuple[int, int] | None
    ) -> tuple[int, int, int] | None:
        """Return the shape [C, H, W] that the samples of a store have for the network, before they are cropped.

        Args:
            image_shape: of the stored images; None where sizes vary, and of events.
            sensor: height and width, of events.

        Returns:
            The shape; None where sizes vary.
        """
        return image_shape

    def pixels(self, images: "Tensor") -> "list[Tensor]":
        """Return a batch of images as they were before normalisation, uint8 [C, H, W] each, for plots.

        Args:
            images: float32 [B, C, H, W] or frames [B, T, C, H, W], as a batch has them.
        """
        from spikefleet_pipelines.transforms.shown import shown_images

        return shown_images(images, self.normalise)

    def training_rows(self, split: "Samples") -> "TrainingRows":
        """Choose the rows of a split to train on, and those that should share a batch; all rows by default.

        Raises:
            ValueError: no row is left.
        """
        from spikefleet_pipelines.sampling import TrainingRows

        return TrainingRows()

    def stream_window_us(self) -> int:
        """Return the length in us of the windows of a stream that the transform reads.

        Raises:
            ValueError: the transform cannot read streams; the message names the field below `data.transform`.
        """
        raise ValueError(f"kind={self.kind} reads no windows of events; set a kind for events")

    @abstractmethod
    def build(self, split: "Rows", train: bool, seed: int, epochs: int | None = None) -> "BatchTransform[Any, Any]":
        """Build the transform of a split; this imports its dependencies.

        Args:
            split: whose rows it transforms.
            train: apply the random transforms of training, else those of evaluation.
            seed: of the random transforms.
            epochs: length of the run; None if unknown.

        Raises:
            ValueError: the config does not fit the images of the split.
        """
