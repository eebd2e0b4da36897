"""The section of a training on streams: membrane state that outlives a window."""

from typing import Literal

from pydantic import Field

from spikefleet.config.section import Section


class StreamConfig(Section):
    """Consecutive windows of recordings, one after the other in each lane of the batch."""

    state: Literal["carried", "reset"] = Field(
        "carried",
        description="membranes at the start of a window: those after the window before, without its gradient "
        "(truncated back-propagation through time), and the reset state where a recording begins; or always the latter",
    )
    labelled: Literal["last", "all"] = Field(
        "last",
        description="classification: windows of a recording that are trained on; evaluation asks after the last one",
    )
    mix: float = Field(
        0.0, ge=0, lt=1, description="part of the batch with random labelled windows from the reset state instead"
    )
