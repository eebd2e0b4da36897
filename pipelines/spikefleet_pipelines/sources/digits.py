"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, part of the installed package."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.nn.functional import interpolate

from spikefleet_pipelines.sources.source import ArrayContents, Source, SourceOptions, held_out, hold_out_validation


class DigitsOptions(SourceOptions):
    upsample: Literal[1, 2, 4] = Field(default=1, description="factor of bilinear enlargement: 8, 16 or 32 pixels")


def read_digits(root: Path | None, options: SourceOptions, seed: int) -> ArrayContents:
    """Grey values 0 to 16 become 0 to 255. Of each class, 20 % are held out for test and 10 % of the rest for val."""
    from sklearn.datasets import load_digits  # here, because it takes a second that nobody else should wait for

    assert isinstance(options, DigitsOptions)
    digits = load_digits()
    images: NDArray[np.uint8] = np.round(digits.images[:, None] * (255 / 16)).astype(np.uint8)
    if options.upsample > 1:
        images = interpolate(torch.from_numpy(images), scale_factor=options.upsample, mode="bilinear").numpy()
    labels = digits.target.astype(np.int64)
    test = held_out(labels, lambda n: round(n * 0.2), seed)
    splits = hold_out_validation(images[~test], labels[~test], lambda n: round(n * 0.1), seed)
    return ArrayContents(tuple(map(str, range(10))), {**splits, "test": (images[test], labels[test])})


DIGITS = Source("digits", "scikit-learn's 1,797 handwritten digits, built in", read_digits, DigitsOptions)
