"""The base config of all kinds of transforms, with pydantic alone."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from spikefleet_pipelines.transforms.normalise_config import NamedNormalisation, Normalisation, check_channels

if TYPE_CHECKING:
    from spikefleet_pipelines.sampling import TrainingRows
    from spikefleet_pipelines.store.reader import Split
    from spikefleet_pipelines.store.rows import Rows
    from spikefleet_pipelines.transforms.batch_transform import BatchTransform


class BatchTransformConfig(BaseModel, ABC):
    """The config of a transform; a kind subclasses it with `kind: Literal["NAME"] = "NAME"` and registers the class.

    Attributes:
        store_task: task of the stores that this kind reads: classification (labels) or detection (annotations).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    store_task: ClassVar[Literal["classification", "detection"]]

    kind: str = Field(description="kind of the transform")
    normalise: NamedNormalisation = Normalisation()

    @property
    def side_multiple(self) -> int:
        """The sides of a batch are multiples of this many pixels."""
        return 1

    def check_images(self, image_shape: tuple[int, int, int] | None) -> None:
        """Check the config against images of shape [C, H, W], or encoded ones of varying size (None).

        Raises:
            ValueError: a field does not fit such images.
        """
        check_channels(self.normalise, 3 if image_shape is None else image_shape[0])

    def training_rows(self, split: "Split") -> "TrainingRows":
        """Choose the rows of a split to train on, and those that should share a batch; all rows by default.

        Raises:
            ValueError: no row is left.
        """
        from spikefleet_pipelines.sampling import TrainingRows

        return TrainingRows()

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
