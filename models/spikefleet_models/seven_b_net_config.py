"""The configuration of 7B-Net and its published members; seven_b_net.py holds the network."""

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from spikefleet_models.family import ModelConfig
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.sg_resnet_config import check_asd_reductions
from spikefleet_models.shortcut_config import ShortcutConfig

if TYPE_CHECKING:
    from torch import nn

_WIDE: Mapping[str, Any] = {"channels": (64, 64, 64, 64, 128, 128, 128)}
_NARROW: Mapping[str, Any] = {"channels": (32,) * 7}
_SEW: Mapping[str, Any] = {"connection": "add", "decoder": "rate"}


class SevenBNetConfig(ModelConfig):
    """Seven residual blocks for event frames; the defaults are the wide network for DVS-CIFAR10."""

    task: ClassVar[str] = "classification"
    trunk: ClassVar[tuple[str, ...]] = ("blocks.", "widenings.")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Zhang et al. 2023, DVS-CIFAR10, where the width is not stated; Fang et al. 2021 call it Wide-7B-Net.
        "seven_b_net_wide": _WIDE,
        # Fang et al. 2021, DVS Gesture.
        "seven_b_net_narrow": _NARROW,
        # Fang et al. 2021, ADD.
        "sew_seven_b_net_wide": {**_WIDE, **_SEW},
    }

    family: Literal["seven_b_net"] = "seven_b_net"
    channels: tuple[int, ...] = Field(
        (64, 64, 64, 64, 128, 128, 128), min_length=1, description="Channels of each block."
    )
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
    neuron: NeuronConfig = Field(
        default_factory=lambda: NeuronConfig(kind="plif"), description="Every spiking neuron of the network."
    )
    timesteps: int = Field(16, ge=1, description="Time steps T, slices of a recording; the ANN twin averages any.")
    in_channels: int = Field(2, ge=1, description="Channels of the event frames or images.")
    num_classes: int = Field(10, ge=1, description="Number of classes.")
    norm_momentum: float = Field(
        0.1,
        gt=0.0,
        le=1.0,
        description="Weight of a step's batch in batch norm's running statistics; smaller for small batches.",
    )
    zero_init_residual: bool = Field(
        False,
        description="Initialise blocks to the identity: gamma = 0 in the last batch norm; for and, a beta that fires.",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> "SevenBNetConfig":
        if min(self.channels) < 1:
            raise ValueError(f"channels={self.channels}: every block must have at least 1 channel")
        if self.uses_asd:
            check_asd_reductions(
                self.asd_channel_reduction, self.channels[-1], self.asd_temporal_reduction, self.timesteps
            )
        return self

    @property
    def is_spiking(self) -> bool:
        """False for the ANN twin."""
        return self.connection != "ann"

    @property
    def uses_asd(self) -> bool:
        """Whether the network has an attention spike decoder; the ANN twin never has."""
        return self.decoder == "asd" and self.is_spiking

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of each stage: the blocks of one width after another."""
        return tuple(channels for channels, _ in groupby(self.channels))

    @property
    def needs_all_timesteps(self) -> bool:
        """True with weights over T in the decoder."""
        return self.uses_asd

    def build(self) -> "nn.Module":
        """Build the `SevenBNet`."""
        from spikefleet_models.seven_b_net import SevenBNet

        return SevenBNet(self)

    def twin(self) -> Self:
        """The same configuration with `connection: ann`."""
        return self.model_validate({**self.model_dump(), "connection": "ann"})

    def branch_channels(self, shortcut: ShortcutConfig) -> list[int]:
        """Output channels of all stages, or of all blocks, except the last.

        Raises:
            ValueError: there are no branches, or `convex` would give the network's own output a negative weight.
        """
        channels = self.stage_channels if shortcut.where == "stage" else self.channels
        return shortcut.check_branches(list(channels[:-1]))

    def tags(self) -> dict[str, object]:
        """Tags of the base class, connection, decoder and neuron."""
        return {**super().tags(), "connection": self.connection, "decoder": self.decoder, **self.neuron.tags()}
