"""What is done to images on their way into a batch: the config.

Training, in this order: random crop (of the padded image, or random resized crop), horizontal flip, AutoAugment,
normalisation, cutout. Evaluation: resize and centre crop if given, normalisation. `classification.py` does it.
"""

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig

if TYPE_CHECKING:
    from spikefleet_pipelines.store.rows import Rows
    from spikefleet_pipelines.transforms.classification import ClassificationTransform


class TransformConfig(BatchTransformConfig):
    """Augmentation and normalisation of images.

    Raises:
        ValueError: fields that do not go together, by name.
    """

    store_task: ClassVar[Literal["classification", "detection"]] = "classification"

    kind: Literal["image"] = Field(default="image", description="image: for classification; detection has its own")
    crop_padding: int = Field(
        default=0, ge=0, le=128, description="training: pad with zeros and crop, a random shift of up to so many pixels"
    )
    random_resized_crop: int | None = Field(
        default=None, ge=1, le=4096, description="training: crop a random part and resize it to this side"
    )
    random_resized_crop_scale: tuple[float, float] = Field(
        default=(0.08, 1.0), description="smallest and largest part of the area; the aspect ratio is 3/4 to 4/3"
    )
    horizontal_flip: float = Field(default=0.0, ge=0.0, le=1.0, description="training: probability")
    auto_augment: Literal["none", "cifar10"] = Field(default="none", description="training: policy of AutoAugment")
    cutout: int = Field(default=0, ge=0, le=4096, description="training: side of a square set to the mean; 0 is off")
    resize: int | None = Field(default=None, ge=1, le=4096, description="evaluation: length of the shorter side")
    center_crop: int | None = Field(default=None, ge=1, le=4096, description="evaluation: side of the crop")

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.random_resized_crop is not None and self.crop_padding:
            raise ValueError("crop_padding and random_resized_crop are both given; choose one way to crop")
        if (self.resize is None) != (self.center_crop is None):
            raise ValueError(f"resize is {self.resize} and center_crop is {self.center_crop}; give both or neither")
        if self.resize is not None and self.center_crop is not None and self.center_crop > self.resize:
            raise ValueError(f"center_crop {self.center_crop} is larger than resize {self.resize}")
        if self.random_resized_crop is not None and self.center_crop is None:
            raise ValueError("random_resized_crop is given without resize and center_crop, which evaluation then needs")
        least, most = self.random_resized_crop_scale
        if not 0 < least <= most <= 1:
            raise ValueError(f"random_resized_crop_scale is {(least, most)}; it must rise within (0, 1]")
        return self

    def check_images(self, image_shape: tuple[int, int, int] | None) -> None:
        super().check_images(image_shape)
        channels = 3 if image_shape is None else image_shape[0]
        if self.auto_augment != "none" and channels != 3:
            raise ValueError(f"auto_augment {self.auto_augment!r} needs 3 channels, and the images have {channels}")
        if image_shape is None and (self.random_resized_crop is None or self.center_crop is None):
            raise ValueError(
                "the images are of varying size: random_resized_crop, resize and center_crop must be given, "
                "for example 224, 256 and 224"
            )

    def build(self, split: "Rows", train: bool, seed: int, epochs: int | None = None) -> "ClassificationTransform":
        from spikefleet_pipelines.transforms.classification import ClassificationTransform

        return ClassificationTransform(split, self, train, seed)
