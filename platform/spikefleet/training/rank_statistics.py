"""Running statistics of data-parallel training: after each step, all ranks have the mean of what each has measured.

Batch norm normalises with the statistics of a rank's own images, and its running mean and variance are moving averages
of those. DDP would copy rank 0's to all ranks before each step, so that the other ranks' images never count: with 2
images on a rank, those are too few to evaluate with. Moving averages are linear, so their mean over ranks is the moving
average of the ranks' mean statistics.

One all-reduce of a step takes the place of DDP's broadcast. All ranks hold the same statistics whenever a network is
evaluated or saved, so a checkpoint needs no more than one set of them, and neither an evaluation nor a checkpoint
changes a bit of a training. The border of SpikeYOLO's `BatchNormAndPad`, which uses them in training too, is the same
on all ranks.
"""

from __future__ import annotations

import torch
from torch import nn

from spikefleet.training.distributed import ProcessGroup


@torch.no_grad()
def average_statistics(network: nn.Module, group: ProcessGroup) -> None:
    """Sets the floating-point buffers of a network to their mean over ranks, by one all-reduce. Collective.

    Counters such as `num_batches_tracked` are left as they are. Sums are in fp64, in which equal fp32 buffers of any
    number of ranks give the same fp32 buffer again.

    Args:
        network: the same on all ranks; modified in place.
        group: this process's rank and group.
    """
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    if group.size == 1 or not buffers:
        return
    total = group.all_reduce(torch.cat([buffer.double().flatten() for buffer in buffers])) / group.size
    for buffer, mean in zip(buffers, total.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.reshape(buffer.shape))
