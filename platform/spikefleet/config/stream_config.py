"""The section of a training on streams: membrane state that outlives a window."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from spikefleet.config.section import Section
from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig


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

    def check(self, transform: BatchTransformConfig, hindrances: Sequence[str], is_detection: bool) -> None:
        """Check the section against the rest of a configuration.

        Args:
            transform: of the data.
            hindrances: settings that streams cannot be combined with.
            is_detection: whether labels are boxes at label times.

        Raises:
            ValueError: a setting does not fit; the message has its path.
        """
        try:
            transform.stream_window_us()
        except ValueError as error:
            raise ValueError(f"train.stream: data.transform.{error}, or set train.stream=null") from None
        if hindrances:
            raise ValueError(
                f"train.stream cannot be combined with {hindrances[0]}; leave that out, or set train.stream=null"
            )
        if is_detection and self.labelled != "last":
            raise ValueError(f"train.stream.labelled={self.labelled} has no effect on label times; leave it out")
