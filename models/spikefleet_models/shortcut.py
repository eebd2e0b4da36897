"""Shortcut back-propagation: side branches that take the gradient past the residual blocks, in training only.

Guo et al., "Take a shortcut back: mitigating the gradient vanishing for training spiking neural networks", NeurIPS
2024, arXiv 2401.04486, eqs 6 to 10 and algorithm 1. Branch l pools the output of a stage (or block) globally and
classifies it; its gradient reaches the stage without passing the surrogate gradients of later ones:

    o_l = FC_l(mean_{T,H,W} S_l)                      l < n; o_n are the network's own logits
    add       o = o_n + lambda * sum_l o_l            lambda = 1, constant: eq 6
    convex    o = (1 - (n - 1) lambda) * o_n + lambda * sum_l o_l
    loss      summed_logits             CE(o, y): eq 6
              sum_losses                the same combination of CE(o_l, y)
              own_and_summed            CE(o_n, y) + lambda * CE(o_n + sum_l o_l, y), add only
              own_and_summed_detached   the same with o_n constant in the second term

With CE(o, y) alone nothing trains the network's own output once the branches fit, yet that is what is evaluated. The
other losses always train it. The default, `sum_losses` with lambda = 1 to the end, is ours: it brought plain networks
of 34 layers from chance to 81 % (models/README.md).

The balance coefficient lambda falls during training ("evolutionary training"). The paper's text fixes that the
coefficient depends on the iteration i, their number I and one constant, 0.25, and that branches have no weight at
i = I; its formula (eq 10), how lambda enters, and where branches attach are not public. Each is a field here. The
likeliest reading is `summed_logits` with `linear` from 0.25; with `convex` and four stages, 0.25 starts as the mean of
all outputs.

The plain network is kept unchanged as `ShortcutNetwork.network`: that one is evaluated, exported and registered.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from spikefleet_models.class_loss import class_loss
from spikefleet_models.family import ModelConfig
from spikefleet_models.shortcut_config import ShortcutConfig as ShortcutConfig


def balance_coefficient(config: ShortcutConfig, iteration: int, total: int) -> float:
    """Compute lambda of a training step.

    Args:
        config: schedule and lambda0.
        iteration: number of completed steps, 0 to `total`; the first step has lambda0, and after the last one lambda is
            0 (except for constant and step).
        total: number of steps of the whole training.

    Raises:
        ValueError: `iteration` is not in 0 to `total`.
    """
    if total < 1 or not 0 <= iteration <= total:
        raise ValueError(f"iteration={iteration} is outside the training, expected 0 to total={total} and total >= 1")
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
"""lambda / lambda0 at a fraction of training in [0, 1]."""


def branch_channels(model: ModelConfig, config: ShortcutConfig) -> list[int]:
    """Channels of the side branches of a network: `model.branch_channels(config)`."""
    return model.branch_channels(config)


@runtime_checkable
class StagedClassifier(Protocol):
    """A network that side branches can attach to; its configuration implements `branch_channels`."""

    config: ModelConfig

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Compute the output [T, B, C, H, W] of every stage from images [B, C, H, W] or [T, B, C, H, W]."""
        ...

    def forward_blocks(self, images: Tensor) -> list[Tensor]:
        """Compute the output [T, B, C, H, W] of every block of every stage, first to last."""
        ...

    def forward_head(self, features: Tensor) -> Tensor:
        """Compute the logits [B, K] from the last stage's output."""
        ...


class ShortcutLogits(NamedTuple):
    """Outputs of one forward pass in training, each [B, K]."""

    main: Tensor
    """Logits of the network itself."""
    sides: tuple[Tensor, ...]
    """Logits of the side branches, first to last."""


class ShortcutNetwork(nn.Module):
    """A network with side branches; in evaluation it runs the network alone.

    Args:
        network: kept unchanged as `network`; build it first, so that its weights do not depend on the branches.
        config: where the branches attach.

    Raises:
        ValueError: the configuration enables no branches, the network supports none, or `convex` would give the
            network's own output a negative weight.
    """

    def __init__(self, network: nn.Module, config: ShortcutConfig) -> None:
        super().__init__()
        if not config.enabled:
            raise ValueError(f"where={config.where} enables no side branches; train the network itself")
        if not isinstance(network, StagedClassifier):
            raise ValueError(
                f"side branches attach to the stages of an SGResNet; {type(network).__name__} is not one, "
                "set where=none"
            )
        channels = network.config.branch_channels(config)
        self.network = network
        self.config = config
        self.branches = nn.ModuleList(nn.Linear(out, network.config.num_classes) for out in channels)

    def forward(self, images: Tensor) -> ShortcutLogits | Tensor:
        """Compute all logits in training, the network's own [B, K] in evaluation.

        Args:
            images: images [B, C, H, W] or frames [T, B, C, H, W].

        Raises:
            ValueError: the shape or type of `images` does not fit the network.
        """
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
    logits: ShortcutLogits,
    targets: Tensor,
    coefficient: float | Tensor,
    config: ShortcutConfig,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy of all outputs, mean over the batch; eqs 6 and 10.

    With a coefficient of 0 the loss and the network's gradients equal those of the network alone, bit for bit; the
    branches then get gradients of 0, not None, so that DDP does not wait for them.

    Args:
        logits: outputs of a `ShortcutNetwork` in training.
        targets: classes, int64 [B], or their probabilities, float32 [B, K].
        coefficient: lambda, from `balance_coefficient`; a number or a tensor [].
        config: how outputs are combined.
        label_smoothing: as in torch's cross entropy.
        class_weights: factor of each class in the loss, [K]; None: 1.
    """

    def entropy(scores: Tensor) -> Tensor:
        return class_loss(scores, targets, label_smoothing, class_weights)

    wide = torch.promote_types(logits.main.dtype, torch.float32)
    main, sides = logits.main.to(wide), torch.stack(logits.sides).to(wide)
    own = 1.0 if config.combine == "add" else 1.0 - coefficient * len(sides)
    if config.loss == "sum_losses":
        losses = [entropy(scores) for scores in (main, *sides)]
        return own * losses[0] + coefficient * torch.stack(losses[1:]).sum()
    if config.loss.startswith("own_and_summed"):
        beside = main.detach() if config.loss == "own_and_summed_detached" else main
        return entropy(main) + coefficient * entropy(beside + sides.sum(0))
    return entropy(own * main + coefficient * sides.sum(0))
