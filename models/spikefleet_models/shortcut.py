"""Shortcut back-propagation: side branches that take the gradient past the residual blocks, in training only.

Guo et al., "Take a shortcut back: mitigating the gradient vanishing for training spiking neural networks", NeurIPS
2024, arXiv 2401.04486, eqs 6 to 10 and algorithm 1. Branch l pools the output of a stage (or block) globally and
classifies it; its gradient reaches the stage without passing the surrogate gradients of later ones:

    o_l = FC_l(mean_{T,H,W} S_l)                      l < n; o_n are the network's own logits
    add       o = o_n + lambda * sum_l o_l            lambda = 1, constant: eq 6
    convex    o = (1 - (n - 1) lambda) * o_n + lambda * sum_l o_l
    loss      CE(o, y); or, with loss=sum_losses, the same combination of CE(o_l, y)

The balance coefficient lambda falls while training goes on ("evolutionary training"). The paper's text fixes that the
coefficient is made of the iteration i, their number I and one constant, 0.25, and that branches weigh nothing at i = I;
its formula (eq 10), how lambda enters, and where branches attach are not public. Each is a field here; the defaults are
the likeliest readings. Under `convex` with four stages, 0.25 starts as the mean over all outputs.

The plain network stays as it is under `ShortcutNetwork.network`: what is evaluated, exported and registered is that.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from spikefleet_models.sg_resnet import SGResNet, SGResNetConfig


class ShortcutConfig(BaseModel):
    """Side branches and their balance coefficient. `where` switches them on; the rest are the recommended readings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    where: Literal["none", "stage", "block"] = Field(
        "none",
        description="A side branch after each stage or block but the last; none trains without, whatever follows.",
    )
    combine: Literal["add", "convex"] = Field(
        "add", description="The network's own output weighs 1, or what the branches leave of 1."
    )
    loss: Literal["summed_logits", "sum_losses"] = Field(
        "summed_logits", description="Loss of the combined logits, or combination of the losses of each."
    )
    schedule: Literal["constant", "linear", "exp10", "cosine", "poly", "step"] = Field(
        "linear", description="How lambda falls from lambda0; all but constant and step end at 0."
    )
    lambda0: float = Field(0.25, ge=0.0, description="Weight of each branch at the start of training.")
    power: float = Field(0.25, gt=0.0, description="poly: exponent of the part of training that is left.")
    milestones: tuple[float, ...] = Field(
        (), description="step: parts of training, in (0, 1), after which lambda drops."
    )
    gamma: float = Field(0.1, ge=0.0, lt=1.0, description="step: factor on lambda at each milestone.")

    @model_validator(mode="after")
    def _fields_belong_to_the_schedule(self) -> "ShortcutConfig":
        for name, schedule in (("power", "poly"), ("milestones", "step"), ("gamma", "step")):
            if self.schedule != schedule and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)} has no effect with schedule={self.schedule}")
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule=step needs milestones, for example milestones=[0.5,0.75]")
        growing = list(self.milestones) == sorted(set(self.milestones))
        if not growing or any(not 0.0 < milestone < 1.0 for milestone in self.milestones):
            raise ValueError(f"milestones={list(self.milestones)} must be growing parts of training between 0 and 1")
        return self

    @property
    def enabled(self) -> bool:
        """Whether there are side branches."""
        return self.where != "none"


def balance_coefficient(config: ShortcutConfig, iteration: int, total: int) -> float:
    """Lambda of a training step.

    Args:
        config: schedule and lambda0.
        iteration: steps done before this one, 0 to `total`; the first step has lambda0, and 0 is what is left after the
            last one (but for constant and step).
        total: steps of the whole training.

    Raises:
        ValueError: the iteration is not within the training.
    """
    if total < 1 or not 0 <= iteration <= total:
        raise ValueError(f"iteration={iteration} is not within a training of {total} iterations")
    if config.schedule == "step":
        passed = sum(iteration >= milestone * total for milestone in config.milestones)
        return config.lambda0 * config.gamma**passed
    return config.lambda0 * _FALL[config.schedule](iteration / total, config)


