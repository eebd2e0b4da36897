"""Deployment of a trained network: batch norms folded into convolutions, re-parameterised chains merged.

A batch norm in eval mode is a scale s and a shift t per channel, so that convolution and batch norm are one convolution
with a bias. SpikeYOLO's chains (Luo et al., ECCV 2024, eq 7) are linear too and merge to one dense 3x3 convolution with
zero padding, because they pad with the value that their batch norm maps zero to:

    RepConv      W[o, i] = s2_o sum_m P[o, m] k_m s_m K[m, i]      b_o = s2_o sum_m P[o, m] (sum k_m) t_m + t2_o
    SepRepConv   W[o, i] = k_o P[o, i] s_i                         b_o = (sum k_o) (P t)_o

K is the first 1x1, (s, t) the padding batch norm, k the depth-wise 3x3, P the last 1x1, (s2, t2) the trailing batch
norm.

Merging makes a chain spike-driven: each neuron feeds one convolution. It also multiplies SpikeYOLO-s's operations by
1.7 and its weights by 2.6; `deploy(network, merge=False)` keeps the factors, each with its bias.

This file holds the arithmetic; each module declares next to its forward which convolution takes which batch norm
(`Deployable`). An `nn.Sequential` with a `Conv2d` before a batch norm or a `SpikingUnit` needs no declaration.
"""

import copy
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spikefleet_models.low_precision import Precision, check_precision, with_precision
from spikefleet_models.spiking_unit import SpikingUnit

if TYPE_CHECKING:
    from spikefleet_models.spike_yolo.blocks import RepConv, SepRepConv


@runtime_checkable
class Deployable(Protocol):
    """A module that owns batch norms, or that merges to a smaller module for deployment."""

    def deployed(self, merge: bool) -> nn.Module:
        """Return the module that replaces this one in deployment: itself, changed, or another module.

        Its children have already been deployed. `merge` is as in `deploy`.
        """
        ...


@runtime_checkable
class TakesBatchNorm(Protocol):
    """A module whose last convolution can take a batch norm that follows the module."""

    def take_batch_norm(self, bn: nn.Module) -> None:
        """Fold `bn` into the last convolution, in place."""
        ...


class Affine(NamedTuple):
    """A batch norm in eval mode as scale * x + shift per channel; both fp64 [C]."""

    scale: Tensor
    shift: Tensor


def affine(bn: nn.Module) -> Affine:
    """Compute scale and shift of a batch norm with running statistics.

    Raises:
        ValueError: `bn` is another module, or a batch norm without running statistics.
    """
    if not isinstance(bn, _BatchNorm) or bn.running_mean is None or bn.running_var is None:
        raise ValueError(f"cannot fold {type(bn).__name__}, expected a batch norm with running statistics")
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.detach().double()
    shift = -bn.running_mean.double() * scale
    if bn.bias is not None:
        shift = shift + bn.bias.detach().double()
    return Affine(scale, shift)


def fold_bn(conv: nn.Conv2d, bn: nn.Module) -> nn.Conv2d:
    """Fold a batch norm in eval mode into the convolution before it: one convolution with bias that is bn(conv(x)).

    It is computed in fp64 and returned in the type of `conv`.

    Raises:
        ValueError: `bn` cannot be folded.
    """
    scale, shift = affine(bn)
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    bias = shift if conv.bias is None else shift + conv.bias.detach().double() * scale
    return _conv_like(weight, bias, conv, conv.padding)


def merge_rep_conv(chain: "RepConv") -> nn.Conv2d:
    """Merge a RepConv in eval mode to one dense 3x3 convolution with zero padding and bias, borders included."""
    inner, outer = affine(chain.pad_bn.bn), affine(chain.bn)
    first = chain.first.weight.detach().double()[:, :, 0, 0] * inner.scale[:, None]
    depthwise = chain.depthwise.weight.detach().double()[:, 0]
    last = chain.last.weight.detach().double()[:, :, 0, 0] * outer.scale[:, None]
    # [m, i, 3, 3] would be as large as the result; tap by tap it is [m, i].
    taps = [last @ (tap[:, None] * first) for tap in depthwise.flatten(1).unbind(1)]
    weight = torch.stack(taps, dim=-1).unflatten(-1, (3, 3))
    bias = last @ (depthwise.sum((1, 2)) * inner.shift) + outer.shift
    return _conv_like(weight, bias, chain.last, (1, 1))


def merge_sep_rep_conv(chain: "SepRepConv") -> nn.Conv2d:
    """Merge a SepRepConv in eval mode to one dense 3x3 convolution with zero padding and bias, borders included."""
    inner = affine(chain.pad_bn.bn)
    pointwise = chain.pointwise.weight.detach().double()[:, :, 0, 0]
    depthwise = chain.depthwise.weight.detach().double()
    weight = depthwise * (pointwise * inner.scale)[:, :, None, None]
    bias = depthwise.sum((1, 2, 3)) * (pointwise @ inner.shift)
    return _conv_like(weight, bias, chain.pointwise, (1, 1))


def fold_unit(conv: nn.Module, unit: SpikingUnit) -> tuple[nn.Conv2d, SpikingUnit]:
    """Fold the batch norm of a unit into the convolution before it.

    Returns:
        The new convolution, and a copy of the unit without batch norm.

    Raises:
        ValueError: `conv` is not a Conv2d, or the unit's batch norm cannot be folded.
    """
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(f"{type(conv).__name__} takes no batch norm, expected a Conv2d")
    folded = fold_bn(conv, unit.bn)
    # A copy: a unit that follows several convolutions has its batch norm folded into each.
    bare = copy.deepcopy(unit)
    bare.bn = nn.Identity()
    return folded, bare


