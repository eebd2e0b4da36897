"""What is done to images on their way into a batch: the config.

Training, in this order: random crop (of the padded image, or random resized crop), horizontal flip, AutoAugment,
normalisation, cutout. Evaluation: resize and centre crop if given, normalisation. `classification.py` does it.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Normalisation(BaseModel):
    """Per-channel statistics of images scaled to [0, 1]: a pixel becomes (pixel / 255 - mean) / std."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: tuple[float, ...] = Field(
        default=(0.0,), min_length=1, description="one value for each channel, or one for all"
    )
    std: tuple[float, ...] = Field(
        default=(1.0,), min_length=1, description="one value for each channel, or one for all"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std has {len(self.std)}; give equally many")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; every value must be above 0")
        return self


NORMALISATIONS: dict[str, Normalisation] = {
    "none": Normalisation(),
    "digits": Normalisation(mean=(0.3053,), std=(0.3760,)),
    "fashion_mnist": Normalisation(mean=(0.2860,), std=(0.3530,)),
    "cifar10": Normalisation(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
    "cifar100": Normalisation(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)),
    "imagenet": Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}
"""Statistics of the training data; a config may name one of them instead of giving numbers."""


def _named(value: object) -> object:
    if isinstance(value, str):
        if value not in NORMALISATIONS:
            raise ValueError(f"unknown normalisation {value!r}; it must be one of {', '.join(NORMALISATIONS)}")
        return NORMALISATIONS[value]
    return value


NamedNormalisation = Annotated[
    Normalisation,
    BeforeValidator(_named),
    Field(description=f"mean and std, or one of {', '.join(NORMALISATIONS)}"),
]
"""The field of a config: statistics, or the name of some."""


def check_channels(normalise: Normalisation, channels: int) -> None:
    """Compare the statistics with the channels of the images.

    Raises:
        ValueError: they are neither one nor as many.
    """
    if len(normalise.mean) not in (1, channels):
        raise ValueError(
            f"normalise.mean has {len(normalise.mean)} values, and the images have {channels} channels; "
            f"give 1 or {channels}."
        )


class TransformConfig(BaseModel):
    """Augmentation and normalisation of images.

    Raises:
        ValueError: fields that do not go together, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    normalise: NamedNormalisation = Normalisation()

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
        """Check the config against images of shape [C, H, W], or encoded ones of varying size (None).

        Raises:
            ValueError: a field does not suit such images.
        """
        channels = 3 if image_shape is None else image_shape[0]
        check_channels(self.normalise, channels)
        if self.auto_augment != "none" and channels != 3:
            raise ValueError(f"auto_augment {self.auto_augment!r} needs 3 channels, and the images have {channels}.")
        if image_shape is None and (self.random_resized_crop is None or self.center_crop is None):
            raise ValueError(
                "the images are of varying size: random_resized_crop, resize and center_crop must be given, "
                "for example 224, 256 and 224."
            )