_FALL: dict[str, Callable[[float, ShortcutConfig], float]] = {
    "constant": lambda done, config: 1.0,
    "linear": lambda done, config: 1.0 - done,
    "exp10": lambda done, config: (10.0 - 10.0**done) / 9.0,
    "cosine": lambda done, config: (1.0 + math.cos(math.pi * done)) / 2.0,
    "poly": lambda done, config: (1.0 - done) ** config.power,
}
"""lambda / lambda0 at a part of training in [0, 1]."""


def branch_channels(model: SGResNetConfig, config: ShortcutConfig) -> list[int]:
    """Channels that each side branch of a network sees, first to last.

    Raises:
        ValueError: there is no place for a branch, or `convex` would give the network's own output a negative weight.
    """
    channels = [
        out
        for out, blocks in zip(model.stage_channels, model.stages, strict=True)
        for _ in range(blocks if config.where == "block" else 1)
    ][:-1]
    if not channels:
        raise ValueError(
            f"where={config.where}: the network has only one {config.where}, and no branch follows the last"
        )
    if config.combine == "convex" and config.lambda0 * len(channels) > 1.0:
        raise ValueError(
            f"lambda0={config.lambda0} for each of {len(channels)} side branches leaves the network's own output a "
            f"negative weight under combine=convex; give at most {1 / len(channels):.4g}"
        )
    return channels


class ShortcutLogits(NamedTuple):
    """Outputs of one forward pass in training, each [B, K]."""

    main: Tensor
    """The network's own."""
    sides: tuple[Tensor, ...]
    """Those of the side branches, first to last."""


class ShortcutNetwork(nn.Module):
    """A network with side branches. In evaluation it is the network alone.

    Args:
        network: held unchanged under `network`; build it first, so that its weights do not depend on the branches.
        config: where the branches attach.

    Raises:
        ValueError: the configuration asks for no branches, there is no place for any, or `convex` would give the
            network's own output a negative weight.
    """

    def __init__(self, network: SGResNet, config: ShortcutConfig) -> None:
        super().__init__()
        if not config.enabled:
            raise ValueError(f"where={config.where} asks for no side branches; train the network itself")
        if not isinstance(network, SGResNet):
            raise ValueError(f"side branches classify the stages of an SGResNet; {type(network).__name__} is none")
        channels = branch_channels(network.config, config)
        self.network = network
        self.config = config
        self.branches = nn.ModuleList(nn.Linear(out, network.config.num_classes) for out in channels)

    def forward(self, images: Tensor) -> ShortcutLogits | Tensor:
        """All logits in training, the network's own [B, K] in evaluation. Arguments and errors as the network's."""
        if not self.training:
            own: Tensor = self.network(images)
            return own
        if self.config.where == "stage":
            features = self.network.forward_features(images)
        else:
            features = self.network.forward_blocks(images)
        sides = tuple(
            branch(output.mean((0, 3, 4))) for branch, output in zip(self.branches, features[:-1], strict=True)
        )
        return ShortcutLogits(self.network.forward_head(features[-1]), sides)


def shortcut_loss(
    logits: ShortcutLogits, targets: Tensor, coefficient: float, config: ShortcutConfig, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy, mean over the batch, of all outputs; eqs 6 and 10.

    With a coefficient of 0 it is the loss of the network alone, and so are the network's gradients, to the last bit;
    the branches then get gradients of 0, not None, so that DDP waits for none.

    Args:
        logits: outputs of a `ShortcutNetwork` in training.
        targets: int64 [B].
        coefficient: lambda, from `balance_coefficient`.
        config: how outputs are combined.
        label_smoothing: as in torch's cross entropy.
    """

    wide = torch.promote_types(logits.main.dtype, torch.float32)
    main, sides = logits.main.to(wide), torch.stack(logits.sides).to(wide)
    own = 1.0 if config.combine == "add" else 1.0 - coefficient * len(sides)
    if config.loss == "sum_losses":
        losses = [F.cross_entropy(scores, targets, label_smoothing=label_smoothing) for scores in (main, *sides)]
        return own * losses[0] + coefficient * torch.stack(losses[1:]).sum()
    return F.cross_entropy(own * main + coefficient * sides.sum(0), targets, label_smoothing=label_smoothing)
