"""Binary slots: how the binary form of a network writes I-LIF's integers, and how its layers read them.

Luo et al., ECCV 2024, eqs 12 to 15: W n[t] = W sum_d s[t,d] = sum_d W s[t,d] with s[t,d] in {0, 1}.

* A neuron writes n in [0, D] as a thermometer code: slot d (from 0) fires where n > d. The leading axis grows from T
  to T * D, with d fastest inside t. The D slots carry no dynamics: the neuron charges, fires and resets once per t.
* A layer that is fed with slots applies its weights to each, sums over the D slots of a step, and adds its bias once
  per step. The paper's code leaves the bias open; adding it in every slot would count it D times.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikefleet_models.membrane import membrane_dtype
from spikefleet_models.neurons import SpikingNode

Layer = nn.Conv2d | nn.Linear
"""What spikes may feed."""


class NotSpikeDrivenError(ValueError):
    """A network has no spike-driven form, or uses spikes as binary events cannot be used: a finding about the network.

    Whatever else is raised while a form is built, run or compared says nothing about the network.
    """


def thermometer(counts: Tensor, bound: int) -> Tensor:
    """Integers [T, ...] in [0, D] -> spikes [T * D, ...] of the same type: slot d of step t, at t * D + d, is n > d."""
    levels = torch.arange(bound, device=counts.device).view(bound, *[1] * (counts.ndim - 1))
    return (counts.unsqueeze(1) > levels).to(counts.dtype).flatten(0, 1)


def drawn_integers(shape: torch.Size, bound: int, rate: float, generator: torch.Generator) -> Tensor:
    """Drawn integers in [0, D], as fp64: each of the D slots fires with probability `rate`."""
    trials = torch.full(shape, float(bound), dtype=torch.float64)
    return torch.binomial(trials, torch.full_like(trials, rate), generator=generator)


class ThermometerNode(nn.Module):
    """A neuron that emits its integers in D binary slots: [T, ...] currents -> [T * D, ...] spikes."""

    def __init__(self, node: SpikingNode) -> None:
        super().__init__()
        self.node = node
        self.bound = node.bound

    def reset(self) -> None:
        """Reset the state of `node`."""
        self.node.reset()

    def forward(self, x_seq: Tensor) -> Tensor:
        """Slots of the integers of `node`, d fastest inside t."""
        return thermometer(self.node(x_seq), self.node.bound)


class SlotLayer(nn.Module):
    """A convolution or linear layer on binary slots; weight and bias keep their names in the state dict.

    Sums are held in at least fp32, as an accumulator would, and rounded once to the type of the input.
    """

    def __init__(self, layer: Layer, timesteps: int, slots: int) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.timesteps = timesteps
        self.slots = slots
        self.reuses_equal_slots = False
        """Weigh a slot that equals the one before, as silent ones do, only once: the same sum, to the last bit, and
        sooner for a large D. It reads values, so `spike_flow.py` cannot follow it."""
        self._weigh: Callable[[Tensor, Tensor], Tensor] = F.linear
        self._bias_shape: tuple[int, ...] = (-1,)
        if isinstance(layer, nn.Conv2d):
            if layer.padding_mode != "zeros":
                raise NotSpikeDrivenError(
                    f"padding_mode={layer.padding_mode!r} has no spike-driven form with D={slots}; use 'zeros'"
                )
            self._bias_shape = (-1, 1, 1)
            self._weigh = partial(
                F.conv2d,
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                groups=layer.groups,
            )

    def forward(self, spikes: Tensor) -> Tensor:
        """[T * D * B, ...] or [T * D, B, ...] -> [T * B, ...] or [T, B, ...]: sum over slots, and the bias once.

        Raises:
            NotSpikeDrivenError: the leading axis does not hold T * D slots.
        """
        T, D = self.timesteps, self.slots
        if spikes.shape[0] % (T * D):
            shape = tuple(spikes.shape)
            raise NotSpikeDrivenError(f"a spike-driven layer got {shape}, which does not hold T={T} times D={D}")
        dtype = membrane_dtype(spikes.dtype)
        weight = self.weight.to(dtype)
        by_slot = spikes.unflatten(0, (T, D, -1))
        # Autocast would round each slot's sum to 16 bits. One slot at a time: the outputs of D slots are never in
        # memory together.
        with torch.autocast(spikes.device.type, enabled=False):
            part = self._weigh(by_slot[:, 0].flatten(0, 1).to(dtype), weight)
            total = part.clone() if self.reuses_equal_slots else part
            for slot in range(1, D):
                if not self.reuses_equal_slots or not torch.equal(by_slot[:, slot], by_slot[:, slot - 1]):
                    part = self._weigh(by_slot[:, slot].flatten(0, 1).to(dtype), weight)
                total += part
        if self.bias is not None:
            total += self.bias.to(dtype).view(self._bias_shape)
        return total.to(spikes.dtype)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, timesteps={self.timesteps}, slots={self.slots}"


def reuse_equal_slots(binary: nn.Module) -> None:
    """Set `SlotLayer.reuses_equal_slots` of a network in binary form."""
    for module in binary.modules():
        if isinstance(module, SlotLayer):
            module.reuses_equal_slots = True
