"""What a step leaves on the device for the host: loss means, norms, whether to stop. Read late, so that nothing waits.

A host that asks a GPU for a number waits until the GPU has done everything before it, and the GPU then waits for the
host to queue the next step. So the numbers of a step are copied to page-locked memory behind its kernels, and are read
before the next step changes a weight. By then they are there.

A loss or gradient that is not finite is found one step late therefore. The step itself changes no weight: fused
optimizers read `found_inf` on the device and do nothing. Its error is raised before the weights change again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from spikefleet.errors import RunError
from spikefleet.training.distributed import ProcessGroup

_SMALLEST_LOSS_SCALE = 1.0


class NonFiniteError(RunError):
    """A loss or a gradient is not finite; every rank raises it for the same step, whose update was not applied."""


class DeviceNumbers:
    """Numbers on their way to the host.

    Args:
        numbers: fp64 [N], on the device.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._here, self._there = numbers, None
        if numbers.is_cuda:
            self._here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._here.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> list[float]:
        """The numbers; waits for those of a GPU."""
        if self._there is not None:
            self._there.synchronize()
        return self._here.tolist()


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of a step on the host."""

    means: Mapping[str, float]
    """Over all ranks, by name."""
    stop: bool
    """Whether rank 0 was asked to stop."""
    local: float
    """This rank's sum of the loss."""
    norm: float
    """Of the whole gradient, before clipping."""
    first_norm: float
    """Of the gradient of the first layer's weight."""
    scale: float
    """The loss scale of fp16; 1 for other types."""
    gradients: Mapping[str, float]
    """Norm of each gradient, where they are known only from here."""

    def refuse_non_finite(self, where: str, group: ProcessGroup, bad: Sequence[str] | None, scaled: bool) -> None:
        """Raises NonFiniteError on all ranks: the mean loss and the averaged gradient are the same on all of them.

        Args:
            where: the step, for the message.
            group: this process's rank and group.
            bad: parameters whose gradients are not finite; None: by their norms.
            scaled: whether a scaler skips steps that overflow.
        """
        remedy = "the step was not applied; lower optim.lr, set or lower train.clip_norm, or check the data of the step"
        loss = self.means["loss"]
        if not math.isfinite(loss):
            losses = group.all_gather(self.local)
            ranks = [str(rank) for rank, value in enumerate(losses) if not math.isfinite(value)]
            raise NonFiniteError(f"the loss is {loss} at {where}, on rank {', '.join(ranks)}; {remedy}")
        if math.isfinite(self.norm):
            return
        if not scaled:
            names = [name for name, norm in self.gradients.items() if not math.isfinite(norm)] if bad is None else bad
            named = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names) or "their norm"
            raise NonFiniteError(f"the gradient is not finite at {where}: {named}; {remedy}")
        if self.scale <= _SMALLEST_LOSS_SCALE:
            raise NonFiniteError(f"the fp16 gradient overflows at {where} even at loss scale {self.scale}; {remedy}")


class StepReading:
    """The numbers of a step, not yet read.

    Args:
        means: fp64 [M], over all ranks, by name.
        names: of the means.
        asked: how many ranks were asked to stop, a scalar like the following.
        local: this rank's sum of the loss.
        norm: of the whole gradient.
        first_norm: of the gradient of the first layer's weight.
        scale: the loss scale.
        gradients: norms of the gradients, by the names of their parameters; may be empty.
    """

    def __init__(
        self,
        means: torch.Tensor,
        names: Sequence[str],
        *,
        asked: torch.Tensor,
        local: torch.Tensor,
        norm: torch.Tensor,
        first_norm: torch.Tensor,
        scale: torch.Tensor,
        gradients: Mapping[str, torch.Tensor],
    ) -> None:
        self._names, self._parameters = tuple(names), tuple(gradients)
        scalars = (asked, local, norm, first_norm, scale, *gradients.values())
        self._numbers = DeviceNumbers(torch.cat((means, torch.stack([scalar.double() for scalar in scalars]))))

    def read(self) -> StepNumbers:
        """The numbers, on the host; waits for a GPU that has not computed them yet."""
        found = self._numbers.read()
        count = len(self._names)
        means = dict(zip(self._names, found[:count], strict=True))
        asked, local, norm, first_norm, scale, *gradients = found[count:]
        by_name = dict(zip(self._parameters, gradients, strict=True))
        return StepNumbers(means, asked > 0, local, norm, first_norm, scale, by_name)
