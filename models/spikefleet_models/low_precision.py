"""Inference with weights in bf16 or int8: spikes are exact in both, so nothing is rounded but weights.

What a neuron emits, 0 and 1 or I-LIF's integers up to D, is an integer that bf16 holds up to 256 and uint8 up to 255.
A layer on spikes therefore needs no calibration and has no error of activations:

    int8   w = s_o q, q = round(w / s_o) in [-127, 127], s_o = max |w| / 127 of output channel o
           currents = s_o (sum of q n) + bias: the sum is an integer and exact, in any order and on any device
    bf16   weights, and once each layer's sum, in bf16; biases, membranes and residual sums stay fp32

Layers on real values (the first one, decoders, RetinaNet's pyramid) stay fp32. `rounded` gives the same weights in
plain layers, which proofs, energy cards and exports read.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.operation_counts import count_operations, on_meta
from spikefleet_models.slots import Layer

Precision = Literal["fp32", "bf16", "int8"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_LARGEST = {"bf16": 256, "int8": 255}
"""The largest activation that is exact."""
_LARGEST_WEIGHT = 127
_EXACT_IN_FP32 = 2**24
_LARGEST_WITHOUT_VNNI = 128
"""Without VNNI two products are added up in 16 bits."""
_SIDE = 256
"""Of the image that finds out what feeds each layer; it is not computed on."""


class Int8Layer(nn.Module):
    """A convolution or linear layer on integers, with int8 weights and one scale per output channel.

    The CPU's int8 convolution runs where it applies; elsewhere the same integers are added up in floating point, which
    gives the same bits.

    Args:
        layer: with weights in fp32 or fp64.
        bound: the largest integer in its input.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: Layer, bound: int) -> None:
        super().__init__()
        integers, scale = _int8(layer.weight.detach())
        self.register_buffer("weight", integers)
        self.register_buffer("scale", scale)
        self.bias = layer.bias
        self.bound = bound
        self._weigh, self._bias_shape = _weighing(layer)
        self._convolution = _geometry(layer) if isinstance(layer, nn.Conv2d) else None
        self._packed: tuple[torch.Size, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Integers [N, ...] -> currents [N, ...] in the type of the input; in fp32 at least."""
        if x.device.type == "cpu" and x.dtype != torch.float64 and self._has_kernel():
            return self._int8_convolution(x)
        largest_sum = self.bound * _LARGEST_WEIGHT * self.weight[0].numel()
        wide = torch.float32 if largest_sum <= _EXACT_IN_FP32 else torch.float64
        sums = self._weigh(x.to(wide), self.weight.to(wide)).to(torch.promote_types(x.dtype, torch.float32))
        currents = sums.mul_(self.scale.to(sums.dtype).view(self._bias_shape))
        return currents if self.bias is None else currents.add_(self.bias.view(self._bias_shape))

    def _has_kernel(self) -> bool:
        if self._convolution is None or not _kernel_is_exact():
            return False
        return self.bound <= _LARGEST_WITHOUT_VNNI or torch.cpu._is_vnni_supported()

    def _int8_convolution(self, x: Tensor) -> Tensor:
        geometry = self._convolution
        assert geometry is not None
        scale = self.scale.float()
        # The layout of packed weights may depend on the size of the image.
        if self._packed is None or self._packed[0] != x.shape[2:]:
            packed = _int8_ops().qconv_prepack(self.weight, scale, 1.0, 0, *geometry, list(x.shape))
            self._packed = (x.shape[2:], packed)
        integers = x.to(torch.uint8, memory_format=torch.channels_last)
        return _convolve(integers, self._packed[1], scale, self.bias, geometry)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        """The shape of the weight, and D."""
        return f"weight={tuple(self.weight.shape)}, bound={self.bound}"


class Bf16Layer(nn.Module):
    """A convolution or linear layer on integers up to 256, with weights in bf16 and the bias in fp32."""

    weight: Tensor

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.detach().to(torch.bfloat16))
        self.bias = layer.bias
        self._weigh, self._bias_shape = _weighing(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Integers [N, ...] -> currents [N, ...] in the type of the input; in fp32 at least."""
        sums = self._weigh(x.to(torch.bfloat16), self.weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        return sums.to(wide) if self.bias is None else sums + self.bias.to(wide).view(self._bias_shape)

    def extra_repr(self) -> str:
        """The shape of the weight."""
        return f"weight={tuple(self.weight.shape)}"


@dataclass(frozen=True)
class SpikeDifference:
    """Integers that neurons emit otherwise with rounded weights, each network on its own currents."""

    differing: int
    emitted: int
    """Integers compared."""

    @property
    def share(self) -> float:
        """Share of the integers that differ."""
        return self.differing / self.emitted if self.emitted else 0.0


@dataclass(frozen=True)
class PackedWeight:
    """A weight as a file keeps it."""

    values: Tensor
    """int8 or bf16, in the shape of the weight."""
    scale: Tensor | None
    """fp32 [O]: the weight is values * scale; None for bf16."""


def packed_weights(deployed: nn.Module, precision: Precision) -> dict[str, PackedWeight]:
    """The rounded weights of a deployed network, in the small type, by the names of their layers.

    Raises:
        ValueError: as `with_precision`.
    """
    found = {}
    for name in _layers_on_integers(deployed, precision):
        weight = deployed.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        values, scale = (weight.detach().to(torch.bfloat16), None) if precision == "bf16" else _int8(weight.detach())
        found[name] = PackedWeight(values, scale)
    return found


def rounded(deployed: nn.Module, precision: Precision) -> nn.Module:
    """Copy a deployed network with the weights of a precision, as plain layers in its own type.

    Args:
        deployed: `reparam.deploy(network)`; not changed.
        precision: "fp32" changes nothing.

    Raises:
        ValueError: as `with_precision`.
    """
    network = copy.deepcopy(deployed)
    if check_precision(precision) == "fp32":
        return network
    for name in _layers_on_integers(network, precision):
        layer = network.get_submodule(name)
        assert isinstance(layer, Layer)
        layer.weight = nn.Parameter(_rounded_weight(layer.weight.detach(), precision), requires_grad=False)
    return network


def with_precision(deployed: nn.Module, precision: Precision) -> nn.Module:
    """Copy a deployed network with layers that compute in a precision where spikes feed them.

    Args:
        deployed: `reparam.deploy(network)`; not changed.
        precision: "fp32" changes nothing.

    Raises:
        ValueError: there is no such precision, or spikes feed no layer of the network, as of an ANN twin.
    """
    network = copy.deepcopy(deployed)
    if check_precision(precision) == "fp32":
        return network
    replaced: dict[nn.Module, nn.Module] = {}
    for name, bound in _layers_on_integers(network, precision).items():
        layer = network.get_submodule(name)
        assert isinstance(layer, Layer)
        replaced[layer] = Int8Layer(layer, bound) if precision == "int8" else Bf16Layer(layer)
    for module in list(network.modules()):
        for name, child in list(module._modules.items()):
            if child in replaced:
                setattr(module, name, replaced[child])
    return network


def check_precision(precision: str) -> Precision:
    """Return a precision that there is.

    Raises:
        ValueError: there is no such precision.
    """
    for known in PRECISIONS:
        if precision == known:
            return known
    raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")


@torch.no_grad()
def compare_spikes(exact: nn.Module, other: nn.Module, images: Tensor) -> SpikeDifference:
    """Count the integers that the neurons of two forms of a network emit differently.

    Args:
        exact: a deployed network in eval mode.
        other: the same network in another precision.
        images: images [B, C, H, W] or frames [T, B, C, H, W].
    """
    kept: dict[str, list[Tensor]] = {}
    differing = emitted = 0

    def keep(name: str, found: Tensor) -> None:
        kept.setdefault(name, []).append(found.to(torch.uint8))

    def compare(name: str, found: Tensor) -> None:
        nonlocal differing, emitted
        differing += int((kept[name].pop(0) != found.to(torch.uint8)).sum())
        emitted += found.numel()

    for network, see in ((exact, keep), (other, compare)):
        handles = [
            node.register_forward_hook(partial(_show, see, name)) for name, node in spiking_nodes(network).items()
        ]
        try:
            network(images)
        finally:
            for handle in handles:
                handle.remove()
    return SpikeDifference(differing, emitted)


def _show(see: Callable[[str, Tensor], None], name: str, module: nn.Module, args: Any, emitted: Tensor) -> None:
    see(name, emitted)


def _layers_on_integers(network: nn.Module, precision: Precision) -> dict[str, int]:
    """Layers whose input is integers that the precision holds, each with the largest one.

    Raises:
        ValueError: there is none.
    """
    channels = getattr(getattr(network, "config", None), "in_channels", None)
    if channels is None:
        raise ValueError("the network has no config.in_channels to make an image from; deploy it with precision='fp32'")
    bare = on_meta(network)
    image = torch.empty((1, channels, _SIDE, _SIDE), dtype=next(network.parameters()).dtype, device="meta")
    found: dict[str, int] = {}
    real: set[str] = set()
    for count in count_operations(bare, [image], measure=False).layers:
        if not isinstance(network.get_submodule(count.layer), Layer):
            continue
        exact = (count.spike_fed or count.integer_fed) and 0 < count.bound <= _LARGEST[precision]
        if exact and count.layer not in real:
            found[count.layer] = max(count.bound, found.get(count.layer, 0))
        else:
            real.add(count.layer)
            found.pop(count.layer, None)
    if not found:
        raise ValueError(
            f"spikes feed no layer of {type(network).__name__}, so precision={precision!r} would round nothing; "
            "use fp32"
        )
    return found


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [O, ...] and their scale [O] in fp32."""
    wide = weight.double()
    largest = wide.flatten(1).abs().amax(1)
    scale = (largest / _LARGEST_WEIGHT).float()
    scale[scale == 0] = 1.0  # a channel of zeros, or so small that fp32 has no such scale
    integers = (wide / scale.double().view(-1, *[1] * (weight.ndim - 1))).round()
    return integers.clamp(-_LARGEST_WEIGHT, _LARGEST_WEIGHT).to(torch.int8), scale


def _rounded_weight(weight: Tensor, precision: Precision) -> Tensor:
    if precision == "bf16":
        return weight.to(torch.bfloat16).to(weight.dtype)
    integers, scale = _int8(weight)
    return (integers.double() * scale.double().view(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)


def _weighing(layer: Layer) -> tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]:
    """The product of a layer without its bias, and the shape of a value per output channel beside its result."""
    if not isinstance(layer, nn.Conv2d):
        return F.linear, (-1,)
    if layer.padding_mode != "zeros":
        raise ValueError(f"padding_mode={layer.padding_mode!r} has no form in low precision; use 'zeros'")
    geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    return partial(F.conv2d, **geometry), (-1, 1, 1)


_Geometry = tuple[list[int], list[int], list[int], int]
"""Stride, padding, dilation, groups."""


def _geometry(layer: nn.Conv2d) -> _Geometry | None:
    if isinstance(layer.padding, str):
        return None
    return list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups


def _int8_ops() -> Any:
    return torch.ops.onednn


def _convolve(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    convolved: Tensor = _int8_ops().qconv2d_pointwise(
        x, 1.0, 0, packed, scale, zeros, bias, *geometry, 1.0, 0, torch.float32, "none", [], ""
    )
    return convolved


@cache
def _kernel_is_exact() -> bool:
    """Whether torch has its int8 convolution here, and it gives the bits of the plain form; found out once."""
    try:
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(0, 129, (2, 40, 6, 6), generator=generator).float()
        weight = torch.randint(-127, 128, (24, 40, 3, 3), generator=generator).to(torch.int8)
        weight[0], x[0] = 127, 128.0
        scale, bias = torch.rand(24, generator=generator), torch.randn(24, generator=generator)
        geometry: _Geometry = ([1, 1], [1, 1], [1, 1], 1)
        packed = _int8_ops().qconv_prepack(weight, scale, 1.0, 0, *geometry, list(x.shape))
        integers = x.to(torch.uint8, memory_format=torch.channels_last)
        found = _convolve(integers, packed, scale, bias, geometry)
        sums = F.conv2d(x, weight.float(), padding=1)
        return torch.equal(found, sums.mul_(scale.view(-1, 1, 1)).add_(bias.view(-1, 1, 1)))
    except (AttributeError, RuntimeError):
        return False
