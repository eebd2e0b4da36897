"""A spiking ResNet as a NIR graph (Pedersen et al., Nature Communications 2024), made from its folded form.

Edges into one node add up, and a spike is 1. So

    ADD    Y = H + X                             two edges from H and X into whatever reads Y
    BSG    Y = H or X                            Threshold(0.5) of H + X
    AND    Y = H and X                           Threshold(1.5) of H + X
    IAND   Y = not H and X                       Threshold(0.5) of X + Scale(-1)(H)
    BSG*   per channel H or X, H and X, H, X     Threshold(0.5 or 1.5) of Scale(0 or 1)(H) + Scale(0 or 1)(X)
    post   SN(F(X) + X)                          two edges into the neuron
    max-pooling of spikes                        SumPool2d, then Threshold(0.5)
    firing rate, mean over H and W, classifier   AvgPool2d, Flatten, Affine at each step; logits are the mean over T

NIR's neurons fire where v > threshold, ours where v >= V_th: the file has the largest fp32 number below V_th. With
dt = 1 one step of Euler's method is ours: IF with r = 1, LIF with tau in steps, v_leak = v_reset, and r = 1, or
r = tau where the input is not divided by tau.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spikefleet.errors import UserError
from spikefleet.export.nir_refusals import refuse_what_nir_lacks
from spikefleet_models.gates import Gate, LearnedGate
from spikefleet_models.membrane import Dynamics
from spikefleet_models.neurons import PLIF, SpikingNode
from spikefleet_models.reparam import deploy
from spikefleet_models.residual_block import ResidualBlock
from spikefleet_models.sg_resnet import SGResNet
from spikefleet_models.spiking_unit import SpikingUnit

if TYPE_CHECKING:
    import nir

INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class _Signal:
    """The sum of the outputs of nodes, [C, H, W] a step."""

    sources: tuple[str, ...]
    shape: tuple[int, int, int]


def below(threshold: float) -> np.float32:
    """The largest fp32 number below a threshold: v > that where v >= threshold."""
    return np.nextafter(np.float32(threshold), np.float32(-np.inf))


def nir_graph(network: nn.Module, shape: tuple[int, int, int]) -> nir.NIRGraph:
    """Builds the graph of a network.

    Args:
        network: in evaluation mode, on the CPU; not changed.
        shape: (C, H, W) of the images.

    Raises:
        UserError: NIR has no node for one of its layers; the message names the layer.
    """
    import nir

    refuse_what_nir_lacks(network)
    deployed = deploy(network)
    assert isinstance(deployed, SGResNet)
    names = {module: name for name, module in deployed.named_modules()}
    builder = _Builder(names)
    signal = builder.image(shape)
    stem = deployed.stem
    signal = builder.fire(stem.unit, builder.convolve(stem.conv, signal))
    if isinstance(stem.pool, nn.MaxPool2d):
        signal = builder.max_pool(stem.pool, signal)
    for stage in deployed.stages:
        for block in stage.children():
            assert isinstance(block, ResidualBlock)
            signal = _block(builder, block, signal)
    builder.classify(deployed.classifier, signal)
    return nir.NIRGraph(builder.nodes, builder.edges)


def _block(builder: _Builder, block: ResidualBlock, x: _Signal) -> _Signal:
    shortcut = x
    if block.shortcut is not None:
        shortcut = builder.convolve(block.shortcut.conv, x)
        if isinstance(block.shortcut.unit, SpikingUnit):
            shortcut = builder.fire(block.shortcut.unit, shortcut)
    for conv, unit in zip(block.convs, block.units, strict=True):
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(unit, SpikingUnit)
        current = builder.convolve(conv, x)
        x = builder.fire(unit, current, shortcut) if unit.post_add else builder.fire(unit, current)
        if unit.gate is not None:
            x = builder.join(unit.gate, x, shortcut)
    return x


@dataclass
class _Builder:
    """Nodes by the names of the modules that they are."""

    names: dict[nn.Module, str]
    nodes: dict[str, Any] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)

    def image(self, shape: tuple[int, int, int]) -> _Signal:
        """The node of the normalised image."""
        import nir

        self.nodes[INPUT] = nir.Input({"input": np.array(shape)})
        return _Signal((INPUT,), shape)

    def convolve(self, conv: nn.Conv2d, x: _Signal) -> _Signal:
        """A convolution with the batch norm that was folded into it."""
        import nir

        channels, height, width = x.shape
        assert isinstance(conv.padding, tuple)
        with torch.no_grad():
            after = conv(torch.zeros((1, channels, height, width))).shape
        assert conv.bias is not None, "its batch norm was folded"
        node = nir.Conv2d(
            (height, width),
            _array(conv.weight),
            (conv.stride[0], conv.stride[1]),
            (int(conv.padding[0]), int(conv.padding[1])),
            (conv.dilation[0], conv.dilation[1]),
            conv.groups,
            _array(conv.bias),
        )
        return self._add(self.names[conv], node, [x], (after[1], after[2], after[3]))

    def fire(self, unit: SpikingUnit, *currents: _Signal) -> _Signal:
        """The neuron of a unit on the sum of currents."""
        assert isinstance(unit.neuron, SpikingNode)
        shape = currents[0].shape
        return self._add(self.names[unit.neuron], _neuron(unit.neuron, shape), currents, shape)

    def join(self, gate: Gate | LearnedGate, h: _Signal, x: _Signal) -> _Signal:
        """The gate of a block. Raises UserError for ADD before another gate."""
        name = self.names[gate]
        if isinstance(gate, Gate) and gate.name == "add":
            return _Signal((*h.sources, *x.sources), h.shape)
        self._check_spikes(name, x)
        if isinstance(gate, LearnedGate):
            return self._join_learned(name, gate, h, x)
        if gate.name == "iand":
            h = self._scale(f"{name}.not", np.full(h.shape[0], -1, np.float32), h)
        threshold = np.full(h.shape, 1.5 if gate.name == "and" else 0.5, np.float32)
        return self._threshold(name, threshold, [h, x])

    def _join_learned(self, name: str, gate: LearnedGate, h: _Signal, x: _Signal) -> _Signal:
        at_silence, at_spike = (u.detach().numpy() >= 0 for u in gate.currents(gate.weight, gate.bias))
        residual = self._scale(f"{name}.residual", (at_spike | at_silence).astype(np.float32), h)
        shortcut = self._scale(f"{name}.shortcut", ~(at_spike & at_silence) * np.float32(1), x)
        both = at_silence & ~at_spike
        threshold = np.where(both, 1.5, 0.5).astype(np.float32)
        return self._threshold(name, _spread(threshold, h.shape), [residual, shortcut])

    def max_pool(self, pool: nn.MaxPool2d, x: _Signal) -> _Signal:
        """The largest of spikes is 1 where their sum is not 0."""
        import nir

        name = self.names[pool]
        self._check_spikes(name, x)
        with torch.no_grad():
            after = pool(torch.zeros((1, *x.shape))).shape
        sides = [np.array([side, side]) for side in (pool.kernel_size, pool.stride, pool.padding)]
        shape = (after[1], after[2], after[3])
        summed = self._add(f"{name}.sum", nir.SumPool2d(*sides), [x], shape)
        return self._threshold(name, np.full(shape, 0.5, np.float32), [summed])

    def classify(self, classifier: nn.Linear, x: _Signal) -> None:
        """Mean over H and W and the classifier, at each step."""
        import nir

        channels, height, width = x.shape
        window = np.array([height, width])
        pooled = nir.AvgPool2d(kernel_size=window, stride=window, padding=np.array([0, 0]))
        mean = self._add("mean", pooled, [x], (channels, 1, 1))
        flat = self._add("flatten", nir.Flatten({"input": np.array([channels, 1, 1])}, 0), [mean], (channels, 1, 1))
        name = self.names[classifier]
        logits = self._add(name, nir.Affine(_array(classifier.weight), _array(classifier.bias)), [flat], flat.shape)
        self._add(OUTPUT, nir.Output({"output": np.array([classifier.out_features])}), [logits], flat.shape)

    def _scale(self, name: str, factors: NDArray[np.float32], x: _Signal) -> _Signal:
        import nir

        return self._add(name, nir.Scale(_spread(factors, x.shape)), [x], x.shape)

    def _threshold(self, name: str, threshold: NDArray[np.float32], signals: Sequence[_Signal]) -> _Signal:
        import nir

        return self._add(name, nir.Threshold(threshold), signals, signals[0].shape)

    def _add(self, name: str, node: Any, inputs: Sequence[_Signal], shape: tuple[int, int, int]) -> _Signal:
        self.nodes[name] = node
        self.edges += [(source, name) for signal in inputs for source in signal.sources]
        return _Signal((name,), shape)

    @staticmethod
    def _check_spikes(name: str, x: _Signal) -> None:
        if len(x.sources) > 1:
            raise UserError(
                f"the network cannot be written as NIR: {name}: it reads the sum of {', '.join(x.sources)}, which are "
                "integers, and its thresholds take spikes; use --format onnx"
            )


def _neuron(node: SpikingNode, shape: tuple[int, int, int]) -> Any:
    import nir

    def full(value: float) -> NDArray[np.float32]:
        return np.full(shape, value, np.float32)

    threshold = np.full(shape, below(node.v_threshold), np.float32)
    dynamics = node.dynamics()
    assert isinstance(dynamics, Dynamics)  # I-LIF is refused before
    tau = dynamics.tau
    if isinstance(node, PLIF):
        tau = 1 / node.w.detach().double().sigmoid().item()
    if tau is None:
        return nir.IF(full(1), threshold, full(dynamics.rest))
    # Not fp32: PLIF's 1 / tau would be rounded twice.
    steps = np.full(shape, tau)
    resistance = full(1) if dynamics.decay_input else steps
    return nir.LIF(steps, resistance, full(dynamics.rest), threshold, full(dynamics.rest))


def _spread(by_channel: NDArray[np.float32], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    return np.ascontiguousarray(np.broadcast_to(by_channel[:, None, None], shape))


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().float().numpy())
