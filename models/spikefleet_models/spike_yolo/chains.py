"""SpikeYOLO's layers in a row: the batch norm of one and the neuron of the next in one native call on the CPU."""

from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor, nn

from spikefleet_models.spiking_unit import norm_and_fire

if TYPE_CHECKING:
    from spikefleet_models.spike_yolo.blocks import SpikeConv


def run_chain(x: Tensor, *layers: "SpikeConv") -> Tensor:
    """Run layers one after the other, each SN -> convolution -> batch norm.

    Where nothing else reads or observes the currents between two layers, they are never stored: the native form
    computes the batch norm and the neuron behind it in one call, with the same numbers.

    Args:
        x: currents [T * B, C, H, W].
        layers: in order.

    Returns:
        Currents [T * B, C', H', W'] behind the last batch norm.
    """
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
        for layer in layers:
            x = layer(x)
        return x
    z: Tensor = layers[0].conv(layers[0].sn(x))
    for before, layer in pairwise(layers):
        z = layer.conv(_fire(before.bn, layer.sn, z))
    y: Tensor = layers[-1].bn(z)
    return y


def _fire(bn: nn.Module, sn: nn.Module, z: Tensor) -> Tensor:
    """SN(BN(z)); an ANN twin has a ReLU in the place of the SN."""
    node, steps = getattr(sn, "neuron", None), getattr(sn, "steps", None)
    emitted = None if node is None or steps is None else norm_and_fire(bn, node, z, steps.count, (sn,))
    y: Tensor = sn(bn(z)) if emitted is None else emitted
    return y
