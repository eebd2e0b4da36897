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
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikefleet_models.family import ModelConfig
from spikefleet_models.shortcut_config import ShortcutConfig as ShortcutConfig


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


def branch_channels(model: ModelConfig, config: ShortcutConfig) -> list[int]:
    """`model.branch_channels(config)`."""
    return model.branch_channels(config)


@runtime_checkable
class StagedClassifier(Protocol):
    """A network that side branches can attach to. Its configuration answers `branch_channels`."""

    config: ModelConfig

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The output [T, B, C, H, W] of every stage, first to last, of images [B, C, H, W] or [T, B, C, H, W]."""
        ...

    def forward_blocks(self, images: Tensor) -> list[Tensor]:
        """The output [T, B, C, H, W] of every block of every stage, first to last."""
        ...

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits [B, K] of the last stage's output."""
        ...


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

    def __init__(self, network: nn.Module, config: ShortcutConfig) -> None:
        super().__init__()
        if not config.enabled:
            raise ValueError(f"where={config.where} asks for no side branches; train the network itself")
        if not isinstance(network, StagedClassifier):
            raise ValueError(f"side branches classify the stages of an SGResNet; {type(network).__name__} is none")
        channels = network.config.branch_channels(config)
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
