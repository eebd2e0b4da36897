"""Networks and images for exports."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spikefleet.export.pixels import ImagesToCompare


class Pixels(ImagesToCompare):
    """Drawn images, as `ImagesToCompare` gives those of a split."""

    def __init__(self, count: int, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
        for name, value in {"split": "test", "shape": shape, "count": count, "pixels": pixels}.items():
            object.__setattr__(self, name, value)

    def all(self) -> NDArray[np.uint8]:
        """All images, uint8 [B, C, H, W]."""
        pixels: NDArray[np.uint8] = vars(self)["pixels"]
        return pixels

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        yield from np.array_split(self.all(), max(1, self.count // 16))


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics, affines and gates as training leaves them: none is 0 or 1, and all layers fire."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, scale: float, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale + mean

    with torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                shape = module.running_mean.shape
                module.running_mean.copy_(normal(shape, 0.3))
                module.running_var.copy_(torch.rand(shape, generator=generator) * 0.5 + 0.1)
                module.weight.copy_(torch.rand(shape, generator=generator) + 0.5)
                module.bias.copy_(normal(shape, 0.3, 0.3))
            if name.endswith("gate") and hasattr(module, "bias"):
                for parameter in module.parameters():
                    parameter.copy_(normal(parameter.shape, 1.0))
    return network.eval()
