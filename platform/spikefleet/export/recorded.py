"""A network in memory whose spikes are recorded, for the comparison with a file and for test vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spikefleet.export.pixels import Scaling

Recorded = tuple[Sequence[Tensor], Mapping[str, Tensor]]
"""Outputs [B, ...], and spikes [T, B, ...] (slots: [T * D, B, ...]) by the names of neurons and gates."""


class RecordedNetwork:
    """A network on uint8 images, with what some of its modules put out.

    Args:
        network: in evaluation mode.
        scaling: of pixels to its input.
        names: of the modules.
        dtype: of weights and images; pixels are scaled in fp32.
    """

    def __init__(self, network: nn.Module, scaling: Scaling, names: Iterable[str], dtype: torch.dtype) -> None:
        self._network = copy.deepcopy(network).to(dtype)
        self._scaling, self._names, self._dtype = scaling, tuple(names), dtype

    @torch.inference_mode()
    def run(self, pixels: NDArray[np.uint8]) -> Recorded:
        """Outputs and spikes for images uint8 [B, C, H, W]."""
        spikes: dict[str, Tensor] = {}
        images = self._scaling(torch.from_numpy(pixels)).to(self._dtype)

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                # A max-pool has time and batch in one axis.
                spikes[name] = output.clone() if output.ndim == 5 else output.unflatten(0, (-1, len(pixels)))

            return hook

        with ExitStack() as stack:
            for name in self._names:
                module = self._network.get_submodule(name)
                stack.callback(module.register_forward_hook(keep(name)).remove)
            outputs = self._network(images)
        return as_outputs(outputs), spikes


def as_outputs(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a network as a list: a classifier has one tensor, a detector one for each level."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
