"""The configuration of SG, SEW, Spiking and ANN ResNet, and the published members; sg_resnet.py holds the network."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from spikefleet_models.residual_config import GatedResidualConfig
from spikefleet_models.shortcut_config import ShortcutConfig

if TYPE_CHECKING:
    from torch import nn

STEM_CHANNELS = 64

_R10: Mapping[str, Any] = {"stages": (1, 1, 1, 1)}
_R18: Mapping[str, Any] = {"stages": (2, 2, 2, 2)}
_R34: Mapping[str, Any] = {"stages": (3, 4, 6, 3)}
_R50: Mapping[str, Any] = {"stages": (3, 4, 6, 3), "block": "bottleneck"}
_SEW: Mapping[str, Any] = {"connection": "add", "decoder": "rate"}
_SPIKING: Mapping[str, Any] = {"connection": "post_add", "decoder": "rate"}
_ANN: Mapping[str, Any] = {"connection": "ann", "decoder": "rate", "timesteps": 1}


class SGResNetConfig(GatedResidualConfig):
    """A residual network; the defaults are SG ResNet18 for CIFAR-10."""

    trunk: ClassVar[tuple[str, ...]] = ("stem.", "stages.")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Zhang et al. 2023. R50 decodes by rate there; the others by ASD.
        "sg_resnet10": _R10,
        "sg_resnet18": _R18,
        "sg_resnet34": _R34,
        "sg_resnet50": {**_R50, "decoder": "rate"},
        # For 8x8 images: seconds to train on a laptop.
        "sg_resnet_tiny": {"stages": (1, 1, 1), "width": 0.5, "in_channels": 1},
        # Fang et al. 2021, ADD.
        "sew_resnet18": {**_R18, **_SEW},
        "sew_resnet34": {**_R34, **_SEW},
        "sew_resnet50": {**_R50, **_SEW},
        # Post-addition baselines.
        "spiking_resnet18": {**_R18, **_SPIKING},
        "spiking_resnet34": {**_R34, **_SPIKING},
        # ANN twins.
        "resnet18": {**_R18, **_ANN},
        "resnet34": {**_R34, **_ANN},
        "resnet50": {**_R50, **_ANN},
    }

    family: Literal["sg_resnet"] = "sg_resnet"
    stages: tuple[int, ...] = Field(
        (2, 2, 2, 2), min_length=1, description="Blocks per stage; all stages but the first halve H and W."
    )
    block: Literal["basic", "bottleneck"] = Field("basic", description="3x3, 3x3; or 1x1, 3x3, 1x1 times 4.")
    width: float = Field(1.0, gt=0.0, description="Channels of the first stage over 64; they double each stage.")
    stem: Literal["cifar", "strided", "imagenet"] = Field(
        "cifar", description="3x3 stride 1; 3x3 stride 2, for small members; or 7x7 stride 2 and 3x3 max-pool."
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> "SGResNetConfig":
        if any(blocks < 1 for blocks in self.stages):
            raise ValueError(f"stages={self.stages}: every stage must have at least 1 block")
        if not (STEM_CHANNELS * self.width).is_integer():
            channels = STEM_CHANNELS * self.width
            raise ValueError(f"width={self.width} gives {channels} channels; set a multiple of 1/64")
        self.check_decoder(self.stage_channels[-1])
        return self

    @property
    def base_channels(self) -> int:
        """Channels of the stem and, before expansion, of the first stage."""
        return int(STEM_CHANNELS * self.width)

    @property
    def stem_stride(self) -> int:
        """Pixels per cell of the first stage."""
        return {"cifar": 1, "strided": 2, "imagenet": 4}[self.stem]

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Output channels of each stage."""
        expansion = 4 if self.block == "bottleneck" else 1
        return tuple(self.base_channels * 2**stage * expansion for stage in range(len(self.stages)))

    @property
    def stage_count(self) -> int:
        """Number of `stages`."""
        return len(self.stages)

    def build(self) -> "nn.Module":
        """Build the `SGResNet`."""
        from spikefleet_models.sg_resnet import SGResNet

        return SGResNet(self)

    def branch_channels(self, shortcut: ShortcutConfig) -> list[int]:
        """Output channels of all stages, or of all blocks, except the last.

        Raises:
            ValueError: there are no branches, or `convex` would give the network's own output a negative weight.
        """
        channels = [
            out
            for out, blocks in zip(self.stage_channels, self.stages, strict=True)
            for _ in range(blocks if shortcut.where == "block" else 1)
        ]
        return shortcut.check_branches(channels[:-1])
