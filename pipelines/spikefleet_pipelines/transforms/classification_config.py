"""The config of the image transform; `classification.py` implements it.

Training, in this order: random crop (of the padded image, or random resized crop), horizontal flip, AutoAugment,
normalisation, cutout, mixup or CutMix. Evaluation: resize and centre crop if set, normalisation. What raw images need
of crop, flip and cutout can be computed on the device that trains on them, with the same result to the bit.
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
        ValueError: fields contradict each other; the message names them.
    """

    store_task: ClassVar[Literal["classification", "detection"]] = "classification"

    kind: Literal["image"] = Field(default="image", description="image: images with classes")
    crop_padding: int = Field(
        default=0, ge=0, le=128, description="training: pad by this many pixels of zeros and crop at a random shift"
    )
    random_resized_crop: int | None = Field(
        default=None, ge=1, le=4096, description="training: crop a random part and resize it to this side"
    )
    random_resized_crop_scale: tuple[float, float] = Field(
        default=(0.08, 1.0), description="smallest and largest fraction of the area; the aspect ratio is 3/4 to 4/3"
    )
    horizontal_flip: float = Field(default=0.0, ge=0.0, le=1.0, description="training: probability")
    auto_augment: Literal["none", "cifar10"] = Field(default="none", description="training: policy of AutoAugment")
    cutout: int = Field(default=0, ge=0, le=4096, description="training: side of a square set to the mean; 0 is off")
    mixup: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="training: probability that an image is blended with another one, whose class gets its share",
    )
    mixup_alpha: float = Field(default=0.2, gt=0.0, le=100.0, description="mixup: the share is from Beta(alpha, alpha)")
    cut_mix: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="training: probability that a rectangle is that of another image, whose class gets its share",
    )
    augment_on: Literal["loader", "device"] = Field(
        default="loader",
        description="where training images are cropped, flipped and cut out; device: loaders send them as they are "
        "stored, and the training's device does it; both give the same images to the bit",
    )
    resize: int | None = Field(default=None, ge=1, le=4096, description="evaluation: length of the shorter side")
    center_crop: int | None = Field(default=None, ge=1, le=4096, description="evaluation: side of the crop")

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.random_resized_crop is not None and self.crop_padding:
            raise ValueError(
                f"crop_padding is {self.crop_padding} and random_resized_crop is {self.random_resized_crop}; set only "
                "one of them"
            )
        if (self.resize is None) != (self.center_crop is None):
            raise ValueError(f"resize is {self.resize} and center_crop is {self.center_crop}; set both or neither")
        if self.resize is not None and self.center_crop is not None and self.center_crop > self.resize:
            raise ValueError(f"center_crop is {self.center_crop}, expected at most resize={self.resize}")
        if self.random_resized_crop is not None and self.center_crop is None:
            raise ValueError(
                f"random_resized_crop is {self.random_resized_crop}, but evaluation also needs resize and center_crop; "
                "set all three"
            )
        if self.mixup + self.cut_mix > 1:
            raise ValueError(
                f"mixup is {self.mixup} and cut_mix is {self.cut_mix}, of which an image gets one; set them to at most "
                "1 together"
            )
        self._device_augments()
        least, most = self.random_resized_crop_scale
        if not 0 < least <= most <= 1:
            raise ValueError(f"random_resized_crop_scale is {(least, most)}, expected two ascending numbers in (0, 1]")
        return self

    def _device_augments(self) -> None:
        """Refuse what is not computed on the device: resizes, and what is not the same there to the bit."""
        wrong = {
            "random_resized_crop": self.random_resized_crop is not None,
            "auto_augment": self.auto_augment != "none",
            "mixup": self.mixup > 0,
            "cut_mix": self.cut_mix > 0,
        }
        for name in (name for name, refused in wrong.items() if refused and self.augments_on_device):
            raise ValueError(
                f"{name} is {getattr(self, name)!r}, which augment_on=device does not compute; set augment_on=loader"
            )

    @property
    def augments_on_device(self) -> bool:
        """Whether the device changes pixels in training; see `BatchTransformConfig`."""
        return self.augment_on == "device"

    def check_images(self, image_shape: tuple[int, int, int] | None) -> None:
        """Check the config against images of shape [C, H, W], or encoded ones of varying size (None).

        Raises:
            ValueError: a field does not fit such images.
        """
        super().check_images(image_shape)
        channels = 3 if image_shape is None else image_shape[0]
        if self.auto_augment != "none" and channels != 3:
            raise ValueError(
                f"auto_augment {self.auto_augment!r} needs 3 channels, but the images have {channels}; set "
                "auto_augment=none"
            )
        if image_shape is None and self.augments_on_device:
            raise ValueError(
                "data.transform.augment_on is 'device', but the images have varying sizes; set "
                "data.transform.augment_on=loader"
            )
        if image_shape is None and (self.random_resized_crop is None or self.center_crop is None):
            raise ValueError(
                "the images have varying sizes; set data.transform.random_resized_crop, data.transform.resize and "
                "data.transform.center_crop, for example to 224, 256 and 224"
            )

    def build(self, split: "Rows", train: bool, seed: int, epochs: int | None = None) -> "ClassificationTransform":
        """Build the transform of a split; see `BatchTransformConfig.build`."""
        from spikefleet_pipelines.transforms.classification import ClassificationTransform

        return ClassificationTransform(split, self, train, seed)
