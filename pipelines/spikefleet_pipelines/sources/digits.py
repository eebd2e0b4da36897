"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, part of the installed package."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

from spikefleet_pipelines.sources.contents import ArrayContents, held_out, hold_out_validation
from spikefleet_pipelines.sources.digits_config import DigitsOptions


def read_digits(root: Path | None, options: DigitsOptions, seed: int) -> ArrayContents:
    """Load the digits, with grey values 0 to 16 scaled to 0 to 255.

    Of each class, 20 % are held out for test and by default 10 % of the rest for val.
    """
    digits = load_digits()
    images: NDArray[np.uint8] = np.round(digits.images[:, None] * (255 / 16)).astype(np.uint8)
    if options.upsample > 1:
        images = interpolate(torch.from_numpy(images), scale_factor=options.upsample, mode="bilinear").numpy()
    labels = digits.target.astype(np.int64)
    test = held_out(labels, lambda n: round(n * 0.2), seed)
    splits = hold_out_validation(images[~test], labels[~test], options.holdout, seed, options.train_images)
    return ArrayContents(tuple(map(str, range(10))), {**splits, "test": (images[test], labels[test])})
