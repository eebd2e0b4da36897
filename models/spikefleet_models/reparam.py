"""From the network that is trained to the one that is deployed: batch norms folded into convolutions, chains merged.

A batch norm in eval mode is a scale s and a shift t per channel, so that convolution and batch norm are one convolution
with a bias. SpikeYOLO's chains (Luo et al., ECCV 2024, eq 7) are linear too and merge to one dense 3x3 convolution with
zero padding, because they pad with the value that their batch norm gives to zero:

    RepConv      W[o, i] = s2_o sum_m P[o, m] k_m s_m K[m, i]      b_o = s2_o sum_m P[o, m] (sum k_m) t_m + t2_o
    SepRepConv   W[o, i] = k_o P[o, i] s_i                         b_o = (sum k_o) (P t)_o

K is the first 1x1, (s, t) the padding batch norm, k the depth-wise 3x3, P the last 1x1, (s2, t2) the trailing batch
norm.

Merging is what makes a chain spike-driven: one convolution sits behind each neuron. It also multiplies SpikeYOLO-s's
operations by 1.7 and its weights by 2.6; `deploy(network, merge=False)` keeps the factors, each with its bias.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spikefleet_models.sg_resnet import ResidualBlock, Shortcut, Stem
from spikefleet_models.spike_yolo.blocks import (
    ConvNorm,
    RepConv,
    SepRepConv,
    SpikingRepConv,
    SpikingSepRepConv,
)
from spikefleet_models.spiking_unit import SpikingUnit


class Affine(NamedTuple):
    """What a batch norm in eval mode does to a channel: scale * x + shift; both fp64 [C]."""

    scale: Tensor
    shift: Tensor


def affine(bn: nn.Module) -> Affine:
    """Scale and shift of a batch norm with running statistics.

    Raises:
        ValueError: another module, or a batch norm that keeps no running statistics.
    """
    if not isinstance(bn, _BatchNorm) or bn.running_mean is None or bn.running_var is None:
        raise ValueError(f"cannot fold {type(bn).__name__}; only batch norms with running statistics are linear")
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.detach().double()
    shift = -bn.running_mean.double() * scale
    if bn.bias is not None:
        shift = shift + bn.bias.detach().double()
    return Affine(scale, shift)


def fold_bn(conv: nn.Conv2d, bn: nn.Module) -> nn.Conv2d:
    """One convolution with bias that computes bn(conv(x)) of eval mode; computed in fp64, in the type of `conv`.

    Raises:
        ValueError: `bn` cannot be folded.
    """
    scale, shift = affine(bn)
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    bias = shift if conv.bias is None else shift + conv.bias.detach().double() * scale
    return _conv(weight, bias, conv, conv.padding)


def merge_rep_conv(chain: RepConv) -> nn.Conv2d:
    """The dense 3x3 convolution with zero padding and bias that equals a RepConv in eval mode, borders included."""
    inner, outer = affine(chain.pad_bn.bn), affine(chain.bn)
    first = chain.first.weight.detach().double()[:, :, 0, 0] * inner.scale[:, None]
    depthwise = chain.depthwise.weight.detach().double()[:, 0]
    last = chain.last.weight.detach().double()[:, :, 0, 0] * outer.scale[:, None]
    # [m, i, 3, 3] would be as large as the result; tap by tap it is [m, i].
    taps = [last @ (tap[:, None] * first) for tap in depthwise.flatten(1).unbind(1)]
    weight = torch.stack(taps, dim=-1).unflatten(-1, (3, 3))
    bias = last @ (depthwise.sum((1, 2)) * inner.shift) + outer.shift
    return _conv(weight, bias, chain.last, (1, 1))


def merge_sep_rep_conv(chain: SepRepConv) -> nn.Conv2d:
    """The dense 3x3 convolution with zero padding and bias that equals a SepRepConv in eval mode, borders included."""
    inner = affine(chain.pad_bn.bn)
    pointwise = chain.pointwise.weight.detach().double()[:, :, 0, 0]
    depthwise = chain.depthwise.weight.detach().double()
    weight = depthwise * (pointwise * inner.scale)[:, :, None, None]
    bias = depthwise.sum((1, 2, 3)) * (pointwise @ inner.shift)
    return _conv(weight, bias, chain.pointwise, (1, 1))


def deploy(network: nn.Module, merge: bool = True) -> nn.Module:
    """A deep copy in eval mode, without gradients, with every batch norm folded and every chain merged.

    Outputs equal those of `network` in eval mode up to rounding (below 1e-12 in fp64). Each neuron then feeds
    convolutions or linear layers with one bias each, or a gate; only the transformer variant's attention, where
    three neurons a block feed matrix products, is not of that form.

    Args:
        network: any network of this package; left alone.
        merge: one dense 3x3 convolution a chain; false keeps RepConv and SepRepConv as three convolutions, the first
            with padding and bias.

    Raises:
        ValueError: a batch norm is left that no rule covers.
    """
    deployed = copy.deepcopy(network).eval().requires_grad_(False)
    for module in list(deployed.modules()):
        if isinstance(module, ConvNorm):
            module.conv = _fold_behind(_without_bn(module.conv, merge), module.bn)
            module.bn = nn.Identity()
        elif isinstance(module, Stem):
            module.conv = _fold_unit(module.conv, module.unit)
        elif isinstance(module, Shortcut):
            if isinstance(module.unit, SpikingUnit):
                module.conv = _fold_unit(module.conv, module.unit)
            else:
                module.conv = fold_bn(module.conv, module.unit)
                module.unit = nn.Identity()  # type: ignore[assignment]
        elif isinstance(module, ResidualBlock):
            for index, unit in enumerate(module.units):
                assert isinstance(unit, SpikingUnit)
                module.convs[index] = _fold_unit(module.convs[index], unit)
    left = [name for name, module in deployed.named_modules() if isinstance(module, _BatchNorm)]
    if left:
        raise ValueError(f"{type(network).__name__} has batch norms that no convolution takes: {', '.join(left)}")
    return deployed.requires_grad_(False)


def _fold_unit(conv: nn.Module, unit: SpikingUnit) -> nn.Conv2d:
    assert isinstance(conv, nn.Conv2d)
    folded = fold_bn(conv, unit.bn)
    unit.bn = nn.Identity()
    return folded


def _without_bn(conv: nn.Module, merge: bool) -> nn.Module:
    """A convolution or chain whose own batch norms are folded."""
    if isinstance(conv, RepConv):
        if merge:
            return merge_rep_conv(conv)
        return nn.Sequential(_fold_padded(conv.first, conv.pad_bn.bn), conv.depthwise, fold_bn(conv.last, conv.bn))
    if isinstance(conv, SepRepConv):
        if merge:
            return merge_sep_rep_conv(conv)
        inner = affine(conv.pad_bn.bn)
        pointwise = conv.pointwise.weight.detach().double()
        weight = pointwise * inner.scale[None, :, None, None]
        return nn.Sequential(_conv(weight, pointwise[:, :, 0, 0] @ inner.shift, conv.pointwise, (1, 1)), conv.depthwise)
    if isinstance(conv, SpikingRepConv):
        assert isinstance(conv.first, nn.Conv2d)
        conv.first = _fold_padded(conv.first, conv.pad_bn.get_submodule("bn"))
        conv.last, conv.pad_bn, conv.bn = fold_bn(conv.last, conv.bn), nn.Identity(), nn.Identity()
    elif isinstance(conv, SpikingSepRepConv):
        inner = affine(conv.pad_bn.get_submodule("bn"))
        depthwise = conv.depthwise.weight.detach().double()
        weight = depthwise * inner.scale[:, None, None, None]
        conv.depthwise = _conv(weight, depthwise.sum((1, 2, 3)) * inner.shift, conv.depthwise, (1, 1))
        conv.pad_bn = nn.Identity()
    return conv


def _fold_behind(conv: nn.Module, bn: nn.Module) -> nn.Module:
    """The same with the batch norm that follows folded into the last convolution."""
    if isinstance(bn, nn.Identity):
        return conv
    if isinstance(conv, nn.Conv2d):
        return fold_bn(conv, bn)
    if isinstance(conv, SpikingRepConv):
        conv.last = fold_bn(conv.last, bn)
    elif isinstance(conv, SpikingSepRepConv):
        conv.pointwise = fold_bn(conv.pointwise, bn)
    else:
        assert isinstance(conv, nn.Sequential)
        last = conv[-1]
        assert isinstance(last, nn.Conv2d)
        conv[-1] = fold_bn(last, bn)
    return conv


def _fold_padded(conv: nn.Conv2d, bn: nn.Module) -> nn.Conv2d:
    """A 1x1 convolution and BNAndPad: zero padding before a 1x1 leaves its bias on the border."""
    folded = fold_bn(conv, bn)
    folded.padding = (1, 1)
    return folded


def _conv(weight: Tensor, bias: Tensor, like: nn.Conv2d, padding: str | tuple[int, ...]) -> nn.Conv2d:
    """A convolution with this weight and bias, and stride, groups, type and device of `like`."""
    conv = nn.Conv2d(
        weight.shape[1] * like.groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        stride=like.stride,  # type: ignore[arg-type]
        padding=padding,  # type: ignore[arg-type]
        dilation=like.dilation,  # type: ignore[arg-type]
        groups=like.groups,
        device="meta",
    )
    conv.weight = nn.Parameter(weight.to(like.weight.dtype))
    conv.bias = nn.Parameter(bias.to(like.weight.dtype))
    return conv
