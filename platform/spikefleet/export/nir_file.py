"""A spiking ResNet as a NIR file, with a test vector beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spikefleet.export.nir_graph import OUTPUT, below
from spikefleet.export.nir_interpreter import run_graph
from spikefleet.export.pixels import Scaling
from spikefleet.export.recorded import Recorded, RecordedNetwork
from spikefleet_models.gates import Gate, LearnedGate
from spikefleet_models.neurons import SpikingNode, spiking_nodes
from spikefleet_models.reparam import deploy

if TYPE_CHECKING:
    import nir

SEMANTICS: Mapping[str, Any] = {
    "dt": 1.0,
    "integration": "Euler: IF v += dt * r * i; LIF v += dt / tau * (v_leak - v + r * i)",
    "fires": "where v > v_threshold; v_threshold is the largest fp32 number below the trained one, which fires at >=",
    "reset": "to v_reset, in the step of the spike, after it",
    "initial_state": "v = v_reset before each image",
    "input": "the normalised image, the same at each of the T steps",
    "output": "logits are the mean of the output over the T steps",
    "edges": "into one node add up, without delay",
    "test_vector": "pixels [1, C, H, W] uint8; input [1, C, H, W]; logits [1, K]; spikes/NODE [T, 1, C, H, W] in fp64",
}
"""What a NIR file does not say by itself."""


class NirFile:
    """A NIR file as `run_graph` runs it, in fp64."""

    def __init__(self, path: Path, scaling: Scaling, timesteps: int) -> None:
        import nir

        self.graph: nir.NIRGraph = nir.read(path)
        self._scaling, self._timesteps = scaling, timesteps

    @torch.inference_mode()
    def run(self, pixels: NDArray[np.uint8]) -> Recorded:
        """Outputs and spikes for images uint8 [B, C, H, W]."""
        images = self._scaling(torch.from_numpy(pixels)).double()
        values = run_graph(self.graph, images.expand(self._timesteps, *images.shape))
        firing = ("IF", "LIF", "Threshold")
        spikes = {name: values[name] for name, node in self.graph.nodes.items() if type(node).__name__ in firing}
        return [values[OUTPUT].mean(0)], spikes


def folded_network(network: nn.Module, scaling: Scaling) -> RecordedNetwork:
    """The folded network in fp64, with thresholds as the file has them; what fires bears the names of the file."""
    folded = deploy(network)
    for node in spiking_nodes(folded).values():
        node.v_threshold = float(below(node.v_threshold))
    return RecordedNetwork(folded, scaling, (name for name, m in folded.named_modules() if _fires(m)), torch.float64)


def _fires(module: nn.Module) -> bool:
    adds = isinstance(module, Gate) and module.name == "add"
    return isinstance(module, SpikingNode | LearnedGate | Gate | nn.MaxPool2d) and not adds


def write_nir(graph: nir.NIRGraph, path: Path) -> None:
    """Writes a graph. Raises OSError."""
    import nir

    nir.write(path, graph)


def write_test_vector(folded: RecordedNetwork, pixels: NDArray[np.uint8], scaling: Scaling, path: Path) -> None:
    """Writes what the network does with one image [1, C, H, W], as NumPy arrays. Raises OSError."""
    (logits,), spikes = folded.run(pixels)
    arrays: dict[str, Any] = {f"spikes/{name}": fired.numpy().astype(np.uint8) for name, fired in spikes.items()}
    scaled = scaling(torch.from_numpy(pixels)).numpy()
    with path.open("wb") as file:
        np.savez_compressed(file, pixels=pixels, input=scaled, logits=logits.numpy(), **arrays)
