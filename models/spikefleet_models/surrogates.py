"""Surrogate gradients by name: SpikingJelly's, and the tanh-shaped one of Dspike.

A surrogate gradient replaces the derivative of a spike s = Theta(x), x = h - V_th, which is zero or infinite. `alpha`
sets its width; `neuron_config.DEFAULT_ALPHA` has the value that each has in SpikingJelly. At these values the peaks are

    1      atan, sigmoid, piecewise_quadratic (the triangle), soft_sign, super_spike, rect
    1.13   erf
    0.5    piecewise_exp
    1.66   dspike

A gradient that passes n spiking layers is multiplied by n surrogates. Where many currents are near the threshold, a
peak well above 1 makes it explode towards the first layer, and a narrow window makes it vanish: models/README.md has
what networks of 18 and 34 layers show of each.
"""

import math
from typing import Any

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikefleet_models.neuron_config import NeuronConfig


class _DspikeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return (x >= 0).to(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return Dspike.backward(grad_outputs[0], ctx.saved_tensors[0], ctx.alpha), None


class Dspike(surrogate.SurrogateFunctionBase):
    """A tanh cut to a window of width 1, whose integral is 1 whatever its temperature alpha.

    Li et al., "Differentiable spike: rethinking gradient-descent for training spiking neural networks", NeurIPS 2021;
    with temperature 3 and V_th 0.5 in the code that precedes Guo et al., NeurIPS 2024:

        ds/dx = alpha (1 - tanh^2(alpha x)) / (2 tanh(alpha / 2))   for |x| <= 1/2, else 0
    """

    def __init__(self, alpha: float = 3.0, spiking: bool = True) -> None:
        super().__init__(spiking=spiking, alpha=alpha)

    @staticmethod
    def spiking_function(x: Tensor, alpha: float) -> Tensor:
        """Theta(x), with the surrogate gradient."""
        spikes: Tensor = _DspikeFunction.apply(x, alpha)
        return spikes

    @staticmethod
    def primitive_function(x: Tensor, alpha: float) -> Tensor:
        """The function, from 0 to 1, whose derivative the surrogate gradient is."""
        return (torch.tanh(alpha * x.clamp(-0.5, 0.5)) / math.tanh(alpha / 2) + 1) / 2

    @staticmethod
    def backward(grad_output: Tensor, x: Tensor, alpha: float) -> Tensor:
        """dL/dx from dL/ds."""
        slope = torch.tanh(alpha * x).square_().neg_().add_(1).mul_(alpha / (2 * math.tanh(alpha / 2)))
        return slope.mul_(x.abs() <= 0.5).mul_(grad_output)


SURROGATES: dict[str, type[surrogate.SurrogateFunctionBase]] = {
    "atan": surrogate.ATan,
    "sigmoid": surrogate.Sigmoid,
    "piecewise_quadratic": surrogate.PiecewiseQuadratic,
    "piecewise_exp": surrogate.PiecewiseExp,
    "soft_sign": surrogate.SoftSign,
    "super_spike": surrogate.SuperSpike,
    "erf": surrogate.Erf,
    "rect": surrogate.Rect,
    "dspike": Dspike,
}


def build_surrogate(config: NeuronConfig) -> surrogate.SurrogateFunctionBase:
    """Build the surrogate function of a neuron's configuration."""
    return SURROGATES[config.surrogate](alpha=config.alpha)
