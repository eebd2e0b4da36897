"""The binary form of a network that was trained with integers: I-LIF's integers as spikes on T x D virtual steps.

Neurons write slots and the layers that they feed read them, as `slots.py` says. Everything else (residual additions,
max-pools, upsampling, concatenation, the mean over T, decoding) acts on real-valued membrane inputs and stays as it is.
Neurons with D = 1 (IF, LIF, PLIF) are binary already.

`equivalence.py` proves that both forms of a network are the same function.
"""

import copy
from collections.abc import Mapping

from torch import nn

from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.slots import Layer, SlotLayer, ThermometerNode
from spikefleet_models.spike_edges import LayerInput, SpikeFed, layer_inputs


def spike_driven(deployed: nn.Module, inputs: Mapping[str, LayerInput] | None = None) -> nn.Module:
    """A copy in binary form: the same inputs and outputs, with only 0 and 1 between neurons and the layers they feed.

    Args:
        deployed: a network after `reparam.deploy`; not changed.
        inputs: `layer_inputs(deployed, images)`; found with a noise image when left out.

    Raises:
        NotSpikeDrivenError: the network has no spiking neuron, or uses spikes as binary events cannot be used.
    """
    binary = copy.deepcopy(deployed).eval()
    inputs = layer_inputs(binary) if inputs is None else inputs
    for node in spiking_nodes(binary).values():
        if node.bound > 1:
            _replace(binary, node, ThermometerNode(node))
    for name, source in inputs.items():
        if isinstance(source, SpikeFed) and source.bound > 1:
            layer = binary.get_submodule(name)
            assert isinstance(layer, Layer)
            _replace(binary, layer, SlotLayer(layer, source.timesteps, source.bound))
    return binary


def _replace(network: nn.Module, module: nn.Module, replacement: nn.Module) -> None:
    """Put `replacement` wherever the network holds `module`: a shared one has several places."""
    for parent in list(network.modules()):
        # Not named_children: it names a shared module once.
        for name, child in list(parent._modules.items()):
            if child is module and parent is not replacement:
                setattr(parent, name, replacement)
