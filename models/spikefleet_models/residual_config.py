"""What SG ResNet and 7B-Net have in common: gated residual blocks of spiking neurons before a decoder."""

from typing import ClassVar, Literal, Self

from pydantic import Field

from spikefleet_models.family import ModelConfig
from spikefleet_models.neuron_config import NeuronConfig


class GatedResidualConfig(ModelConfig):
    """The fields of a classifier of gated residual blocks."""

    task: ClassVar[str] = "classification"

    connection: Literal["bsg", "bsg_star", "add", "and", "iand", "post_add", "ann"] = Field(
        "bsg", description="How a block combines with its shortcut; ann is the ANN twin."
    )
    gate_gradient: Literal["exact", "literal"] = Field(
        "exact",
        description="Gradient of BSG and BSG* to H: that of the gate's Boolean function, or of the formula as written.",
    )
    gate_threshold: float = Field(0.5, gt=0.0, le=1.0, description="thr of BSG*; the gate is initially H.")
    decoder: Literal["asd", "rate"] = Field("asd", description="Attention spike decoder or firing rate.")
    asd_channel_reduction: int = Field(16, ge=1, description="r of the ASD's channel attention.")
    asd_temporal_reduction: int = Field(1, ge=1, description="r_t of the ASD's temporal attention.")
    neuron: NeuronConfig = Field(default_factory=NeuronConfig, description="Every spiking neuron of the network.")
    timesteps: int = Field(4, ge=1, description="Time steps T; the ANN twin always runs one.")
    in_channels: int = Field(3, ge=1, description="Channels of the images or event frames.")
    num_classes: int = Field(10, ge=1, description="Number of classes.")
    norm_momentum: float = Field(
        0.1,
        gt=0.0,
        le=1.0,
        description="Weight of a step's batch in batch norm's running statistics; smaller for fewer images per worker.",
    )
    zero_init_residual: bool = Field(
        False,
        description="Initialise blocks to the identity: gamma = 0 in the last batch norm; for and, a beta that fires.",
    )

    @property
    def is_spiking(self) -> bool:
        """False for the ANN twin."""
        return self.connection != "ann"

    @property
    def uses_asd(self) -> bool:
        """Whether the network has an attention spike decoder; the ANN twin never has."""
        return self.decoder == "asd" and self.is_spiking

    @property
    def needs_all_timesteps(self) -> bool:
        """True with weights over T in the decoder."""
        return self.uses_asd

    def twin(self) -> Self:
        """The same configuration with `connection: ann`."""
        return self.model_validate({**self.model_dump(), "connection": "ann"})

    def tags(self) -> dict[str, object]:
        """Tags of the base class, connection, decoder and neuron."""
        return {**super().tags(), "connection": self.connection, "decoder": self.decoder, **self.neuron.tags()}

    def check_decoder(self, channels: int) -> None:
        """Check that the attention spike decoder behind the last `channels` can be built, if there is one.

        Raises:
            ValueError: a reduction does not divide what it reduces.
        """
        if not self.uses_asd:
            return
        if channels % self.asd_channel_reduction:
            raise ValueError(
                f"asd_channel_reduction={self.asd_channel_reduction} must divide the last stage's {channels} channels; "
                "set a divisor"
            )
        if self.timesteps % self.asd_temporal_reduction:
            raise ValueError(
                f"asd_temporal_reduction={self.asd_temporal_reduction} must divide timesteps={self.timesteps}; set a "
                "divisor"
            )
