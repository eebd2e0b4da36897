"""The config of the transform of images and boxes; `detection.py` implements it.

Training, in this order: mosaic of four images, random scale and shift, jitter of hue, saturation and value,
horizontal flip, normalisation. Evaluation: resize, normalisation.
"""

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig

if TYPE_CHECKING:
    from spikefleet_pipelines.sampling import TrainingRows
    from spikefleet_pipelines.store.reader import Samples
    from spikefleet_pipelines.store.rows import Rows
    from spikefleet_pipelines.transforms.detection import DetectionBatchTransform


class DetectionTransformConfig(BatchTransformConfig):
    """Resizing, augmentation and normalisation of images with boxes.

    SpikeYOLO: letterbox 640, mosaic 1, translate 0.1, scale 0.5, horizontal_flip 0.5, hsv (0.015, 0.7, 0.4). RetinaNet:
    keep_ratio with size 800 and longest 1333, horizontal_flip 0.5, normalise imagenet.

    Raises:
        ValueError: fields contradict each other; the message names them.
    """

    store_task: ClassVar[Literal["classification", "detection"]] = "detection"

    kind: Literal["detection"] = Field(default="detection", description="detection: images with boxes")
    resize: Literal["letterbox", "keep_ratio"] = Field(
        default="letterbox",
        description="letterbox: fit into the centre of a square; keep_ratio: scale the shorter side to size and pad "
        "the batch to the right and below",
    )
    size: int = Field(default=640, ge=32, le=4096, description="side of the square, or length of the shorter side")
    longest: int | None = Field(default=None, ge=32, le=8192, description="keep_ratio: maximum of the longer side")
    divisor: int = Field(default=32, ge=1, le=256, description="sides of a batch are multiples of this")
    fill: int = Field(default=114, ge=0, le=255, description="value of pixels outside the image")
    mosaic: float = Field(default=0.0, ge=0.0, le=1.0, description="training: probability of a mosaic of four images")
    close_mosaic_epochs: int = Field(
        default=10, ge=0, description="number of last epochs without mosaic; a run of at most that many has none"
    )
    translate: float = Field(
        default=0.0, ge=0.0, le=1.0, description="training: largest shift, as a fraction of the side"
    )
    scale: float = Field(default=0.0, ge=0.0, lt=1.0, description="training: scaled by 1 - scale to 1 + scale")
    horizontal_flip: float = Field(default=0.0, ge=0.0, le=1.0, description="training: probability")
    hsv: tuple[float, float, float] = Field(
        default=(0.0, 0.0, 0.0),
        description="training: largest change of hue (fraction of the colour circle), saturation and value (factor "
        "from 1 - x to 1 + x); each 0 to 1",
    )

    skip_empty: bool = Field(default=False, description="training: leave out images without an object for the loss")
    group_by_aspect: bool = Field(
        default=False,
        description="training, keep_ratio: a worker's images of a step are all wide or all tall, to pad less",
    )

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.size % self.divisor and self.resize == "letterbox":
            raise ValueError(f"size is {self.size}, expected a multiple of divisor={self.divisor} for resize=letterbox")
        if self.resize == "letterbox" and self.longest is not None:
            raise ValueError(
                f"longest is {self.longest}, but resize is letterbox; remove longest or set resize=keep_ratio"
            )
        if self.resize == "keep_ratio":
            if self.longest is None or self.longest < self.size:
                raise ValueError(f"longest is {self.longest}, expected at least size={self.size} for resize=keep_ratio")
            for name in ("mosaic", "translate", "scale"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} is {getattr(self, name)}, but resize is keep_ratio; remove {name} or set "
                        "resize=letterbox"
                    )
        if self.group_by_aspect and self.resize == "letterbox":
            raise ValueError(
                "group_by_aspect has no effect with resize=letterbox, whose batches are squares; remove it or set "
                "resize=keep_ratio"
            )
        if not all(0 <= part <= 1 for part in self.hsv):
            raise ValueError(f"hsv is {self.hsv}, expected numbers from 0 to 1")
        return self

    @property
    def side_multiple(self) -> int:
        """The sides of a batch are multiples of this many pixels: `divisor`."""
        return self.divisor

    def check_images(self, image_shape: tuple[int, int, int] | None) -> None:
        """Check the config against images of shape [C, H, W], or encoded ones of varying size (None).

        Raises:
            ValueError: a field does not fit such images.
        """
        super().check_images(image_shape)
        channels = 3 if image_shape is None else image_shape[0]
        if any(self.hsv) and channels != 3:
            raise ValueError(f"hsv {self.hsv} needs 3 channels, but the images have {channels}; set hsv=[0,0,0]")

    def build(self, split: "Rows", train: bool, seed: int, epochs: int | None = None) -> "DetectionBatchTransform":
        """Build the transform of a split; see `BatchTransformConfig.build`."""
        from spikefleet_pipelines.transforms.detection import DetectionBatchTransform

        return DetectionBatchTransform(split, self, train, seed, epochs)

    def training_rows(self, split: "Samples") -> "TrainingRows":
        """Choose the rows with objects (`skip_empty`), and group wide and tall images (`group_by_aspect`).

        Raises:
            ValueError: no image has an object for the loss.
        """
        from spikefleet_pipelines.transforms.detection import training_rows

        return training_rows(split, self)

    def has_mosaic(self, epoch: int, epochs: int | None) -> bool:
        """Whether images of an epoch may be mosaics; `epochs` is the length of the run, None if unknown."""
        return self.mosaic > 0 and (epochs is None or epoch < epochs - self.close_mosaic_epochs)
