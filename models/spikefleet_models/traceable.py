"""A network whose forward is plain torch operations, which `torch.export` can follow with a batch of any size.

The forms that train and serve write into buffers, look at addresses and cut batches into tiles. None of that can be
traced, and a tile's size would fix the batch. The plain operations give the same numbers, to the bit.
"""

import copy

from torch import Tensor, nn
from torch.nn import functional as F

from spikefleet_models.neurons import SpikingNode
from spikefleet_models.spike_yolo.blocks import BatchNormAndPad
from spikefleet_models.spiking_unit import SpikingUnit, use_implementation


class PlainNode(nn.Module):
    """A neuron by its step equations: currents [T, ...] -> spikes or integers [T, ...]."""

    def __init__(self, node: SpikingNode) -> None:
        super().__init__()
        self.node = node

    def forward(self, x_seq: Tensor) -> Tensor:
        """Run all steps from the reset state."""
        return self.node.reference_forward(x_seq)


class PlainBatchNormAndPad(nn.Module):
    """`BatchNormAndPad` without a buffer: [N, C, H, W] -> [N, C, H + 2, W + 2]."""

    border: Tensor

    def __init__(self, padded: BatchNormAndPad) -> None:
        super().__init__()
        self.bn = padded.bn
        self.register_buffer("border", padded.pad_value()[:, None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and pad with the value that the batch norm maps zero to."""
        y = self.bn(x)
        inside = F.pad(y.new_ones(y.shape[-2:]), (1, 1, 1, 1))
        return F.pad(y, (1, 1, 1, 1)) + (1 - inside) * self.border


def traceable(network: nn.Module) -> nn.Module:
    """Copy a network, in evaluation mode and without gradients, with plain operations in the place of custom ones.

    Args:
        network: any network of the families; not changed.
    """
    plain = copy.deepcopy(network).eval().requires_grad_(False)
    use_implementation(plain, "reference")
    _replace(plain, {})
    return plain


def _replace(module: nn.Module, done: dict[nn.Module, nn.Module]) -> None:
    for name, child in list(module._modules.items()):
        if child is None or isinstance(child, PlainNode | PlainBatchNormAndPad):
            continue  # a module that the network holds in two places was here before
        if isinstance(child, SpikingNode):
            # A unit in its reference form asks its node for the step equations itself.
            if not isinstance(module, SpikingUnit):
                setattr(module, name, done.setdefault(child, PlainNode(child)))
        elif isinstance(child, BatchNormAndPad):
            setattr(module, name, done.setdefault(child, PlainBatchNormAndPad(child)))
        else:
            _replace(child, done)
