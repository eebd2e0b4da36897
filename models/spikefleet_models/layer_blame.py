"""Which layers a current or an output that differs is made of, and no equal one is."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.slots import Layer


@torch.enable_grad()
def suspects(
    trained: nn.Module, deployed: nn.Module, sample: Tensor, spikes: Sequence[Tensor], wrong: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Layers to look at, by the name of a segment that differs.

    Args:
        trained: in eval mode, like the deployed network.
        deployed: of whose segments some differ.
        sample: one image, or the frames of one.
        spikes: what goes on from the neurons, in the order of their calls.
        wrong: names of the segments that differ.

    Returns:
        Names of layers of the deployed network; and of the trained network's layers that nothing took the place of.
    """
    theirs, ours = _made_of(trained, sample, spikes), _made_of(deployed, sample, spikes)
    names = [name for name, _ in ours]
    cleared = {layer for name, layers in ours if name not in wrong for layer in layers}
    cleared_there = {
        layer for name, (_, layers) in zip(names, theirs, strict=True) if name not in wrong for layer in layers
    }
    found: dict[str, tuple[str, ...]] = {}
    for (name, layers), (_, there) in zip(ours, theirs, strict=True):
        if name in wrong and name not in found:
            lost = [layer for layer in there if layer not in cleared_there and not _replaced(layer, layers)]
            changed = [layer for layer in layers if layer not in cleared]
            found[name] = (*changed, *lost) or layers
    return found


def output_name(index: int) -> str:
    """Name of the segment of an output."""
    return f"output {index}"


def _replaced(layer: str, layers: Sequence[str]) -> bool:
    """Whether a layer, or a chain that it is in, is among the layers of the deployed network."""
    return any(layer == other or layer.startswith(f"{other}.") for other in layers)


def _made_of(network: nn.Module, sample: Tensor, spikes: Sequence[Tensor]) -> list[tuple[str, tuple[str, ...]]]:
    """(neuron, layers that its current depends on without a neuron in between) of each call, then outputs likewise."""
    marks: dict[str, Tensor] = {}
    currents: list[tuple[str, Tensor]] = []
    given = iter(spikes)

    def mark(name: str) -> Any:
        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            zero = marks.setdefault(name, torch.zeros((), dtype=output.dtype, device=output.device).requires_grad_())
            return output + zero

        return add

    def keep(name: str) -> Any:
        return lambda module, args: currents.append((name, args[0].sum()))

    with ExitStack() as stack:
        for name, module in network.named_modules():
            if isinstance(module, Layer):
                stack.callback(module.register_forward_hook(mark(name)).remove)
        for name, node in spiking_nodes(network).items():
            stack.callback(node.register_forward_pre_hook(keep(name)).remove)
            stack.callback(node.register_forward_hook(lambda module, args, output: next(given)).remove)
        outputs = network(sample.clone())
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    currents += [(output_name(index), leaf.sum()) for index, leaf in enumerate(leaves)]
    return [(name, _marked(current, marks)) for name, current in currents]


def _marked(value: Tensor, marks: dict[str, Tensor]) -> tuple[str, ...]:
    if not value.requires_grad or not marks:
        return ()
    gradients = torch.autograd.grad(value, list(marks.values()), retain_graph=True, allow_unused=True)
    return tuple(name for name, gradient in zip(marks, gradients, strict=True) if gradient is not None)
