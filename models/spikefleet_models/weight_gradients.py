"""Weight gradients of convolutions in bf16 autocast on a CPU, computed otherwise than by torch where that is faster.

    use_weight_gradients(network, fastest_form())

The forward pass and the gradient of the input are torch's, to the last bit; state dicts do not change. A form is a
fixed rule over shapes, so that a training repeats its bits:

    form     for CPUs               what it computes
    torch    all others             nothing: torch's own bf16 kernel
    bf16     with AMX               columns of the input times gradient, as one bf16 product: kernel 1, or output
                                    planes up to 8x8
    fp32     Intel's with bf16      the same product on fp32 copies: planes up to 4x4, or kernel 1 up to 8x8;
             and without AMX        torch's fp32 kernel on fp32 copies: larger kernels on larger planes

All of them add up in fp32 and round the result to bf16 once. The measurements behind the rules are in
models/README.md. Torch's kernel stays for biases, groups, dilation, padding other than zeros, fewer than 16 channels,
tensors that are not channels_last, weights without a gradient, `torch.compile`, and products whose columns are more
than 64 M numbers.
"""

import os
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WeightGradients = Literal["torch", "bf16", "fp32"]

CHOICE = "SPIKEFLEET_WEIGHT_GRADIENTS"
"""Environment variable that chooses the form; without it the one for this CPU."""

_FEWEST_CHANNELS = 16
_MOST_COLUMNS = 2**26

aten = torch.ops.aten


def chosen_form() -> WeightGradients:
    """The form that new trainings in bf16 on this CPU should use, by SPIKEFLEET_WEIGHT_GRADIENTS, or the fastest.

    Raises:
        ValueError: SPIKEFLEET_WEIGHT_GRADIENTS names no form.
    """
    chosen = os.environ.get(CHOICE, "").strip()
    if not chosen:
        return fastest_form()
    if chosen not in get_args(WeightGradients):
        raise ValueError(f"{CHOICE} is {chosen!r}, expected one of {', '.join(get_args(WeightGradients))}")
    form: WeightGradients = chosen  # type: ignore[assignment]
    return form


@cache
def fastest_form() -> WeightGradients:
    """The form for this CPU."""
    # Torch 2.10 may not have this function, which then names nothing.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return form_for(capabilities)


def form_for(capabilities: Mapping[str, Any]) -> WeightGradients:
    """The form for a CPU.

    Args:
        capabilities: as `torch.cpu.get_capabilities` names them.
    """
    if capabilities.get("amx_bf16"):
        return "bf16"
    # Intel's cores have one unit for bf16 products and two for fp32; AMD's have twice as many bf16 products.
    without_amx = capabilities.get("avx512_bf16") and capabilities.get("avx512_fp16")
    intel = str(capabilities.get("cpu_name", "")).startswith("Intel")
    return "fp32" if without_amx and intel else "torch"


def use_weight_gradients(network: nn.Module, form: WeightGradients) -> None:
    """Choose how every nn.Conv2d of a network computes the gradient of its weights in bf16 autocast on a CPU.

    Args:
        network: changed in place. Subclasses, and layers whose forward somebody else replaced, are left alone.
        form: `torch` undoes the other forms.

    Raises:
        ValueError: there is no such form.
    """
    if form not in get_args(WeightGradients):
        raise ValueError(f"form is {form!r}, expected one of {', '.join(get_args(WeightGradients))}")
    for module in network.modules():
        if type(module) is not nn.Conv2d:
            continue
        own = vars(module).get("forward")
        if own is not None and not isinstance(own, _Forward):
            continue
        if own is not None:
            del module.forward
        if form != "torch":
            # A subclass would escape checks of the exact type, a wrapping module change names of the state dict.
            setattr(module, "forward", _Forward(module, form))  # noqa: B010


