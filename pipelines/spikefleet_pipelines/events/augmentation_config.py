"""Which augmentations of events a training uses; `augmentation.py` applies them in the order of the fields."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.label_effects import LabelEffects


class EventAugmentation(BaseModel):
    """Which augmentations of events a training uses; the default is none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    horizontal_flip: float = Field(default=0.0, ge=0, le=1, description="probability of a horizontal flip")
    polarity_swap: float = Field(default=0.0, ge=0, le=1, description="probability that ON and OFF are exchanged")
    time_reversal: float = Field(
        default=0.0, ge=0, le=1, description="probability that time runs backwards, with ON and OFF exchanged"
    )
    shift: float = Field(
        default=0.0, ge=0, le=1, description="greatest shift in each direction, of the sensor's side; 5/48 in NDA"
    )
    shift_border: Literal["wrap", "drop"] = Field(
        default="wrap", description="what becomes of events that a shift moves over the border"
    )
    time_crop: float = Field(default=1.0, gt=0, le=1, description="length of a random part that is kept, of the whole")
    time_jitter_us: float = Field(default=0.0, ge=0, description="standard deviation of the jitter of times")
    event_drop: bool = Field(default=False, description="drop nothing, a time, an area or random events, each of 1/4")

    @property
    def is_none(self) -> bool:
        """Whether nothing is augmented."""
        return self == EventAugmentation()

    def kept_us(self, duration_us: int) -> int:
        """Return the length that a time crop leaves of a sample, in microseconds."""
        return max(1, round(self.time_crop * duration_us))

    def refuse_forbidden(self, effects: LabelEffects) -> None:
        """Refuse what the labels of a data set do not survive.

        Raises:
            SourceError: a forbidden augmentation has a probability above 0.
        """
        for name, effect in (("horizontal_flip", effects.mirror), ("time_reversal", effects.reversal)):
            if getattr(self, name) > 0 and effect == "forbidden":
                raise SourceError(
                    f"{name} is {getattr(self, name)}: it changes what the labels of this data set mean; set it to 0"
                )
