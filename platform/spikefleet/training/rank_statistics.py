"""Running statistics of data-parallel training: each rank keeps its own; evaluation and checkpoints use their mean.

Batch norm normalises with the statistics of a rank's own images, and its running mean and variance are moving averages
of those. DDP would copy rank 0's to all ranks before each step, so that the other ranks' images never count: with 2
images on a rank, those are too few to evaluate with. Moving averages are linear, so their mean over ranks is the moving
average of the ranks' mean statistics.

A checkpoint holds the mean, which is the network, and each rank's own statistics, with which that rank resumes. Neither
an evaluation nor a checkpoint changes a rank's own, so how often either happens changes no bit of a training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from spikefleet.training.distributed import ProcessGroup

Buffers = dict[str, dict[str, torch.Tensor]]
"""Buffers by the name of their network and their own."""


def own_statistics(networks: Mapping[str, nn.Module]) -> Buffers:
    """The floating-point buffers of networks, not copied; counters such as `num_batches_tracked` are left out.

    Args:
        networks: by name, such as "model" and "average".
    """
    return {
        name: {key: buffer for key, buffer in network.named_buffers() if buffer.is_floating_point()}
        for name, network in networks.items()
    }


def mean_statistics(networks: Mapping[str, nn.Module], group: ProcessGroup) -> Buffers:
    """The mean over ranks of the floating-point buffers of networks, by one all-reduce. Collective.

    Sums are in fp64, in which equal fp32 buffers of any number of ranks give the same fp32 buffer again.

    Args:
        networks: by name; the same on all ranks.
        group: this process's rank and group.

    Returns:
        New tensors, of the types of the buffers; the same on all ranks.
    """
    own = own_statistics(networks)
    buffers = [buffer for named in own.values() for buffer in named.values()]
    if not buffers:
        return own
    total = group.all_reduce(torch.cat([buffer.detach().double().flatten() for buffer in buffers])) / group.size
    parts = iter(total.split([buffer.numel() for buffer in buffers]))
    return {
        name: {key: next(parts).reshape(buffer.shape).to(buffer.dtype) for key, buffer in named.items()}
        for name, named in own.items()
    }


@contextmanager
def averaged_statistics(network: nn.Module, group: ProcessGroup) -> Iterator[None]:
    """A context in which the statistics of a network are the mean over ranks; then this rank's own again. Collective.

    Args:
        network: to evaluate.
        group: this process's rank and group.
    """
    if group.size == 1:
        yield
        return
    networks = {"": network}
    kept = {key: buffer.clone() for key, buffer in own_statistics(networks)[""].items()}
    set_statistics(networks, mean_statistics(networks, group))
    try:
        yield
    finally:
        set_statistics(networks, {"": kept})


@torch.no_grad()
def set_statistics(networks: Mapping[str, nn.Module], statistics: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Copies statistics, as `own_statistics` names them, into networks."""
    for name, named in own_statistics(networks).items():
        for key, buffer in named.items():
            buffer.copy_(statistics[name][key])


def by_rank(gathered: list[Buffers]) -> dict[str, torch.Tensor]:
    """The statistics of all ranks as one group of tensors, `RANK/NETWORK/BUFFER`; see `of_rank`."""
    return {
        f"{rank}/{name}/{key}": buffer
        for rank, own in enumerate(gathered)
        for name, named in own.items()
        for key, buffer in named.items()
    }


def of_rank(tensors: Mapping[str, torch.Tensor], rank: int) -> Buffers:
    """The statistics of one rank from the tensors of `by_rank`."""
    found: Buffers = {}
    for path, tensor in tensors.items():
        number, name, key = path.split("/", 2)
        if int(number) == rank:
            found.setdefault(name, {})[key] = tensor
    return found
