"""Surrogate gradients: their defaults and peaks, and Dspike against the derivative of its own function."""

import inspect
from typing import get_args

import pytest
import torch
from torch import Tensor

from spikefleet_models import build_model, model_config
from spikefleet_models.gates import LearnedGate
from spikefleet_models.neuron_config import DEFAULT_ALPHA, NeuronConfig
from spikefleet_models.neurons import build_neuron, spiking_nodes
from spikefleet_models.surrogates import SURROGATES, Dspike, build_surrogate

PEAKS = {
    "atan": 1.0,
    "sigmoid": 1.0,
    "piecewise_quadratic": 1.0,
    "piecewise_exp": 0.5,
    "soft_sign": 1.0,
    "super_spike": 1.0,
    "erf": 1.1284,
    "rect": 1.0,
    "dspike": 1.6572,
}


def slopes(config: NeuronConfig) -> tuple[Tensor, Tensor]:
    """Distances from the threshold, and the gradient of the spike there."""
    x = torch.linspace(-4, 4, 80_001, dtype=torch.float64, requires_grad=True)
    build_surrogate(config)(x).sum().backward()
    assert x.grad is not None
    return x.detach(), x.grad


def test_there_is_a_default_for_every_name() -> None:
    names = set(get_args(NeuronConfig.model_fields["surrogate"].annotation))
    assert names == set(SURROGATES) == set(DEFAULT_ALPHA) == set(PEAKS)


@pytest.mark.parametrize("name", list(SURROGATES))
def test_without_alpha_a_surrogate_has_its_own_default(name: str) -> None:
    own = inspect.signature(SURROGATES[name].__init__).parameters["alpha"].default
    for config in (NeuronConfig(surrogate=name), NeuronConfig(surrogate=name, alpha=None)):
        assert config.alpha == own
        assert config.model_dump()["alpha"] == own
        assert build_neuron(config).surrogate_function.alpha == own
    assert NeuronConfig(surrogate=name, alpha=own + 0.5).alpha == own + 0.5


@pytest.mark.parametrize("name", list(SURROGATES))
def test_peaks(name: str) -> None:
    x, slope = slopes(NeuronConfig(surrogate=name))
    assert slope.max().item() == pytest.approx(PEAKS[name], abs=1e-4)
    assert x[slope.argmax()].abs() < 0.51  # a rectangle has its peak everywhere
    assert slope.min() >= 0


def test_the_peak_of_a_triangle_is_its_alpha() -> None:
    """The default of 2 that every surrogate had made the gradient explode at depth."""
    assert slopes(NeuronConfig(surrogate="piecewise_quadratic", alpha=2.0))[1].max().item() == pytest.approx(2.0)


def test_alpha_reaches_neurons_and_gates() -> None:
    neuron = {"surrogate": "rect", "alpha": 0.7}
    network = build_model(model_config("sg_resnet_tiny", connection="bsg_star", neuron=neuron))
    assert {node.surrogate_function.alpha for node in spiking_nodes(network).values()} == {0.7}
    gates = [module for module in network.modules() if isinstance(module, LearnedGate)]
    assert {gate.surrogate_function.alpha for gate in gates} == {0.7}


@pytest.mark.parametrize("alpha", [0.5, 3.0, 10.0])
def test_dspike_is_the_derivative_of_its_function(alpha: float) -> None:
    x = torch.linspace(-0.499, 0.499, 999, dtype=torch.float64, requires_grad=True)
    Dspike.primitive_function(x, alpha).sum().backward()
    assert x.grad is not None
    given = Dspike.backward(torch.ones_like(x), x.detach(), alpha)
    torch.testing.assert_close(given, x.grad, rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(Dspike.backward(torch.ones_like(x), x.detach(), alpha * 1.01), x.grad)


def test_dspike_is_cut_to_a_window_of_width_one_and_has_integral_one() -> None:
    x, slope = slopes(NeuronConfig(surrogate="dspike"))
    assert not slope[x.abs() > 0.5].any()
    assert slope[x.abs() < 0.5].min() > 0.2
    assert torch.trapezoid(slope, x).item() == pytest.approx(1.0, abs=1e-3)
    function = build_surrogate(NeuronConfig(surrogate="dspike"))
    assert function(torch.tensor([-1e-6, 0.0, 1.0])).tolist() == [0.0, 1.0, 1.0]
    function.set_spiking_mode(False)
    assert function(torch.tensor([-2.0, 0.0, 2.0])).tolist() == [0.0, 0.5, 1.0]


def test_dspike_scales_the_incoming_gradient_and_keeps_its_type() -> None:
    x = torch.tensor([-0.6, 0.0, 0.2], dtype=torch.bfloat16)
    given = Dspike.backward(torch.tensor([5.0, -2.0, 0.5], dtype=torch.bfloat16), x, 3.0)
    assert given.dtype == torch.bfloat16
    assert given.tolist() == pytest.approx([0.0, -2 * 1.657, 0.5 * 1.657 * 0.7116], rel=2e-2)
