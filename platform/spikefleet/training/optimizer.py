"""The optimizer, its schedules as pure functions of the step, and the EMA of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spikefleet.config.init_config import matches
from spikefleet.config.optim_config import OptimConfig
from spikefleet_models.gates import LearnedGate

BIASES = "biases"
"""Name of the parameter group of `warmup_bias_lr`."""


def build_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over groups: weights; scales, with at most one dimension (batch norm, gates, PLIF); biases.

    Biases are those of convolutions, linear layers, batch norm and gates. `decay_norm_and_bias=false` exempts scales
    and biases from weight decay; those of BSG* have it only with `decay_gates=true`, and groups of their own where
    that differs. Parameters of a module in `lr_factors` have groups of their own, with its `factor` of the rate.
    """
    gates = {p for module in network.modules() if isinstance(module, LearnedGate) for p in module.parameters()}
    factors = (1.0, *sorted({*config.lr_factors.values()} - {1.0}))
    kinds: dict[tuple[float, str, bool], list[nn.Parameter]] = {
        (factor, name, decays): []
        for factor in factors
        for name in ("weights", "scales", BIASES)
        for decays in (True, False)
    }
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "weights" if parameter.ndim > 1 else BIASES if name.endswith("bias") else "scales"
        decays = config.decay_gates if parameter in gates else kind == "weights" or config.decay_norm_and_bias
        kinds[lr_factor(config, name), kind, decays].append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "name": kind,
            "factor": factor,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (factor, kind, decays), parameters in kinds.items()
        if parameters
    ]
    fused = config.fused or None  # torch's own default otherwise
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, config.beta2), fused=fused)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)


def set_rates(
    optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, steps_per_epoch: int, epochs: float
) -> None:
    """Sets the learning rates and the momentum of optimizer step `step` (from 0) in every parameter group."""
    for group in optimizer.param_groups:
        rate = learning_rate(config, step, steps_per_epoch, epochs, biases=group["name"] == BIASES)
        group["lr"] = rate * group["factor"] if group["factor"] != 1 else rate
        inertia = momentum(config, step, steps_per_epoch)
        if config.kind == "adamw":
            group["betas"] = (inertia, config.beta2)
        else:
            group["momentum"] = inertia


def lr_factor(config: OptimConfig, parameter: str) -> float:
    """The factor of the learning rate of a parameter: that of the longest matching name, or 1."""
    found = [prefix for prefix in config.lr_factors if matches(parameter, prefix)]
    return config.lr_factors[max(found, key=len)] if found else 1.0


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, epochs: float, biases: bool = False) -> float:
    """The learning rate of an optimizer step.

    The schedule `step` changes the rate at whole epochs; `cosine` and `linear` decay at every step, from the end of
    warm-up to the last step.

    Args:
        config: the schedule.
        step: number of the step, from 0.
        steps_per_epoch: optimizer steps per epoch.
        epochs: epochs of the schedule.
        biases: the rate of biases, which may differ in warm-up.
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


def large_step(layer: str, relative_step: float, rate: float, remedy: str) -> str:
    """The sentence for a layer that a step changes by more than its own weights; `remedy`: of `smaller_steps`."""
    return f"a step changes {layer} by {relative_step:.3g} times its weights (learning rate {rate:.3g}); {remedy}"


def smaller_steps(config: OptimConfig, clip_norm: float | None) -> str:
    """What makes the steps of a training smaller, set or changed far enough.

    Clipping does not change the length of AdamW's steps, which are about as long as the learning rate.
    """
    warmup = f"{'raise' if config.warmup_epochs else 'set'} optim.warmup_epochs"
    if config.kind == "adamw":
        return f"lower optim.lr, or {warmup}"
    if clip_norm is None:
        return f"lower optim.lr, set train.clip_norm, or {warmup}"
    return f"lower optim.lr or train.clip_norm ({clip_norm:g}), or {warmup}"


def momentum(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """The momentum of optimizer step `step` (from 0); with AdamW the first of its betas."""
    if config.warmup_momentum is None or step >= config.warmup_epochs * steps_per_epoch:
        return config.momentum
    warmth = _warmth(config, step, steps_per_epoch)
    return config.warmup_momentum + (config.momentum - config.warmup_momentum) * warmth


def _warmth(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """The fraction of warm-up that is done after this step, in (0, 1]."""
    return min(1.0, (step + 1) / (config.warmup_epochs * steps_per_epoch))


class Ema(AveragedModel):
    """The exponential moving average (EMA) of the weights and of batch-norm statistics, `module`.

    It counts its updates on the host: torch's own count is on the device, and each update would wait for it.

    Args:
        network: the network.
        update: the average of tensors of one type, from (averages, current ones, number of updates).
    """

    def __init__(self, network: nn.Module, update: Callable[[list[Tensor], list[Tensor], int], None]) -> None:
        super().__init__(network, multi_avg_fn=get_ema_multi_avg_fn(), use_buffers=True)
        self.count = 0
        """Updates so far."""
        self._update = update

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Adds the weights and statistics of a network to the average; the first ones are the average."""
        averages, current = ([*module.parameters(), *module.buffers()] for module in (self.module, model))
        by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for average, tensor in zip(averages, current, strict=True):
            if self.count:
                both = by_type.setdefault(average.dtype, ([], []))
                both[0].append(average.detach())
                both[1].append(tensor.detach())
            else:
                average.detach().copy_(tensor.detach())
        for averages_of_type, current_of_type in by_type.values():
            self._update(averages_of_type, current_of_type, self.count)
        self.count += 1


def build_ema(network: nn.Module, decay: float, ramp: float | None = None) -> Ema:
    """The EMA of a network.

    Args:
        network: the network.
        decay: decay of the average.
        ramp: the decay of step n is `decay * (1 - exp(-n / ramp))`, so that the first steps are forgotten soon; None
            keeps it constant.
    """

    def update(averages: list[Tensor], current: list[Tensor], count: int) -> None:
        now = decay if ramp is None else decay * (1 - math.exp(-(count + 1) / ramp))
        get_ema_multi_avg_fn(now)(averages, current, count)

    return Ema(network, update)
