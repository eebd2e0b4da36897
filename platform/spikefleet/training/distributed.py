"""The processes that train one network together; a group of one process needs no torch process group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from spikefleet.errors import UserError


def pick_device(gpu: bool) -> torch.device:
    """The GPU if `gpu`, else the CPU. Raises UserError if there is no GPU."""
    if gpu and not torch.cuda.is_available():
        raise UserError("--gpu needs a CUDA device, but torch finds none on this machine; leave it out to use the CPU")
    return torch.device("cuda" if gpu else "cpu")


@dataclass(frozen=True)
class ProcessGroup:
    """Rank, world size and device of this process, with the collectives that training needs."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def single(cls, gpu: bool = False) -> ProcessGroup:
        """A group of this process alone. Raises UserError if there is no GPU."""
        return cls(0, 1, pick_device(gpu))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks, in place, and returns it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all ranks, in order, on rank 0; None on other ranks."""
        if self.size == 1:
            return [value]
        boxes: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, boxes, dst=0)
        return boxes

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order, on all ranks."""
        if self.size == 1:
            return [value]
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value)
        return boxes
