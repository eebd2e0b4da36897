"""Spiking RetinaNet: spiking residual backbone, a decoder for each tapped stage, and torchvision's pyramid and heads.

Zhang et al., Front. Neurosci. 2023: SG ResNet, one attention spike decoder each on C3, C4 and C5, then RetinaNet (Lin
et al., ICCV 2017) as an ANN: feature pyramid P3 to P7, two heads of four convolutions shared by all levels, nine
anchors per cell. The ANN twin is the same network with `backbone.connection: ann`.

What the paper leaves open follows mmdetection: P6 is a convolution of C5, no normalisation in pyramid and heads unless
`norm` asks for it, foreground prior .01. Deviations from it: a ReLU between P6 and P7, as in torchvision's block and in
Lin et al.; weights of pyramid and heads are drawn as in torchvision; trained from random weights, so no batch norm is
frozen, and its statistics can be slower (`backbone.norm_momentum`). Recipes from random weights normalise pyramid and
heads too (He et al., "Rethinking ImageNet pre-training", ICCV 2019): `norm: group`, except P6 and P7, which torchvision
does not normalise.
"""

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

from spikefleet_models.residual_block import build_decoder
from spikefleet_models.retinanet_config import RetinaNetConfig
from spikefleet_models.sg_resnet import SGResNetBackbone


class RetinaNet(nn.Module):
    """The network of a `RetinaNetConfig`."""

    def __init__(self, config: RetinaNetConfig) -> None:
        from torchvision.models.detection.retinanet import (  # seconds to import, as all of torchvision
            RetinaNetClassificationHead,
            RetinaNetRegressionHead,
        )
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

        super().__init__()
        self.config = config
        self.backbone = SGResNetBackbone(config.backbone)
        self.timesteps = self.backbone.timesteps
        self.decoders = nn.ModuleList(build_decoder(config.backbone, channels) for channels in config.tapped_channels)
        extra_levels = None
        if config.extra_levels:
            extra_levels = LastLevelP6P7(config.tapped_channels[-1], config.fpn_channels)
            # torchvision's block would take P5 for C5 where both have the same channels.
            extra_levels.use_P5 = False
        channels, anchors = config.fpn_channels, config.criterion.anchors_per_cell
        norm = partial(nn.GroupNorm, config.norm_groups) if config.norm == "group" else None
        self.pyramid = FeaturePyramidNetwork(list(config.tapped_channels), channels, extra_levels, norm)
        self.classification = RetinaNetClassificationHead(channels, anchors, config.num_classes, norm_layer=norm)
        self.regression = RetinaNetRegressionHead(channels, anchors, norm_layer=norm)
        self.backbone.initialise()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the raw outputs of the levels.

        Args:
            images: images [B, C, H, W] or frames [T, B, C, H, W].

        Returns:
            [B, A * (K + 4), h, w] per level, finest first: K class logits of each of the A anchors, then the 4 box
            codes of each.

        Raises:
            ValueError: the shape or type of `images` does not fit the configuration.
        """
        features = self.backbone.forward_features(images)[-self.config.taps :]
        decoded = OrderedDict(
            (str(index), decoder(spikes))
            for index, (decoder, spikes) in enumerate(zip(self.decoders, features, strict=True))
        )
        return tuple(self._heads(level) for level in self.pyramid(decoded).values())

    def stage_blocks(self) -> list[list[nn.Module]]:
        """The blocks of each stage of the backbone, from the one with the largest planes."""
        return self.backbone.stage_blocks()

    def _heads(self, level: Tensor) -> Tensor:
        # The heads' own forward would flatten the levels into one.
        logits = self.classification.cls_logits(self.classification.conv(level))
        codes = self.regression.bbox_reg(self.regression.conv(level))
        return torch.cat((logits, codes), dim=1)
