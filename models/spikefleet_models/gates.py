"""Connections of a residual block: how the residual spikes H and the shortcut spikes X become the block's output Y.

    BSG    Y = H * H + (1 - H) * X         Zhang et al. 2023, eq 15: the gate is H itself; on spikes, H OR X
    BSG*   Y = G * H + (1 - G) * X         eq 13, with G = Theta(W * H + B - thr), eq 14; W, B per channel
    ADD    Y = H + X                       Fang et al. 2021 (SEW ResNet); integers, not spikes
    AND    Y = H * X
    IAND   Y = (1 - H) * X

H is always spikes; X is spikes but for ADD. `gate_gradient` decides what BSG and BSG* pass back to H:

            exact                             literal
    BSG     dY/dH = 1 - X                     2H - X
    BSG*    dY/dH = G1 + (G0 - G1) * X        G + (H - X) * W * surrogate'(W * H + B - thr)

`exact` is the discrete derivative Y(H=1) - Y(H=0), the gradient of the multilinear form (for BSG, H + X - H X); G0 and
G1 are G at H = 0 and 1. `literal` is that of the formula as written: for BSG, -1 at (H=0, X=1), where H has no
influence, and 2 at (1, 0). dY/dX = 1 - G, and what W and B get through the surrogate, are the same in both. The
gradients of ADD, AND and IAND are discrete derivatives as written.

Backward saves H and X themselves: X is the input of the block's first convolution, so it is in memory anyway.
`SpikingUnit` recomputes H as well.
"""

from typing import Any, Literal

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spikefleet_models.membrane import membrane_dtype
from spikefleet_models.packed_spikes import note_spikes, noted_bound

GateName = Literal["bsg", "bsg_star", "add", "and", "iand"]

GateGradient = Literal["exact", "literal"]

SAVES_SHORTCUT = {"bsg": True, "add": False, "and": True, "iand": True}
"""Gates without parameters -> whether their backward reads X."""


