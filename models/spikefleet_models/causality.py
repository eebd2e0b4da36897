"""Whether a network can run step by step: no current may depend on spikes or frames of later steps.

Binary spikes that are turned round, rolled or mixed over T are still 0 and 1, and their sums are still equal in both
forms; but no hardware knows the spikes of the next step. So all spikes and frames from a step on are silenced, and
currents before that step must stay as they were, to the last bit. Spikes and frames are drawn: on an image that leaves
a neuron silent, nothing would change.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from spikefleet_models.neurons import SpikingNode, spiking_nodes
from spikefleet_models.slots import drawn_integers

_RATE = 0.5
"""Of the drawn spikes."""


@torch.no_grad()
def acausal_neuron(network: nn.Module, sample: Tensor) -> str | None:
    """The first neuron whose current depends on a later step, and the step, in words; None where there is none.

    Args:
        network: in eval mode; not changed. It runs as many times as it has steps, and once if T = 1.
        sample: an image [1, C, H, W], or frames [T, 1, C, H, W], whose values are drawn too.
    """
    if sample.ndim == 5:
        sample = torch.rand(sample.shape, generator=torch.Generator().manual_seed(0)).to(sample)
    whole, steps = _currents(network, sample, None)
    for first in range(1, steps):
        silenced, _ = _currents(network, sample, first)
        for name, calls in whole.items():
            for before, after in zip(calls, silenced.get(name, []), strict=True):
                if not torch.equal(before[:first], after[:first]):
                    return f"neuron {name} depends in its first {first} of {steps} steps on spikes of later ones"
    return None


def _currents(network: nn.Module, sample: Tensor, silent_from: int | None) -> tuple[dict[str, list[Tensor]], int]:
    """Currents [T, ...] of each call of each neuron, without spikes and frames from a step on; and the largest T.

    The calls of a neuron that keeps its state are the steps of one: they are put together.
    """
    currents: dict[str, list[Tensor]] = {}
    steps = 1
    generator = torch.Generator().manual_seed(0)

    def hook(name: str) -> Callable[..., Tensor]:
        def record(module: SpikingNode, inputs: tuple[Tensor, ...], emitted: Tensor) -> Tensor:
            nonlocal steps
            by_step = module.step_mode == "s"
            current = inputs[0].clone().unsqueeze(0) if by_step else inputs[0].clone()
            calls = currents.setdefault(name, [])
            earlier = len(calls[0]) if calls and (by_step or module.keep_state) else 0
            if earlier:
                calls[0] = torch.cat((calls[0], current))
            else:
                calls.append(current)
            steps = max(steps, earlier + len(current))
            drawn = drawn_integers(emitted.shape, module.bound, _RATE, generator).to(emitted)
            if silent_from is None:
                return drawn
            later = max(0, silent_from - earlier)
            return _silenced(drawn[None], later)[0] if by_step else _silenced(drawn, later)

        return record

    with ExitStack() as stack:
        for name, node in spiking_nodes(network).items():
            node.reset()
            stack.callback(node.register_forward_hook(hook(name)).remove)
        network(_silenced(sample, silent_from) if sample.ndim == 5 else sample.clone())
    return currents, steps


def _silenced(sequence: Tensor, silent_from: int | None) -> Tensor:
    sequence = sequence.clone()
    if silent_from is not None:
        sequence[silent_from:] = 0
    return sequence
