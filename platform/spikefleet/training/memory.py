"""The least memory that a training takes, estimated before anything is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet_tune.messages import counted

_BYTES = 4  # of fp32
_MOST_BYTES = 1 << 44
"""No worker has so much memory: 16 TiB."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The least memory of one worker, in bytes: there are other activations than the first, and their gradients."""

    parameters: int
    """Number of parameters."""
    state_bytes: int
    """Weights, gradients, the state of the optimizer and, if there is one, the moving average."""
    input_bytes: int
    """The images of a micro-batch, repeated over the time steps."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.state_bytes + self.input_bytes


def estimate_memory(config: Config, side: int) -> MemoryEstimate:
    """Estimates the least memory of one worker; the network is built without memory for its weights.

    Args:
        config: of the run.
        side: of the images, in pixels.

    Raises:
        UserError: the network is too large to be described.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            network = config.model.build()
    except (RuntimeError, OverflowError, MemoryError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model: a network of this size cannot be built: {reason}; set a smaller one") from None
    parameters = sum(parameter.numel() for parameter in network.parameters())
    copies = 3 + (config.optim.kind == "adamw") + (config.train.ema_decay is not None)
    samples = config.train.global_batch // (config.cluster.most_workers * config.train.accumulate)
    inputs = config.model.simulated_timesteps * samples * config.model.in_channels * side**2
    return MemoryEstimate(parameters, parameters * copies * _BYTES, inputs * _BYTES)


def check_memory(config: Config, image_shape: tuple[int, int, int] | None, local: bool) -> None:
    """Checks that a training can fit into memory at all.

    Args:
        config: of the run.
        image_shape: `[C, H, W]` of the stored images or of the frames of events; None where it varies.
        local: whether the workers run on this machine.

    Raises:
        UserError: it cannot; the message has the estimate and the memory that there is.
    """
    estimate = estimate_memory(config, _side(config, image_shape))
    workers = config.cluster.most_workers
    on_this_machine = local and not config.cluster.gpu
    there = _machine_bytes() if on_this_machine else _MOST_BYTES
    needed = estimate.total_bytes * (workers if on_this_machine else 1)
    if needed > there:
        where = "this machine has" if on_this_machine else "no worker has more than"
        raise UserError(
            f"a training of {config.recipe} takes at least {_shown(needed)} of memory ({estimate.parameters:,} "
            f"parameters: {_shown(estimate.state_bytes)} with gradients and optimizer state; images of a step over "
            f"{config.model.simulated_timesteps:,} time steps: {_shown(estimate.input_bytes)}; "
            f"{counted(workers, 'worker')}), and {where} {_shown(there)}; "
            "set a smaller model.width, model.timesteps or train.global_batch"
        )


def _side(config: Config, image_shape: tuple[int, int, int] | None) -> int:
    """The side of the network's images, or less where only the data say it."""
    if image_shape is not None:
        return min(image_shape[1:])
    transform = config.data.transform.model_dump()
    return transform.get("random_resized_crop") or transform.get("size") or 1


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _shown(size: int) -> str:
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 1000 or unit == "PB":
            break
        value /= 1000
    return f"{value:,.3g} {unit}"
