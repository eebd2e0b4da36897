"""Gates: values, gradients as the formulas are written, and what BSG* can become."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import surrogate
from torch import Tensor

from spikefleet_models.gates import Gate, LearnedGate, build_gate

H = torch.tensor([0.0, 0, 1, 1]).view(4, 1, 1, 1, 1)
X = torch.tensor([0.0, 1, 0, 1]).view(4, 1, 1, 1, 1)

TRUTH = {"bsg": [0, 1, 1, 1], "add": [0, 1, 1, 2], "and": [0, 0, 0, 1], "iand": [0, 1, 0, 0]}
TO_H = {"bsg": [0, -1, 2, 1], "add": [1, 1, 1, 1], "and": [0, 1, 0, 1], "iand": [0, -1, 0, -1]}
TO_X = {"bsg": [1, 1, 0, 0], "add": [1, 1, 1, 1], "and": [0, 0, 1, 1], "iand": [1, 1, 0, 0]}


def gradients(
    function: Callable[[Tensor, Tensor], Tensor], h: Tensor, x: Tensor, upstream: Tensor | float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    h, x = h.clone().requires_grad_(), x.clone().requires_grad_()
    y = function(h, x)
    (y * upstream).sum().backward()
    assert h.grad is not None
    assert x.grad is not None
    return y.detach(), h.grad, x.grad


@pytest.mark.parametrize("name", list(TRUTH))
@pytest.mark.parametrize("form", ["forward", "reference_forward"])
def test_four_value_pairs(name: str, form: str) -> None:
    y, grad_h, grad_x = gradients(getattr(Gate(name), form), H, X)
    assert y.flatten().tolist() == TRUTH[name]
    assert grad_h.flatten().tolist() == TO_H[name]
    assert grad_x.flatten().tolist() == TO_X[name]


def test_bsg_gradient_is_not_that_of_or_written_otherwise() -> None:
    _, grad_h, _ = gradients(lambda h, x: h + x - h * x, H, X)
    assert grad_h.flatten().tolist() != TO_H["bsg"]


@pytest.mark.parametrize("name", list(TRUTH))
def test_lean_equals_formula_on_random_spikes(name: str) -> None:
    h, x = (torch.rand(4, 2, 3, 5, 5) < 0.5).float(), (torch.rand(4, 2, 3, 5, 5) < 0.5).float()
    upstream = torch.randn_like(h)
    for ours, formula in zip(
        gradients(Gate(name), h, x, upstream), gradients(Gate(name).reference_forward, h, x, upstream), strict=True
    ):
        assert torch.equal(ours, formula)


@pytest.mark.parametrize("name", ["bsg", "bsg_star", "iand", "add"])
def test_silence_of_the_residual_is_identity(name: str) -> None:
    gate = build_gate(name, 1, 0.5, surrogate.ATan())
    x = (torch.rand(4, 2, 1, 3, 3) < 0.5).float()
    y, _, grad_x = gradients(gate, torch.zeros_like(x), x)
    assert torch.equal(y, x)
    assert torch.equal(grad_x, torch.ones_like(x))


def test_and_passes_the_shortcut_when_the_residual_always_fires() -> None:
    x = (torch.rand(4, 2, 1, 3, 3) < 0.5).float()
    assert torch.equal(Gate("and")(torch.ones_like(x), x), x)


def learned(weight: float, bias: float, threshold: float = 0.5) -> LearnedGate:
    gate = LearnedGate(1, threshold, surrogate.ATan(alpha=2.0))
    torch.nn.init.constant_(gate.weight, weight)
    torch.nn.init.constant_(gate.bias, bias)
    return gate


FUNCTIONS = {"or": [0, 1, 1, 1], "and": [0, 0, 0, 1], "x": [0, 1, 0, 1], "h": [0, 0, 1, 1]}


@settings(deadline=None)
@given(weight=st.floats(-4, 4, width=32), bias=st.floats(-4, 4, width=32), threshold=st.floats(0.0625, 1, width=32))
def test_learned_gate_is_always_one_of_four_functions(weight: float, bias: float, threshold: float) -> None:
    y = learned(weight, bias, threshold)(H, X)
    assert sum(y.flatten().tolist() == table for table in FUNCTIONS.values()) == 1


@pytest.mark.parametrize(
    ("weight", "bias", "function"), [(1.0, 0.0, "or"), (-1.0, 1.0, "and"), (0.0, 0.0, "x"), (0.0, 1.0, "h")]
)
def test_learned_gate_reaches_all_four(weight: float, bias: float, function: str) -> None:
    assert learned(weight, bias)(H, X).flatten().tolist() == FUNCTIONS[function]


def test_learned_gate_starts_as_bsg() -> None:
    gate = build_gate("bsg_star", 3, 0.5, surrogate.ATan())
    assert gate.weight.tolist() == [1.0] * 3
    assert gate.bias.tolist() == [0.0] * 3
    assert gate(H.expand(4, 1, 3, 1, 1), X.expand(4, 1, 3, 1, 1))[:, 0, 0].flatten().tolist() == TRUTH["bsg"]


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_learned_gate_gradients_equal_the_formula(threshold: float) -> None:
    torch.manual_seed(0)
    h, x = (torch.rand(4, 2, 6, 5, 5) < 0.5).float(), (torch.rand(4, 2, 6, 5, 5) < 0.5).float()
    upstream = torch.randn_like(h)
    gate = LearnedGate(6, threshold, surrogate.ATan())
    torch.nn.init.normal_(gate.weight)
    torch.nn.init.normal_(gate.bias)
    lean = [*gradients(gate, h, x, upstream), gate.weight.grad, gate.bias.grad]
    gate.zero_grad()
    formula = [*gradients(gate.reference_forward, h, x, upstream), gate.weight.grad, gate.bias.grad]
    assert torch.equal(lean[0], formula[0])
    for ours, theirs in zip(lean, formula, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_learned_gate_slope_at_the_start() -> None:
    # dY/dH = G + (H - X) W surrogate'(W H + B - thr); the ATan slope at +-0.5 is 0.288
    _, grad_h, _ = gradients(learned(1.0, 0.0), H, X)
    assert grad_h.flatten().tolist() == pytest.approx([0, -0.288, 1 + 0.288, 1], abs=1e-3)


def test_gates_save_their_inputs_only() -> None:
    saved: list[Tensor] = []
    h, x = torch.ones(4, 2, 3, 5, 5, requires_grad=True), torch.ones(4, 2, 3, 5, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        for name in (*TRUTH, "bsg_star"):
            build_gate(name, 3, 0.5, surrogate.ATan())(h, x)
    assert {t.data_ptr() for t in saved if t.numel() > 3} == {h.data_ptr(), x.data_ptr()}


def test_gradients_of_the_learned_gate_are_summed_in_fp64_where_the_network_is_fp64() -> None:
    """A sum in fp32 would lose what a thousand small terms add up to."""
    torch.manual_seed(0)
    gate = build_gate("bsg_star", 2, 0.5, surrogate.ATan()).double()
    h = (torch.rand(3, 8, 2, 20, 20) < 0.5).double()
    x = (torch.rand_like(h) < 0.5).double()
    weights = torch.rand_like(h)
    gradients = []
    for forward in (gate, gate.reference_forward):
        gate.zero_grad()
        (forward(h, x) * weights).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in gate.parameters()])
    for lean, reference in zip(*gradients, strict=True):
        assert lean.dtype == torch.float64
        torch.testing.assert_close(lean, reference, rtol=1e-13, atol=1e-13)
