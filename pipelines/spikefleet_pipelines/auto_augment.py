"""AutoAugment for CIFAR-10 (Cubuk et al., "AutoAugment: Learning Augmentation Policies from Data", CVPR 2019, Table 7).

Same operations and magnitudes as `torchvision.transforms.v2.AutoAugment`, but with random numbers that are a function
of (seed, epoch, row), and applied to all images of a batch that drew the same operation at once.
"""

import math

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.counter_random import Draw, integers, uniform

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

# The value at magnitude 9, the last of ten equal steps from 0; it is taken with either sign. Translations are parts of the
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


def auto_augment(images: Tensor, seed: int, epoch: int, rows: NDArray[np.int64]) -> Tensor:
    """Apply one of the 25 policies to each image, uint8 [B, 3, H, W]; changes `images` and returns it."""
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


def apply_operation(images: Tensor, name: str, magnitude: int | None, negative: bool) -> Tensor:
    """One operation on images uint8 [N, 3, H, W]; `magnitude` is 0 to 9, or None for operations without one."""
    level = 0 if magnitude is None else magnitude
    height, width = images.shape[-2:]
    limit = _SIGNED_RANGE.get(name, 0.0) * {"TranslateX": width, "TranslateY": height}.get(name, 1)
    # The very float of torchvision: operations cut fractions off, so that a last bit would show.
    amount = float(torch.linspace(0, limit, 10)[level]) * (-1 if negative else 1)
    match name:
        case "ShearY":
            shear = [0.0, math.degrees(math.atan(amount))]
            return F.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0, 0])
        case "TranslateX":
            return F.affine(images, angle=0.0, translate=[int(amount), 0], scale=1.0, shear=[0.0, 0.0])
        case "TranslateY":
            return F.affine(images, angle=0.0, translate=[0, int(amount)], scale=1.0, shear=[0.0, 0.0])
        case "Rotate":
            return F.rotate(images, amount)
        case "Brightness":
            return F.adjust_brightness(images, 1 + amount)
        case "Color":
            return F.adjust_saturation(images, 1 + amount)
        case "Contrast":
            return F.adjust_contrast(images, 1 + amount)
        case "Sharpness":
            return F.adjust_sharpness(images, 1 + amount)
        case "Posterize":
            return F.posterize(images, 8 - round(level * 4 / 9))
        case "Solarize":
            return F.solarize(images, 255 * (1 - level / 9))
        case "AutoContrast":
            return F.autocontrast(images)
        case "Equalize":
            return F.equalize(images)
        case _:
            return F.invert(images)
