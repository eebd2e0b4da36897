"""Building blocks of SpikeYOLO (Luo et al., ECCV 2024, section 3.2 and eqs 2 to 7) on merged time and batch.

Every tensor between blocks is a membrane current [T * B, C, H, W]; a neuron (SN) precedes each convolution and never
follows it, so residual additions, pooling and up-sampling all act on real values. Only `ConvNorm`, `SpikeConv` and the
chains, which have batch norms inside, combine a convolution with a batch norm. `deployed` says how each is folded; the
arithmetic is in reparam.py.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spikefleet_models.network_input import check_images
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import build_neuron
from spikefleet_models.reparam import (
    fold_behind,
    fold_bn,
    fold_padded,
    fold_padded_in_front,
    merge_rep_conv,
    merge_sep_rep_conv,
)
from spikefleet_models.spike_yolo.config import ATTENTION_HEADS

BN_EPSILON = 1e-3
BN_MOMENTUM = 0.03


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Build a batch norm with the published constants; its statistics are shared over T and B."""
    return nn.BatchNorm2d(channels, eps=BN_EPSILON, momentum=BN_MOMENTUM)


class Steps:
    """T of the running forward pass, shared by all blocks of one network, which see time and batch merged."""

    def __init__(self, timesteps: int) -> None:
        self.count = timesteps


class SN(nn.Module):
    """The paper's SN: a multi-step neuron on merged time and batch."""

    def __init__(self, config: NeuronConfig, steps: Steps) -> None:
        super().__init__()
        self.neuron = build_neuron(config)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        """Fire: currents [T * B, ...] -> spikes or integers [T * B, ...]; both reshapes are views."""
        emitted: Tensor = self.neuron(x.unflatten(0, (self.steps.count, -1)))
        return emitted.flatten(0, 1)


@dataclass(frozen=True)
class Plan:
    """Settings shared by all blocks of one network; `neuron` is None in an ANN twin."""

    neuron: NeuronConfig | None
    timesteps: int
    reparameterise: bool = True
    steps: Steps = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", Steps(self.timesteps))

    def activation(self) -> nn.Module:
        """Build a neuron; in an ANN twin a ReLU, not in place, since residual branches read the same tensor."""
        return nn.ReLU() if self.neuron is None else SN(self.neuron, self.steps)

    def rep_conv(self, in_channels: int, out_channels: int) -> nn.Module:
        """Build a RepConv, or the chain with neurons inside."""
        if self.reparameterise:
            return RepConv(in_channels, out_channels)
        return SpikingRepConv(self, in_channels, out_channels)

    def sep_rep_conv(self, in_channels: int, out_channels: int) -> nn.Module:
        """Build a SepRepConv, or the chain with a neuron inside."""
        if self.reparameterise:
            return SepRepConv(in_channels, out_channels)
        return SpikingSepRepConv(self, in_channels, out_channels)


