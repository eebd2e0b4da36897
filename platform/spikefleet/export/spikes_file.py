"""The binary form of a network as one safetensors file: program, weights and a test vector.

The file's metadata hold the program as JSON (`spikefleet_models.binary_program`); the test vector is one image, all
spikes that it causes, packed eight to a byte, and the outputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spikefleet.errors import RunError
from spikefleet.export.comparison import FP64_LIMIT, differences
from spikefleet.export.pixels import Scaling
from spikefleet.export.recorded import Recorded, RecordedNetwork
from spikefleet_models.binary_program import BinaryProgram, ProgramRunner, trace
from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.reparam import deploy
from spikefleet_models.spike_driven import spike_driven

KEY = "spikefleet"
_TEST = "test/"

SEMANTICS: Mapping[str, Any] = {
    "input": "the normalised image [1, C, H, W]; a layer that is fed with it alone runs once, its result is repeated "
    "over T where the program says so (expand)",
    "slots": "a neuron with D slots writes its integer n of step t as spikes at t * D + d: spike d, from 0, is n > d. "
    "A layer weighs each slot, sums over the D slots of a step and adds its bias once per step",
    "if": "h = v + x; where h >= v_threshold it fires and v = v_reset, or h - v_threshold without v_reset; else v = h",
    "lif": "as if, with h = v + (x - (v - v_reset)) / tau where decay_input, else h = v - (v - v_reset) / tau + x",
    "plif": "as lif; w is the learned parameter, 1 / tau = 1 / (1 + exp(-w))",
    "ilif": "u = leak * (u - n) + input_scale * x; n = round(clip(u, 0, slots)), halves to the even integer",
    "gates": "bsg H or X; and H and X; iand X and not H; bsg_star H where the gate of that channel opens, else X",
    "initial_state": "v = v_reset (u - n = 0) before each image",
    "test_vector": "test/pixels uint8, test/input, test/output.N, test/spikes/NEURON: bits of [T * D, 1, ...], packed "
    "eight to a byte, the first in the lowest bit; computed in fp64",
}


def write_spikes(network: nn.Module, scaling: Scaling, pixels: NDArray[np.uint8], path: Path, metadata: Any) -> None:
    """Writes a network.

    Args:
        network: in evaluation mode, on the CPU; not changed.
        scaling: of pixels to its input.
        pixels: uint8 [1, C, H, W], of the test vector.
        path: of the file.
        metadata: plain data about the network.

    Raises:
        NotSpikeDrivenError: the network has no binary form.
        ValueError: it uses an operation that programs do not have.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    program = trace(deploy(network), scaling(torch.from_numpy(pixels)))
    outputs, spikes = binary_network(network, scaling).run(pixels)
    tensors = {name: tensor.contiguous() for name, tensor in program.tensors.items()}
    tensors[f"{_TEST}pixels"] = torch.from_numpy(pixels).contiguous()
    tensors[f"{_TEST}input"] = scaling(torch.from_numpy(pixels))
    tensors |= {f"{_TEST}output.{index}": output.contiguous() for index, output in enumerate(outputs)}
    tensors |= {f"{_TEST}spikes/{name}": _packed(fired) for name, fired in spikes.items()}
    shapes = {name: list(fired.shape) for name, fired in spikes.items()}
    described = {"network": metadata, "semantics": SEMANTICS, "program": program.description, "test_spikes": shapes}
    path.write_bytes(save(tensors, {KEY: json.dumps(described)}))  # save_file would let nobody else read it


class SpikesFile:
    """A file of `write_spikes`, read and run in fp64.

    Args:
        path: of the file.
        scaling: of pixels to the input.
    """

    def __init__(self, path: Path, scaling: Scaling) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            self.description: dict[str, Any] = json.loads(file.metadata()[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        self._test = {name.removeprefix(_TEST): one for name, one in tensors.items() if name.startswith(_TEST)}
        weights = {name: one for name, one in tensors.items() if not name.startswith(_TEST)}
        self.program = BinaryProgram(self.description["program"], weights)
        self._runner = ProgramRunner(self.program, torch.float64)
        self._scaling = scaling

    def run(self, pixels: NDArray[np.uint8]) -> Recorded:
        """Outputs and spikes for images uint8 [B, C, H, W], one image after another."""
        runs = [self._runner.run(image) for image in self._scaling(torch.from_numpy(pixels)).split(1)]
        outputs = [torch.cat(levels) for levels in zip(*(outputs for outputs, _ in runs), strict=True)]
        spikes = {name: torch.cat([fired[name] for _, fired in runs], 1) for name in runs[0][1]}
        return outputs, spikes

    def check_test_vector(self) -> None:
        """Raises RunError unless the program gives the spikes and outputs of the test vector."""
        outputs, spikes = self._runner.run(self._test["input"])
        expected = [self._test[f"output.{index}"] for index in range(len(outputs))]
        if not differences(outputs, expected).max().item() <= FP64_LIMIT:
            raise RunError("the file does not compute the outputs of its test vector; nothing is written")
        for name, fired in spikes.items():
            if not torch.equal(fired.bool(), self.test_spikes(name)):
                raise RunError(f"the file does not fire neuron {name} as its test vector; nothing is written")

    def test_spikes(self, name: str) -> Tensor:
        """Spikes of a neuron in the test vector, bool [T * D, 1, ...]."""
        shape = self.description["test_spikes"][name]
        bits = np.unpackbits(self._test[f"spikes/{name}"].numpy(), count=math.prod(shape), bitorder="little")
        return torch.from_numpy(bits).bool().view(shape)


def binary_network(network: nn.Module, scaling: Scaling) -> RecordedNetwork:
    """The binary form of the deployed network, in memory and in fp64."""
    deployed = deploy(network)
    return RecordedNetwork(spike_driven(deployed), scaling, spiking_nodes(deployed), torch.float64)


def _packed(spikes: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(spikes.bool().numpy().reshape(-1), bitorder="little"))
