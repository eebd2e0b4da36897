"""Optimizer groups, their schedules as pure functions of the position, and the average of weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spikefleet.config.schema import OptimConfig

BIASES = "biases"
"""Name of the parameter group that `warmup_bias_lr` is for."""


def build_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD over three groups: weights; parameters of one dimension or none (batch norm, gates, PLIF); biases.

    The last two can be kept from weight decay. Biases are those of convolutions and linear layers, and of batch norm.
    """
    named: dict[str, list[nn.Parameter]] = {"weights": [], "scales": [], BIASES: []}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        group = "weights" if parameter.ndim > 1 else BIASES if name.endswith("bias") else "scales"
        named[group].append(parameter)
    decay = {"weights": config.weight_decay}
    spared = config.weight_decay if config.decay_norm_and_bias else 0.0
    groups: list[dict[str, Any]] = [
        {"params": parameters, "name": name, "weight_decay": decay.get(name, spared)}
        for name, parameters in named.items()
        if parameters
    ]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, epochs: int, biases: bool = False) -> float:
    """The rate for optimizer step `step` (from 0).

    `step` changes at whole epochs; `cosine` and `linear` fall at every step, from the end of warm-up to the last step.
    """
    position = step / steps_per_epoch
    if position < config.warmup_epochs:
        start = config.warmup_bias_lr if biases and config.warmup_bias_lr is not None else 0.0
        return start + (config.lr - start) * _warmth(config, step, steps_per_epoch)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(position >= milestone for milestone in config.milestones)
    done = (position - config.warmup_epochs) / (epochs - config.warmup_epochs)
    falling = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.lr * (config.final_factor + (1 - config.final_factor) * falling)


def momentum(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """The momentum for optimizer step `step` (from 0)."""
    if config.warmup_momentum is None or step >= config.warmup_epochs * steps_per_epoch:
        return config.momentum
    warmth = _warmth(config, step, steps_per_epoch)
    return config.warmup_momentum + (config.momentum - config.warmup_momentum) * warmth


def _warmth(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """The part of warm-up that is done with this step, in (0, 1]."""
    return min(1.0, (step + 1) / (config.warmup_epochs * steps_per_epoch))


def build_average(network: nn.Module, decay: float, ramp: float | None = None) -> AveragedModel:
    """Exponential moving average of the weights; batch-norm statistics are averaged alike.

    With `ramp` the decay of step n is `decay * (1 - exp(-n / ramp))`, so that the first steps are soon forgotten.
    """
    average = get_ema_multi_avg_fn(decay) if ramp is None else _ramped(decay, ramp)
    return AveragedModel(network, multi_avg_fn=average, use_buffers=True)


def _ramped(decay: float, ramp: float) -> Callable[..., None]:
    @torch.no_grad()
    def update(averages: list[Tensor], current: list[Tensor], averaged: Tensor | int) -> None:
        get_ema_multi_avg_fn(decay * (1 - math.exp(-(int(averaged) + 1) / ramp)))(averages, current, averaged)

    return update