class ConvNorm(nn.Module):
    """A convolution, or a chain that merges to one, and its batch norm."""

    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise: [N, C, H, W] -> [N, C', H', W']."""
        y: Tensor = self.bn(self.conv(x))
        return y

    def deployed(self, merge: bool) -> nn.Module:
        """Fold the batch norm into the convolution, or into the last one of the chain, and return the module itself."""
        self.conv, self.bn = fold_behind(self.conv, self.bn), nn.Identity()
        return self


class SpikeConv(ConvNorm):
    """SN -> convolution -> batch norm."""

    def __init__(self, plan: Plan, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__(conv, bn)
        self.sn = plan.activation()

    def forward(self, x: Tensor) -> Tensor:
        """Fire, convolve, normalise: [N, C, H, W] -> [N, C', H', W']."""
        return super().forward(self.sn(x))


def spike_conv(
    plan: Plan,
    in_channels: int,
    out_channels: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> SpikeConv:
    """Build the paper's MS_StandardConv; with `bias` and a stride, its MS_DownSampling."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=bias)
    return SpikeConv(plan, conv, batch_norm(out_channels))


def prediction(plan: Plan, in_channels: int, out_channels: int) -> SpikeConv:
    """Build the last layer of a head: SN -> 1x1 convolution with bias, no batch norm."""
    return SpikeConv(plan, nn.Conv2d(in_channels, out_channels, 1), nn.Identity())


class _PadFunction(torch.autograd.Function):
    """(x [N, C, H, W], value [C]) -> x inside a border of `value`, one pixel wide; no gradient to `value`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        samples, channels, height, width = x.shape
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        padded = torch.empty(
            (samples, channels, height + 2, width + 2), dtype=x.dtype, device=x.device, memory_format=layout
        )
        column = value.to(x.dtype)[:, None]
        padded[:, :, 1:-1, 1:-1] = x
        padded[:, :, 0] = column
        padded[:, :, -1] = column
        padded[:, :, :, 0] = column
        padded[:, :, :, -1] = column
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        return grad[:, :, 1:-1, 1:-1], None


class BatchNormAndPad(nn.Module):
    """Batch norm, then a border one pixel wide with the value that the batch norm maps zero to.

    This equals zero-padding before the preceding 1x1 convolution. The border uses the running statistics and has no
    gradient, in training too, where the inside uses the statistics of the batch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = batch_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and pad: [N, C, H, W] -> [N, C, H + 2, W + 2]."""
        y = self.bn(x)
        padded: Tensor = _PadFunction.apply(y, self.pad_value())
        return padded

    def pad_value(self) -> Tensor:
        """Compute the border's value, [C]: beta - mean * gamma / sqrt(var + eps)."""
        bn = self.bn
        mean, variance = bn.running_mean, bn.running_var
        assert mean is not None
        assert variance is not None
        return bn.bias.detach() - mean * bn.weight.detach() * (variance + bn.eps).rsqrt()


class RepConv(nn.Module):
    """1x1 -> BNAndPad -> 3x3 depth-wise, valid -> 1x1 -> BN; merges to one 3x3 convolution with zero padding."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, in_channels, 1, bias=False)
        self.pad_bn = BatchNormAndPad(in_channels)
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, groups=in_channels, bias=False)
        self.last = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = batch_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [N, C, H, W] -> [N, C', H, W]."""
        y: Tensor = self.bn(self.last(self.depthwise(self.pad_bn(self.first(x)))))
        return y

    def deployed(self, merge: bool) -> nn.Module:
        """Return one dense 3x3 convolution; without `merge` all three, the first with padding and bias."""
        if merge:
            return merge_rep_conv(self)
        return nn.Sequential(fold_padded(self.first, self.pad_bn.bn), self.depthwise, fold_bn(self.last, self.bn))


class SepRepConv(nn.Module):
    """BNAndPad -> 1x1 -> 3x3 depth-wise, valid; merges to one 3x3 convolution with zero padding."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pad_bn = BatchNormAndPad(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.depthwise = nn.Conv2d(out_channels, out_channels, 3, groups=out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [N, C, H, W] -> [N, C', H, W]."""
        y: Tensor = self.depthwise(self.pointwise(self.pad_bn(x)))
        return y

    def deployed(self, merge: bool) -> nn.Module:
        """Return one dense 3x3 convolution; without `merge` both, the first with padding and bias."""
        if merge:
            return merge_sep_rep_conv(self)
        return nn.Sequential(fold_padded_in_front(self.pad_bn.bn, self.pointwise), self.depthwise)


class SpikingRepConv(nn.Module):
    """RepConv without re-parameterisation: 1x1 -> BNAndPad -> SN -> 3x3 depth-wise -> SN -> 1x1 -> BN."""

    def __init__(self, plan: Plan, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, in_channels, 1, bias=False)
        self.pad_bn: nn.Module = BatchNormAndPad(in_channels)
        self.depthwise_sn = plan.activation()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, groups=in_channels, bias=False)
        self.last_sn = plan.activation()
        self.last = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn: nn.Module = batch_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [N, C, H, W] -> [N, C', H, W]."""
        x = self.depthwise(self.depthwise_sn(self.pad_bn(self.first(x))))
        y: Tensor = self.bn(self.last(self.last_sn(x)))
        return y

    def deployed(self, merge: bool) -> nn.Module:
        """Fold both batch norms and return the module itself; the neurons inside prevent merging."""
        self.first = fold_padded(self.first, self.pad_bn.get_submodule("bn"))
        self.last, self.pad_bn, self.bn = fold_bn(self.last, self.bn), nn.Identity(), nn.Identity()
        return self

    def take_batch_norm(self, bn: nn.Module) -> None:
        """Fold the batch norm that follows the module into the last convolution."""
        self.last = fold_bn(self.last, bn)


class SpikingSepRepConv(nn.Module):
    """SepRepConv without re-parameterisation: BNAndPad -> 3x3 depth-wise on the wide side -> SN -> 1x1."""

    def __init__(self, plan: Plan, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pad_bn: nn.Module = BatchNormAndPad(in_channels)
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, groups=in_channels, bias=False)
        self.sn = plan.activation()
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [N, C, H, W] -> [N, C', H, W]."""
        y: Tensor = self.pointwise(self.sn(self.depthwise(self.pad_bn(x))))
        return y

    def deployed(self, merge: bool) -> nn.Module:
        """Fold the batch norm and return the module itself; the neuron inside prevents merging."""
        self.depthwise = fold_padded_in_front(self.pad_bn.get_submodule("bn"), self.depthwise)
        self.pad_bn = nn.Identity()
        return self

    def take_batch_norm(self, bn: nn.Module) -> None:
        """Fold the batch norm that follows the module into the last convolution."""
        self.pointwise = fold_bn(self.pointwise, bn)


class SepConv(nn.Module):
    """Eq 4: 1x1 to twice the channels, 7x7 depth-wise, SepRepConv back; SN before and BN after each."""

    def __init__(self, plan: Plan, channels: int) -> None:
        super().__init__()
        hidden = 2 * channels
        self.expand = spike_conv(plan, channels, hidden)
        self.depthwise = spike_conv(plan, hidden, hidden, kernel=7, groups=hidden)
        self.project = SpikeConv(plan, plan.sep_rep_conv(hidden, channels), batch_norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [N, C, H, W] -> the same shape."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return y


class Block1(nn.Module):
    """SNN-Block-1, eqs 2, 3, 5: SepConv and two 3x3 convolutions, C -> ratio * C -> C, each with its residual."""

    def __init__(self, plan: Plan, channels: int, ratio: int) -> None:
        super().__init__()
        self.sep_conv = SepConv(plan, channels)
        self.expand = spike_conv(plan, channels, ratio * channels, kernel=3)
        self.project = spike_conv(plan, ratio * channels, channels, kernel=3)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [N, C, H, W] -> the same shape."""
        x = x + self.sep_conv(x)
        y: Tensor = x + self.project(self.expand(x))
        return y


class Block2(nn.Module):
    """SNN-Block-2, eqs 2, 3, 6: Block1 with RepConv instead of both 3x3 convolutions.

    Each RepConv ends in a batch norm and is followed by another one, as published.
    """

    def __init__(self, plan: Plan, channels: int, ratio: int) -> None:
        super().__init__()
        hidden = ratio * channels
        self.sep_conv = SepConv(plan, channels)
        self.expand = SpikeConv(plan, plan.rep_conv(channels, hidden), batch_norm(hidden))
        self.project = SpikeConv(plan, plan.rep_conv(hidden, channels), batch_norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [N, C, H, W] -> the same shape."""
        x = x + self.sep_conv(x)
        y: Tensor = x + self.project(self.expand(x))
        return y


class TransformerBlock(nn.Module):
    """Block of Spike-driven Transformer V2 (Yao et al., ICLR 2024), for table 5: attention and MLP, each with residual.

    Linear attention Q (K^T V) / 8 with 8 heads. Q, K and V are outputs of neurons, which therefore feed matrix products
    instead of convolutions.
    """

    SCALE = 0.125
    MLP_RATIO = 4

    def __init__(self, plan: Plan, channels: int) -> None:
        super().__init__()
        self.sn = plan.activation()
        self.queries, self.keys, self.values = (
            ConvNorm(plan.rep_conv(channels, channels), batch_norm(channels)) for _ in range(3)
        )
        self.query_sn, self.key_sn, self.value_sn = (plan.activation() for _ in range(3))
        self.project = SpikeConv(plan, plan.rep_conv(channels, channels), batch_norm(channels))
        hidden = self.MLP_RATIO * channels
        self.mlp_expand = spike_conv(plan, channels, hidden, bias=True)
        self.mlp_project = spike_conv(plan, hidden, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [N, C, H, W] -> the same shape."""
        spikes = self.sn(x)
        # [N, heads, C / heads, H * W]
        q = self.query_sn(self.queries(spikes)).flatten(2).unflatten(1, (ATTENTION_HEADS, -1))
        k = self.key_sn(self.keys(spikes)).flatten(2).unflatten(1, (ATTENTION_HEADS, -1))
        v = self.value_sn(self.values(spikes)).flatten(2).unflatten(1, (ATTENTION_HEADS, -1))
        attended = (v @ k.transpose(-2, -1)) @ q * self.SCALE
        x = x + self.project(attended.reshape(x.shape))
        y: Tensor = x + self.mlp_project(self.mlp_expand(x))
        return y


class SpikeSPPF(nn.Module):
    """1x1 to half the channels, three chained 5x5 max-pools of its currents, and 1x1 on all four."""

    def __init__(self, plan: Plan, in_channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = in_channels // 2
        self.reduce = spike_conv(plan, in_channels, hidden)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.merge = spike_conv(plan, 4 * hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [N, C, H, W] -> [N, C', H, W]."""
        steps = [self.reduce(x)]
        for _ in range(3):
            steps.append(self.pool(steps[-1]))
        y: Tensor = self.merge(torch.cat(steps, dim=1))
        return y


class Stem(ConvNorm):
    """The first convolution, on analogue images; with bias and without a neuron before it.

    A static image passes once and is then the current at each of the configured T steps. The stem comes first, so it
    tells the network's other blocks how many steps there are.
    """

    def __init__(self, plan: Plan, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        padding = -(-(kernel - stride) // 2)
        super().__init__(nn.Conv2d(in_channels, out_channels, kernel, stride, padding), batch_norm(out_channels))
        self.timesteps = plan.timesteps
        self.steps = plan.steps

    def forward(self, images: Tensor) -> Tensor:
        """Encode images: [B, C, H, W] or [T, B, C, H, W] -> [T * B, C', H / stride, W / stride]."""
        timesteps = images.shape[0] if images.ndim == 5 else self.timesteps
        if self.steps.count != timesteps:  # else nothing changes, which torch.export would refuse
            self.steps.count = timesteps
        if images.ndim == 5:
            return super().forward(images.flatten(0, 1))
        x = super().forward(images)
        return x if self.timesteps == 1 else x.expand(self.timesteps, *x.shape).flatten(0, 1)


def check_yolo_images(images: Tensor, in_channels: int, stride: int) -> None:
    """Check that images, or any number of frames, fit the network.

    Raises:
        ValueError: number of dimensions, type, channels or sides of `images` do not fit; sides must be multiples of the
            largest stride.
    """
    check_images(images, in_channels)
    if images.shape[-2] % stride or images.shape[-1] % stride:
        raise ValueError(
            f"images: sides are {images.shape[-2]}x{images.shape[-1]}, expected multiples of {stride}, the largest "
            "stride; resize or pad the images"
        )
