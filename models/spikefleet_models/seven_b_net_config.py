"""The configuration of 7B-Net and its published members; seven_b_net.py holds the network."""

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.residual_config import GatedResidualConfig
from spikefleet_models.shortcut_config import ShortcutConfig

if TYPE_CHECKING:
    from torch import nn

_WIDE: Mapping[str, Any] = {"channels": (64, 64, 64, 64, 128, 128, 128)}
_NARROW: Mapping[str, Any] = {"channels": (32,) * 7}
_SEW: Mapping[str, Any] = {"connection": "add", "decoder": "rate"}


class SevenBNetConfig(GatedResidualConfig):
    """Seven residual blocks for event frames; the defaults are the wide network for DVS-CIFAR10."""

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
    neuron: NeuronConfig = Field(
        default_factory=lambda: NeuronConfig(kind="plif"), description="Every spiking neuron of the network."
    )
    timesteps: int = Field(16, ge=1, description="Time steps T, slices of a recording; the ANN twin averages any.")
    in_channels: int = Field(2, ge=1, description="Channels of the event frames or images.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "SevenBNetConfig":
        if min(self.channels) < 1:
            raise ValueError(f"channels={self.channels}: every block must have at least 1 channel")
        self.check_decoder(self.channels[-1])
        return self

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of each stage: the blocks of one width after another."""
        return tuple(channels for channels, _ in groupby(self.channels))

    @property
    def stage_count(self) -> int:
        """Number of blocks, each of which halves the planes."""
        return len(self.channels)

    def build(self) -> "nn.Module":
        """Build the `SevenBNet`."""
        from spikefleet_models.seven_b_net import SevenBNet

        return SevenBNet(self)

    def branch_channels(self, shortcut: ShortcutConfig) -> list[int]:
        """Output channels of all stages, or of all blocks, except the last.

        Raises:
            ValueError: there are no branches, or `convex` would give the network's own output a negative weight.
        """
        channels = self.stage_channels if shortcut.where == "stage" else self.channels
        return shortcut.check_branches(list(channels[:-1]))