class _Geometry(NamedTuple):
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def plane(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the output for an input [N, C, H, W]."""
        height, width = (
            (size + 2 * padding - kernel) // stride + 1
            for size, kernel, stride, padding in zip(x.shape[2:], *self, strict=True)
        )
        return height, width


class _Forward:
    """The forward of a convolution."""

    def __init__(self, conv: nn.Conv2d, form: WeightGradients) -> None:
        self._conv, self._form = conv, form

    def __call__(self, x: Tensor) -> Tensor:
        conv = self._conv
        if not _differs(conv, x):
            return nn.Conv2d.forward(conv, x)
        x_bf16 = x.to(torch.bfloat16)
        geometry = _Geometry(*(_pair(size) for size in (conv.kernel_size, conv.stride, conv.padding)))
        kind = _kind(self._form, x_bf16, conv.out_channels, geometry)
        if kind is None or not x_bf16.is_contiguous(memory_format=torch.channels_last):
            return nn.Conv2d.forward(conv, x)
        y: Tensor = _ConvolutionFunction.apply(x_bf16, conv.weight.to(torch.bfloat16), geometry, kind)
        return y


def _differs(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a call is one for the forms, so far as its shape does not decide."""
    weight = conv.weight
    differentiated = torch.is_grad_enabled() and weight.requires_grad and conv.training
    autocasts = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    strided = type(x) is Tensor and x.ndim == 4 and x.device.type == "cpu" and weight.device.type == "cpu"
    plain = conv.groups == 1 and conv.bias is None and set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    floats = {torch.float32, torch.bfloat16}
    return (
        not torch.compiler.is_compiling()
        and differentiated
        and autocasts
        and strided
        and plain
        and not isinstance(conv.padding, str)
        and x.dtype in floats
        and weight.dtype in floats
        and x.numel() > 0
        and x.shape[1] == conv.in_channels
        and min(conv.in_channels, conv.out_channels) >= _FEWEST_CHANNELS
    )


_Kind = Literal["bf16 product", "fp32 product", "fp32 kernel"]


def _kind(form: WeightGradients, x: Tensor, out_channels: int, geometry: _Geometry) -> _Kind | None:
    """How a form computes the gradient for an input; None where torch does."""
    height, width = geometry.plane(x)
    if height < 1 or width < 1:  # torch says what is wrong
        return None
    taps = geometry.kernel[0] * geometry.kernel[1]
    plane = height * width
    fits = len(x) * plane * max(taps * x.shape[1], out_channels) <= _MOST_COLUMNS
    if form == "bf16":
        return "bf16 product" if fits and (taps == 1 or plane <= 64) else None
    if fits and plane <= (64 if taps == 1 else 16):
        return "fp32 product"
    return None if taps == 1 else "fp32 kernel"


def _pair(size: Any) -> tuple[int, int]:
    first, second = size
    return int(first), int(second)


class _ConvolutionFunction(torch.autograd.Function):
    """(x, weight) -> y, all bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: _Geometry, kind: _Kind) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.kind = geometry, kind
        y: Tensor = aten.convolution(x, weight, None, geometry.stride, geometry.padding, (1, 1), False, (0, 0), 1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        with torch.autocast("cpu", enabled=False):
            grad_x = _backward(grad, x, weight, ctx.geometry, (True, False, False))[0] if needs_x else None
            grad_weight = _weight_gradient(grad, x, weight, ctx.geometry, ctx.kind) if needs_weight else None
        return grad_x, grad_weight, None, None


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's gradients of the input, the weight and the bias, those of them that the mask names."""
    stride, padding = geometry.stride, geometry.padding
    gradients: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(
        grad, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, mask
    )
    return gradients


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, kind: _Kind) -> Tensor:
    """The gradient of a weight [O, C, kh, kw], in its type and in channels_last."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    if kind == "fp32 kernel":
        wide = _backward(grad.float(), x.float(), weight.float(), geometry, (False, True, False))
        return wide[1].to(weight.dtype)
    rows = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
    columns = _columns(x, geometry, (grad.shape[2], grad.shape[3]))
    if kind == "fp32 product":  # after a stride has left out what no output sees
        rows, columns = rows.float(), columns.float()
    product = rows.t() @ columns
    return product.to(weight.dtype).view(len(weight), *geometry.kernel, -1).permute(0, 3, 1, 2)


def _columns(x: Tensor, geometry: _Geometry, plane: tuple[int, int]) -> Tensor:
    """The inputs of each output position, [N * H * W, kh * kw * C], of an input in channels_last."""
    (kernel_height, kernel_width), (down, right), (above, left) = geometry
    rows = x.permute(0, 2, 3, 1)
    if above or left:
        rows = nn.functional.pad(rows, (0, 0, left, left, above, above))
    images, line, column, channel = rows.stride()
    patches = rows.as_strided(
        (len(x), *plane, kernel_height, kernel_width, x.shape[1]),
        (images, down * line, right * column, line, column, channel),
    )
    return patches.reshape(len(x) * plane[0] * plane[1], -1)
