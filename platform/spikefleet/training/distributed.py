"""The group of processes that train one network together; a group of one needs no process group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from spikefleet.errors import UserError


def pick_device(gpu: bool) -> torch.device:
    """The GPU if one is asked for, else the CPU. Raises UserError when there is none."""
    if gpu and not torch.cuda.is_available():
        raise UserError("--gpu was given, but torch finds no CUDA device on this machine; leave it out to use the CPU")
    return torch.device("cuda" if gpu else "cpu")


@dataclass(frozen=True)
class ProcessGroup:
    """Rank, size and device of this process, with the collectives that training needs."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def single(cls, gpu: bool = False) -> ProcessGroup:
        return cls(0, 1, pick_device(gpu))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
        """What rank 0 holds, on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all ranks, in order of rank, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        boxes: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, boxes, dst=0)
        return boxes

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order of rank, everywhere."""
        if self.size == 1:
            return [value]
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value)
        return boxes

    def broadcast_buffers(self, network: nn.Module) -> None:
        """Gives every rank the buffers of rank 0 (batch-norm statistics), as DDP does before a training step."""
        if self.size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)
