"""Few images on which every layer of a network sees spikes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.spike_edges import LayerInput, SpikeFed

_SAME = 1e-5
"""Outputs that differ by less, beside the largest of them, are the same but for rounding."""


@dataclass
class Chosen:
    """Images picked so far."""

    positions: list[int] = field(default_factory=list)
    """In the order of the images."""
    looked_at: int = 0
    silent: tuple[str, ...] = ()
    """Neurons and spike-fed layers without a spike on any image."""
    outputs_vary: bool = False
    """Whether outputs of two images differ by more than rounding."""


@torch.no_grad()
def choose_images(
    deployed: nn.Module, inputs: Mapping[str, LayerInput], batches: Iterable[Tensor], least: int = 2
) -> Chosen:
    """Pick images in their order: those on which a neuron fires, or a spike-fed layer gets spikes, for the first time.

    The first image whose output differs from the first one's is picked too. Batches are taken until every neuron has
    fired, every spike-fed layer has seen spikes and outputs differ.

    Args:
        deployed: a network in eval mode; not changed.
        inputs: `layer_inputs` of it.
        batches: images [B, C, H, W] or frames [T, B, C, H, W].
        least: images to pick at least, if there are as many.
    """
    chosen = Chosen()
    watched = [*spiking_nodes(deployed), *(name for name, source in inputs.items() if isinstance(source, SpikeFed))]
    waiting = set(watched)
    first: list[Tensor] = []
    for images in batches:
        count = images.shape[images.ndim - 4]
        fired, outputs = _run(deployed, inputs, images, count)
        for index in range(count):
            now = [leaf[index] for leaf in outputs]
            first = first or now
            news = {name for name in waiting if fired.get(name, _never(count))[index]}
            differs = not chosen.outputs_vary and outputs_differ(first, now)
            if news or differs:
                chosen.positions.append(chosen.looked_at + index)
            waiting -= news
            chosen.outputs_vary |= differs
        chosen.looked_at += count
        if not waiting and chosen.outputs_vary and chosen.looked_at >= least:
            break
    spare = [position for position in range(min(least, chosen.looked_at)) if position not in chosen.positions]
    chosen.positions = sorted(chosen.positions + spare[: max(0, least - len(chosen.positions))])
    chosen.silent = tuple(name for name in watched if name in waiting)
    return chosen


def _never(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool)


def outputs_differ(first: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    """Whether outputs of two images differ by more than rounding, or in their shapes."""
    if [one.shape for one in first] != [other.shape for other in now]:
        return True
    pairs = [(one.double(), other.double()) for one, other in zip(first, now, strict=True) if one.numel()]
    return any(bool(((one - other).abs() > _SAME * one.abs().max()).any()) for one, other in pairs)


def _run(
    network: nn.Module, inputs: Mapping[str, LayerInput], images: Tensor, count: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Whether each watched module saw a spike, by image [B]; and the outputs [B, ...]."""
    fired: dict[str, Tensor] = {}

    def note(name: str, spikes: Tensor, timesteps: int) -> None:
        # [T, B, ...] or [T * B, ...]
        by_image = (spikes != 0).reshape(timesteps, count, -1).any(2).any(0)
        fired[name] = fired.get(name, by_image) | by_image

    def neuron(name: str) -> Callable[..., None]:
        return lambda module, args, spikes: note(name, spikes, spikes.shape[0])

    def layer(name: str, timesteps: int) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            note(name, args[0], timesteps)

        return see

    with ExitStack() as stack:
        for name, node in spiking_nodes(network).items():
            stack.callback(node.register_forward_hook(neuron(name)).remove)
        for name, source in inputs.items():
            if isinstance(source, SpikeFed):
                module = network.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(layer(name, source.timesteps)).remove)
        leaves = tree_leaves(network(images.clone()))
    outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == count]
    return fired, [leaf for leaf in outputs if leaf.is_floating_point()]