def fold_behind(module: nn.Module, bn: nn.Module) -> nn.Module:
    """Fold `bn` into the module before it.

    Returns:
        A new convolution, or `module` with its last convolution changed.

    Raises:
        ValueError: `module` has no last convolution that can take `bn`, or `bn` cannot be folded.
    """
    if isinstance(bn, nn.Identity):
        return module
    if isinstance(module, nn.Conv2d):
        return fold_bn(module, bn)
    if isinstance(module, nn.Sequential):
        module[-1] = fold_behind(module[-1], bn)
    elif isinstance(module, TakesBatchNorm):
        module.take_batch_norm(bn)
    else:
        raise ValueError(
            f"{type(module).__name__} takes no batch norm, expected a Conv2d or a module that ends in one; add a "
            "method take_batch_norm to it"
        )
    return module


def fold_padded(conv: nn.Conv2d, bn: nn.Module) -> nn.Conv2d:
    """Fold the `BatchNormAndPad` of `bn` into the 1x1 convolution before it.

    The result has padding 1: zero padding before a 1x1 convolution leaves its bias at the border.
    """
    folded = fold_bn(conv, bn)
    folded.padding = (1, 1)
    return folded


def fold_padded_in_front(bn: nn.Module, conv: nn.Conv2d) -> nn.Conv2d:
    """Fold the `BatchNormAndPad` of `bn` into the dense 1x1 or depth-wise 3x3 convolution without bias after it."""
    scale, shift = affine(bn)
    weight = conv.weight.detach().double()
    if conv.kernel_size == (1, 1):
        return _conv_like(weight * scale[None, :, None, None], weight[:, :, 0, 0] @ shift, conv, (1, 1))
    return _conv_like(weight * scale[:, None, None, None], weight.sum((1, 2, 3)) * shift, conv, (1, 1))


def deploy(network: nn.Module, merge: bool = True, precision: Precision = "fp32") -> nn.Module:
    """Copy a network for deployment, with every batch norm folded and every chain merged.

    Outputs equal those of `network` in eval mode up to rounding (below 1e-12 in fp64). Each neuron then feeds
    convolutions or linear layers with one bias each, or a gate; the only exception is the transformer variant's
    attention, where three neurons per block feed matrix products.

    Args:
        network: any network whose batch norms follow convolutions; not changed.
        merge: merge each chain to one dense 3x3 convolution; false keeps RepConv and SepRepConv as three convolutions,
            the first with padding and bias.
        precision: "bf16" or "int8" rounds the weights of the layers that spikes feed (low_precision.py); "fp32" rounds
            nothing and keeps the type of the network.

    Returns:
        A deep copy in eval mode, without gradients.

    Raises:
        ValueError: a batch norm follows no convolution that can take it, there is no such precision, or it is not fp32
            and spikes feed no layer.
    """
    check_precision(precision)
    deployed = _deployed(copy.deepcopy(network).eval().requires_grad_(False), merge, {})
    left = [name for name, module in deployed.named_modules() if isinstance(module, _BatchNorm)]
    if left:
        raise ValueError(
            f"{type(network).__name__} has batch norms that no convolution takes: {', '.join(left)}; add a method "
            "deployed to the modules that own them"
        )
    deployed.requires_grad_(False)
    return deployed if precision == "fp32" else with_precision(deployed, precision)


def _deployed(module: nn.Module, merge: bool, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """Deploy a module, children first; `done` keeps a shared module shared."""
    if module not in done:
        # Not named_children: it names a shared child once.
        for name, child in list(module._modules.items()):
            if child is not None:
                setattr(module, name, _deployed(child, merge, done))
        if isinstance(module, nn.Sequential):
            _fold_pairs(module)
        done[module] = module.deployed(merge) if isinstance(module, Deployable) else module
    return done[module]


def _fold_pairs(stack: nn.Sequential) -> None:
    """Fold each batch norm, bare or in a `SpikingUnit`, that follows a convolution in an `nn.Sequential`."""
    if type(stack).forward is not nn.Sequential.forward:
        return
    for index in range(len(stack) - 1):
        conv, follower = stack[index], stack[index + 1]
        if not isinstance(conv, nn.Conv2d):
            continue
        if isinstance(follower, _BatchNorm):
            stack[index], stack[index + 1] = fold_bn(conv, follower), nn.Identity()
        elif isinstance(follower, SpikingUnit) and isinstance(follower.bn, _BatchNorm):
            stack[index], stack[index + 1] = fold_unit(conv, follower)


def _conv_like(weight: Tensor, bias: Tensor, like: nn.Conv2d, padding: str | tuple[int, ...]) -> nn.Conv2d:
    """Build a convolution with this weight, bias and padding; all else, type and device too, is that of `like`."""
    conv = nn.Conv2d(
        weight.shape[1] * like.groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        stride=like.stride,  # type: ignore[arg-type]
        padding=padding,  # type: ignore[arg-type]
        dilation=like.dilation,  # type: ignore[arg-type]
        groups=like.groups,
        padding_mode=like.padding_mode,
        device="meta",
    )
    conv.weight = nn.Parameter(weight.to(like.weight.dtype))
    conv.bias = nn.Parameter(bias.to(like.weight.dtype))
    return conv
