"""Options of the scenes of handwritten digits for detection; `scenes.py` composes them."""

from pydantic import Field, field_validator

from spikefleet_pipelines.sources.source import Source, SourceOptions


class ScenesOptions(SourceOptions):
    """Size, content and number of the scenes."""

    size: int = Field(default=96, ge=64, le=1024, description="side of a scene in pixels")
    objects: int = Field(default=5, ge=1, le=20, description="maximum number of digits in a scene")
    train: int = Field(default=4000, ge=1, le=1_000_000, description="number of training scenes")
    val: int = Field(default=300, ge=1, le=1_000_000, description="number of scenes for validation")
    test: int = Field(default=300, ge=1, le=1_000_000, description="number of scenes for the test")

    @field_validator("size")
    @classmethod
    def _whole_cells(cls, size: int) -> int:
        if size % 8:
            raise ValueError("expected a multiple of 8")
        return size


SCENES = Source(
    name="scenes",
    description="scenes of scikit-learn's digits with boxes, for detection, built in",
    reader="spikefleet_pipelines.sources.scenes:read_scenes",
    options=ScenesOptions,
)
