"""The configuration of the small network for event frames; small_event_net.py holds the network."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from spikefleet_models.family import ModelConfig
from spikefleet_models.neuron_config import NeuronConfig

if TYPE_CHECKING:
    from torch import nn


class SmallEventNetConfig(ModelConfig):
    """Two convolutions with stride 2; the defaults are for 17x17 event frames."""

    task: ClassVar[str] = "classification"
    trunk: ClassVar[tuple[str, ...]] = ("layers.",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small_event_net": {},
        # For tasks in which the order of slices counts.
        "small_event_net_weighted": {"decoder": "weighted"},
    }

    family: Literal["small_event_net"] = "small_event_net"
    channels: tuple[int, ...] = Field((24, 48), min_length=1, description="Channels; H and W halve with each.")
    grid: int = Field(5, ge=1, description="The last spikes are averaged to this many cells a side; 17x17 gives 5.")
    activation: Literal["spiking", "relu"] = Field("spiking", description="relu is the ANN twin.")
    decoder: Literal["rate", "weighted"] = Field("rate", description="Mean over T, or one learned weight a step.")
    neuron: NeuronConfig = Field(
        default_factory=lambda: NeuronConfig(kind="plif"), description="Every spiking neuron of the network."
    )
    timesteps: int = Field(16, ge=1, description="Time steps T, slices of a recording; the ANN twin averages any.")
    in_channels: int = Field(2, ge=1, description="Channels of the event frames or images.")
    num_classes: int = Field(10, ge=1, description="Number of classes.")

    @model_validator(mode="after")
    def _spikes_are_binary(self) -> "SmallEventNetConfig":
        if self.neuron.kind == "ilif" and self.neuron.bound > 1:
            raise ValueError(
                f"neuron.bound={self.neuron.bound}: the last neurons feed the decoder, which binary slots cannot; set "
                "neuron.bound=1"
            )
        return self

    @property
    def is_spiking(self) -> bool:
        """False for the ANN twin."""
        return self.activation == "spiking"

    @property
    def uses_step_weights(self) -> bool:
        """Whether the decoder has weights for exactly T steps; the ANN twin never has."""
        return self.decoder == "weighted" and self.is_spiking

    @property
    def needs_all_timesteps(self) -> bool:
        """True with weights over T in the decoder."""
        return self.uses_step_weights

    def build(self) -> "nn.Module":
        """Build the `SmallEventNet`."""
        from spikefleet_models.small_event_net import SmallEventNet

        return SmallEventNet(self)

    def twin(self) -> Self:
        """The same configuration with `activation: relu`."""
        return self.model_validate({**self.model_dump(), "activation": "relu"})

    def tags(self) -> dict[str, object]:
        """Tags of the base class, decoder and neuron."""
        return {**super().tags(), "decoder": self.decoder, **self.neuron.tags()}
