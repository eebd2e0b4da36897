"""Options of scikit-learn's handwritten digits; `digits.py` reads them."""

from typing import Literal

from pydantic import Field

from spikefleet_pipelines.sources.source import Source, SourceOptions, holdout_field, train_images_field


class DigitsOptions(SourceOptions):
    """Enlargement of the digits, and validation images."""

    upsample: Literal[1, 2, 4] = Field(default=1, description="factor of bilinear enlargement: 8, 16 or 32 pixels")
    holdout: float = holdout_field(0.1)
    train_images: int | None = train_images_field()


DIGITS = Source(
    name="digits",
    description="scikit-learn's 1,797 handwritten digits, built in",
    reader="spikefleet_pipelines.sources.digits:read_digits",
    options=DigitsOptions,
)