def gate_forward(name: str, h: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Compute Y of a gate without parameters into `out`, which must not be `h`."""
    if name == "bsg":
        return torch.addcmul(x, x, h, value=-1.0, out=out).add_(h)
    if name == "add":
        return torch.add(h, x, out=out)
    if name == "and":
        return torch.mul(h, x, out=out)
    assert name == "iand"
    return torch.addcmul(x, x, h, value=-1.0, out=out)


def gate_backward_residual(name: str, grad: Tensor, h: Tensor, x: Tensor | None, gradient: GateGradient) -> Tensor:
    """Compute dL/dH from dL/dY; `grad` is not changed."""
    if name == "add":
        return grad
    assert x is not None
    if name == "bsg" and gradient == "exact":
        return torch.addcmul(grad, grad, x, value=-1.0)
    if name == "bsg":
        return torch.sub(h, x, out=torch.empty_like(h)).add_(h).mul_(grad)
    product = torch.mul(grad, x)
    return product if name == "and" else product.neg_()


def gate_backward_shortcut(name: str, grad: Tensor, h: Tensor, out: Tensor) -> Tensor:
    """Compute dL/dX from dL/dY into `out`."""
    if name == "add":
        return out.copy_(grad)
    if name == "and":
        return torch.mul(grad, h, out=out)
    return torch.addcmul(grad, grad, h, value=-1.0, out=out)


class _GateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, name: str, gradient: GateGradient) -> Tensor:
        ctx.name, ctx.gradient = name, gradient
        if name != "add":
            ctx.save_for_backward(h, x)
        return gate_forward(name, h, x, torch.empty_like(h))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        if ctx.name == "add":
            return grad, grad, None, None
        h, x = ctx.saved_tensors
        grad_x = gate_backward_shortcut(ctx.name, grad, h, torch.empty_like(grad))
        return gate_backward_residual(ctx.name, grad, h, x, ctx.gradient), grad_x, None, None


class Gate(nn.Module):
    """Gate without parameters (BSG, ADD, AND or IAND): (H, X) -> Y of the same shape.

    Args:
        name: of the gate.
        gradient: dY/dH of BSG, as in the module docstring; the other gates have only one.
    """

    def __init__(self, name: Literal["bsg", "add", "and", "iand"], gradient: GateGradient = "exact") -> None:
        super().__init__()
        self.name = name
        self.gradient = gradient

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """Compute Y; backward keeps H and X themselves and no product of them."""
        y: Tensor = _GateFunction.apply(h, x, self.name, self.gradient)
        note_spikes(y, gate_bound(self, noted_bound(h), noted_bound(x)))
        return y

    def reference_forward(self, h: Tensor, x: Tensor) -> Tensor:
        """Compute Y by a formula whose plain autograd gives the gradients of the module docstring."""
        if self.name == "bsg":
            return h + x - h * x if self.gradient == "exact" else h * h + (1 - h) * x
        if self.name == "add":
            return h + x
        return h * x if self.name == "and" else (1 - h) * x

    def extra_repr(self) -> str:
        """The name of the gate and, for BSG, of its gradient."""
        return f"{self.name}, gradient={self.gradient}" if self.name == "bsg" else self.name


class _LearnedGateFunction(torch.autograd.Function):
    """BSG* on H in {0, 1}: u = W H + B - thr takes two values per channel, so only H and X need saving."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gate: "LearnedGate") -> Tensor:
        ctx.gate = gate
        ctx.save_for_backward(h, x, weight, bias)
        return torch.lerp(x, h, gate.opening(h))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        h, x, weight, bias = ctx.saved_tensors
        gate: LearnedGate = ctx.gate
        opening = gate.opening(h)
        at_silence, at_spike = gate.currents(weight, bias)
        ones = torch.ones_like(bias)
        function = gate.surrogate_function
        slope_silence = function.backward(ones, at_silence, function.alpha)
        slope_spike = function.backward(ones, at_spike, function.alpha)
        # dL/du = grad * (H - X) * surrogate'(u)
        grad_u = (h - x).mul_(_per_channel(slope_silence, slope_spike, h)).mul_(grad)
        if gate.gradient == "exact":
            grad_h = gate.influence(x).mul_(grad)
        else:
            grad_h = torch.addcmul(grad * opening, grad_u, weight[:, None, None].to(h.dtype))
        grad_x = torch.addcmul(grad, grad, opening, value=-1.0)
        others = [d for d in range(h.ndim) if d != h.ndim - 3]
        wide = membrane_dtype(grad_u.dtype)
        grad_bias = grad_u.sum(others, dtype=wide)
        grad_weight = grad_u.mul_(h).sum(others, dtype=wide)
        return grad_h, grad_x, grad_weight, grad_bias, None


def _per_channel(at_silence: Tensor, at_spike: Tensor, h: Tensor) -> Tensor:
    silence = at_silence[:, None, None].to(h.dtype)
    return torch.addcmul(silence, (at_spike - at_silence)[:, None, None].to(h.dtype), h)


class LearnedGate(nn.Module):
    """BSG*: per channel it opens on spikes, on silence, always or never, so Y is H OR X, H AND X, H or X.

    Args:
        channels: C.
        threshold: thr of eq 14.
        surrogate_function: that of the network's neurons; the paper only says that the gate's gradients are surrogates.
        gradient: dY/dH, as in the module docstring.
    """

    def __init__(
        self,
        channels: int,
        threshold: float,
        surrogate_function: surrogate.SurrogateFunctionBase,
        gradient: GateGradient = "exact",
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.threshold = threshold
        self.surrogate_function = surrogate_function
        self.gradient = gradient

    def currents(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Compute u = W H + B - thr [C] at H = 0 and at H = 1, in fp32, since a 16-bit W would shift the threshold."""
        return bias - self.threshold, weight + bias - self.threshold

    def opening(self, h: Tensor) -> Tensor:
        """Compute G in {0, 1} of spikes H [..., C, H, W]."""
        at_silence, at_spike = self._openings()
        return _per_channel(at_silence, at_spike, h)

    def influence(self, x: Tensor) -> Tensor:
        """Compute Y(H=1) - Y(H=0) = G1 + (G0 - G1) X in {-1, 0, 1} of spikes X [..., C, H, W]."""
        at_silence, at_spike = self._openings()
        return _per_channel(at_spike, at_silence, x)

    def _openings(self) -> tuple[Tensor, Tensor]:
        at_silence, at_spike = self.currents(self.weight.detach(), self.bias.detach())
        return (at_silence >= 0).float(), (at_spike >= 0).float()

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """Compute Y of spikes H and X [..., C, H, W]; backward keeps H and X and nothing else."""
        y: Tensor = _LearnedGateFunction.apply(h, x, self.weight, self.bias, self)
        note_spikes(y, gate_bound(self, noted_bound(h), noted_bound(x)))
        return y

    def reference_forward(self, h: Tensor, x: Tensor) -> Tensor:
        """Compute Y by a formula whose plain autograd gives the gradients of the module docstring."""
        weight, bias = self.weight[:, None, None], self.bias[:, None, None]
        if self.gradient == "exact":
            at_silence, at_spike = (self.surrogate_function(u) for u in self.currents(weight, bias))
            return (1 - at_silence) * x + h * (at_spike + (at_silence - at_spike) * x)
        gate = self.surrogate_function(weight * h + bias - self.threshold)
        return gate * h + (1 - gate) * x

    def extra_repr(self) -> str:
        """Channels, threshold and gradient."""
        return f"channels={self.weight.numel()}, threshold={self.threshold}, gradient={self.gradient}"


def gate_bound(gate: nn.Module | None, h: int | None, x: int | None) -> int | None:
    """Largest value of Y, from those of H and X; None where one is not known, or H is not 0 and 1 as it must be."""
    if h is None or x is None:
        return None
    if isinstance(gate, Gate) and gate.name == "add":
        return h + x
    return max(h, x) if h == 1 else None


def build_gate(
    name: GateName,
    channels: int,
    threshold: float,
    surrogate_function: surrogate.SurrogateFunctionBase,
    gradient: GateGradient = "exact",
) -> Gate | LearnedGate:
    """Build the gate of a residual block with `channels` output channels."""
    if name == "bsg_star":
        return LearnedGate(channels, threshold, surrogate_function, gradient)
    return Gate(name, gradient)
