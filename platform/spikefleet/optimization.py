"""Optimizer groups, the learning-rate schedule as a pure function of the position, and the average of weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spikefleet.config import OptimConfig


def build_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD; parameters of one dimension or none (batch norm, gates, biases, PLIF) can be kept from weight decay."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in network.parameters():
        keep = config.decay_norm_and_bias or parameter.ndim > 1
        (decayed if keep else spared).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate for optimizer step `step` (from 0).

    `step` changes at whole epochs; `cosine` and `linear` fall at every step, from the end of warm-up to the last step.
    """
    position = step / steps_per_epoch
    if position < config.warmup_epochs:
        return config.lr * min(1.0, (step + 1) / (config.warmup_epochs * steps_per_epoch))
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(position >= milestone for milestone in config.milestones)
    done = (position - config.warmup_epochs) / (epochs - config.warmup_epochs)
    falling = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.lr * (config.final_factor + (1 - config.final_factor) * falling)


def build_average(network: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights; batch-norm statistics are averaged alike."""
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
