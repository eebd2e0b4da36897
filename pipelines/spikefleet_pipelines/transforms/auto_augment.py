"""AutoAugment for CIFAR-10 (Cubuk et al., "AutoAugment: Learning Augmentation Policies from Data", CVPR 2019, Table 7).

Same operations and magnitudes as `torchvision.transforms.v2.AutoAugment`, with random numbers that are a function of
(seed, epoch, row), applied at once to all images of a batch that drew the same operation. Where an operation maps each
value, or each pixel position, in the same way in every image, torchvision computes a table once. The rest is numpy:
torch's threads cost more on so few values than they save.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.counter_random import Draw, integers, uniform

Pixels = NDArray[np.uint8]
_Operation = tuple[str, float, int | None]

# 25 policies of two operations: (name, probability, magnitude 0 to 9 or None where the operation has none)
CIFAR10_POLICIES: tuple[tuple[_Operation, _Operation], ...] = (
    (("Invert", 0.1, None), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, None), ("Equalize", 0.9, None)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, None), ("Equalize", 0.5, None)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, None)),
    (("Equalize", 0.2, None), ("AutoContrast", 0.6, None)),
    (("Equalize", 0.2, None), ("Equalize", 0.6, None)),
    (("Color", 0.9, 9), ("Equalize", 0.6, None)),
    (("AutoContrast", 0.8, None), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, None)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, None), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, None), ("Invert", 0.1, None)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
)

# The value at magnitude 9, the last of ten equal steps from 0, used with either sign; translations are fractions of the
# side.
_SIGNED_RANGE = {
    "ShearY": 0.3,
    "TranslateX": 150 / 331,
    "TranslateY": 150 / 331,
    "Rotate": 30.0,
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
}
_MOVING = frozenset({"ShearY", "TranslateX", "TranslateY", "Rotate"})
_BY_VALUE = frozenset({"Brightness", "Posterize", "Solarize", "Invert"})


def auto_augment(images: Pixels, seed: int, epoch: int, rows: NDArray[np.int64]) -> Pixels:
    """Apply one of the 25 policies to each image.

    Args:
        images: uint8 [B, 3, H, W]; changed in place.
        seed: of the run.
        epoch: of training.
        rows: positions of the images in the split, [B].

    Returns:
        `images`.
    """
    policy = integers(seed, epoch, rows, Draw.POLICY, len(CIFAR10_POLICIES))
    for stage in (0, 1):
        applied = uniform(seed, epoch, rows, Draw.POLICY_APPLY + stage)
        negative = uniform(seed, epoch, rows, Draw.POLICY_SIGN + stage) < 0.5
        groups: dict[tuple[str, int | None, bool], list[int]] = {}
        for position, number in enumerate(policy.tolist()):
            name, probability, magnitude = CIFAR10_POLICIES[number][stage]
            if applied[position] < probability:
                sign = bool(negative[position]) and name in _SIGNED_RANGE
                groups.setdefault((name, magnitude, sign), []).append(position)
        for (name, magnitude, sign), positions in groups.items():
            images[positions] = apply_operation(images[positions], name, magnitude, sign)
    return images


def apply_operation(images: Pixels, name: str, magnitude: int | None, negative: bool) -> Pixels:
    """Apply one operation to images.

    Args:
        images: uint8 [N, 3, H, W].
        name: of the operation, as in `CIFAR10_POLICIES`.
        magnitude: 0 to 9; None for operations without one.
        negative: apply the magnitude with negative sign.

    Returns:
        uint8 [N, 3, H, W].
    """
    height, width = images.shape[-2:]
    if name in _BY_VALUE:
        return _value_table(name, magnitude, negative)[images]
    if name in _MOVING:
        source, inside = _source_table(name, magnitude, negative, height, width)
        return (images.reshape(*images.shape[:2], -1).take(source, axis=2) * inside).reshape(images.shape)
    if name in ("AutoContrast", "Equalize"):
        channels = images.reshape(-1, height * width)
        tables = _stretch_tables(channels) if name == "AutoContrast" else _equalize_tables(channels)
        offsets = 256 * np.arange(len(channels))[:, None]
        return tables.reshape(-1).take(channels + offsets).reshape(images.shape)
    values = images.astype(np.float32)
    factor = 1 + _amount(name, magnitude, negative, 1)
    if name == "Sharpness":
        centre = values[..., 1:-1, 1:-1]
        centre += np.float32(1 - factor) * (np.rint(_smoothed(values)) - centre)
        return _to_pixels(values)
    red, green, blue = values[:, 0], values[:, 1], values[:, 2]
    grey = np.floor(red * np.float32(0.2989) + green * np.float32(0.587) + blue * np.float32(0.114))[:, None]
    if name == "Contrast":
        # Integers are summed exactly in float64, so the mean depends neither on the order nor on the batch.
        grey = grey.mean((1, 2, 3), dtype=np.float64, keepdims=True).astype(np.float32)
    return _to_pixels(values * np.float32(factor) + grey * np.float32(1 - factor))


def _amount(name: str, magnitude: int | None, negative: bool, side: int) -> float:
    # Exactly torchvision's float32: operations truncate fractions, so a different last bit would change pixels.
    steps = torch.linspace(0, _SIGNED_RANGE[name] * side, 10)
    return float(steps[magnitude or 0]) * (-1 if negative else 1)


@lru_cache(maxsize=128)
def _value_table(name: str, magnitude: int | None, negative: bool) -> Pixels:
    """Compute the table [256] from value to value of an operation."""
    import torchvision.transforms.v2.functional as F  # seconds to import

    values, level = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 256), magnitude or 0
    match name:
        case "Brightness":
            table = F.adjust_brightness(values, 1 + _amount(name, magnitude, negative, 1))
        case "Posterize":
            table = F.posterize(values, 8 - round(level * 4 / 9))
        case "Solarize":
            table = F.solarize(values, 255 * (1 - level / 9))
        case _:
            table = F.invert(values)
    return table.reshape(-1).numpy()


@lru_cache(maxsize=128)
def _source_table(
    name: str, magnitude: int | None, negative: bool, height: int, width: int
) -> tuple[NDArray[np.int64], Pixels]:
    """Compute the source position of each pixel, [H * W], and whether it lies inside the image (1 or 0)."""
    import torchvision.transforms.v2.functional as F

    places = torch.arange(1, height * width + 1, dtype=torch.float32).reshape(1, height, width)
    amount = _amount(name, magnitude, negative, {"TranslateX": width, "TranslateY": height}.get(name, 1))
    match name:
        case "ShearY":
            moved = _affine(places, shear=[0.0, math.degrees(math.atan(amount))], center=[0, 0])
        case "TranslateX":
            moved = _affine(places, translate=[int(amount), 0])
        case "TranslateY":
            moved = _affine(places, translate=[0, int(amount)])
        case _:
            moved = F.rotate(places, amount)
    source = moved.reshape(-1).numpy().astype(np.int64) - 1
    return np.maximum(source, 0), (source >= 0).astype(np.uint8)


def _affine(image: Tensor, **changes: list[int] | list[float]) -> Tensor:
    import torchvision.transforms.v2.functional as F

    return F.affine(image, **{"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], **changes})


def _stretch_tables(channels: Pixels) -> Pixels:
    """Compute for each channel [n, H * W] the table [n, 256] that stretches its values to 0 to 255."""
    least = channels.min(1, keepdims=True).astype(np.float32)
    scale = (channels.max(1, keepdims=True).astype(np.float32) - least) * np.float32(1 / 255)
    flat = scale == 0
    least[flat], scale[flat] = 0, 1
    return _to_pixels((np.arange(256, dtype=np.float32) - least) / scale)


def _equalize_tables(channels: Pixels) -> Pixels:
    """Compute for each channel [n, H * W] the table [n, 256] that equalises its histogram, in Pillow's arithmetic."""
    count, places = channels.shape
    offsets = 256 * np.arange(count)[:, None]
    histogram = np.bincount((channels + offsets).reshape(-1), minlength=256 * count).reshape(count, 256)
    below = histogram.cumsum(1)
    brightest = np.take_along_axis(histogram, below.argmax(1)[:, None], 1)
    step = (places - brightest) // 255
    tables = np.zeros((count, 256), np.int64)
    tables[:, 1:] = ((below[:, :-1] + step // 2) // np.maximum(step, 1)).clip(0, 255)
    return np.where(step > 0, tables, np.arange(256)).astype(np.uint8)


def _smoothed(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average each 3x3 neighbourhood with weight 5 for its centre, [N, C, H - 2, W - 2]."""
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * values[..., 1:-1, 1:-1]
    return total * np.float32(1 / 13)


def _to_pixels(values: NDArray[np.floating[Any]]) -> Pixels:
    return values.clip(0, 255).astype(np.uint8)
