"""Gates: values, exact gradients and those of the formulas as written, and what BSG* can become."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import surrogate
from torch import Tensor

from spikefleet_models.gates import Gate, GateGradient, LearnedGate, build_gate

H = torch.tensor([0.0, 0, 1, 1]).view(4, 1, 1, 1, 1)
X = torch.tensor([0.0, 1, 0, 1]).view(4, 1, 1, 1, 1)

FORMS = ["forward", "reference_forward"]
GRADIENTS = ["literal", "exact"]
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
@pytest.mark.parametrize("form", FORMS)
def test_four_value_pairs_as_the_formula_is_written(name: str, form: str) -> None:
    y, grad_h, grad_x = gradients(getattr(Gate(name, "literal"), form), H, X)
    assert y.flatten().tolist() == TRUTH[name]
    assert grad_h.flatten().tolist() == TO_H[name]
    assert grad_x.flatten().tolist() == TO_X[name]


def discrete_derivatives(gate: Gate | LearnedGate, form: str) -> tuple[list[float], list[float]]:
    """Y(H=1) - Y(H=0) and Y(X=1) - Y(X=0) at the four pairs, from the forward alone."""
    function = getattr(gate, form)
    with torch.no_grad():
        to_h = function(torch.ones_like(H), X) - function(torch.zeros_like(H), X)
        to_x = function(H, torch.ones_like(X)) - function(H, torch.zeros_like(X))
    return to_h.flatten().tolist(), to_x.flatten().tolist()


def assert_discrete_derivatives(gate: Gate | LearnedGate, form: str) -> None:
    _, grad_h, grad_x = gradients(getattr(gate, form), H, X)
    to_h, to_x = discrete_derivatives(gate, form)
    assert grad_h.flatten().tolist() == to_h
    assert grad_x.flatten().tolist() == to_x


@pytest.mark.parametrize("name", list(TRUTH))
@pytest.mark.parametrize("form", FORMS)
def test_exact_gradients_are_discrete_derivatives(name: str, form: str) -> None:
    assert_discrete_derivatives(Gate(name, "exact"), form)


@pytest.mark.parametrize("form", FORMS)
def test_the_literal_gradient_of_bsg_is_no_discrete_derivative(form: str) -> None:
    with pytest.raises(AssertionError):
        assert_discrete_derivatives(Gate("bsg", "literal"), form)
    with pytest.raises(AssertionError):
        assert_discrete_derivatives(learned(1.0, 0.0), form)


@settings(deadline=None)
@given(weight=st.floats(-4, 4, width=32), bias=st.floats(-4, 4, width=32), threshold=st.floats(0.0625, 1, width=32))
def test_exact_gradients_of_the_learned_gate_are_discrete_derivatives(
    weight: float, bias: float, threshold: float
) -> None:
    for form in FORMS:
        assert_discrete_derivatives(learned(weight, bias, threshold, "exact"), form)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", list(TRUTH))
def test_lean_equals_formula_on_random_spikes(name: str, gradient: GateGradient) -> None:
    gate = Gate(name, gradient)
    h, x = (torch.rand(4, 2, 3, 5, 5) < 0.5).float(), (torch.rand(4, 2, 3, 5, 5) < 0.5).float()
    upstream = torch.randn_like(h)
    for ours, formula in zip(
        gradients(gate, h, x, upstream), gradients(gate.reference_forward, h, x, upstream), strict=True
    ):
        assert torch.equal(ours, formula)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["bsg", "bsg_star", "iand", "add"])
def test_silence_of_the_residual_is_identity(name: str, gradient: GateGradient) -> None:
    gate = build_gate(name, 1, 0.5, surrogate.ATan(), gradient)
    x = (torch.rand(4, 2, 1, 3, 3) < 0.5).float()
    y, _, grad_x = gradients(gate, torch.zeros_like(x), x)
    assert torch.equal(y, x)
    assert torch.equal(grad_x, torch.ones_like(x))


def test_and_passes_the_shortcut_when_the_residual_always_fires() -> None:
    x = (torch.rand(4, 2, 1, 3, 3) < 0.5).float()
    assert torch.equal(Gate("and")(torch.ones_like(x), x), x)


def learned(weight: float, bias: float, threshold: float = 0.5, gradient: GateGradient = "literal") -> LearnedGate:
    gate = LearnedGate(1, threshold, surrogate.ATan(alpha=2.0), gradient)
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


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_learned_gate_gradients_equal_the_formula(threshold: float, gradient: GateGradient) -> None:
    torch.manual_seed(0)
    h, x = (torch.rand(4, 2, 6, 5, 5) < 0.5).float(), (torch.rand(4, 2, 6, 5, 5) < 0.5).float()
    upstream = torch.randn_like(h)
    gate = LearnedGate(6, threshold, surrogate.ATan(), gradient)
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


def test_parameters_of_the_learned_gate_get_the_same_gradient_in_both_forms() -> None:
    """W and B keep the surrogate; only dY/dH differs."""
    torch.manual_seed(0)
    h, x = (torch.rand(4, 2, 1, 5, 5) < 0.5).float(), (torch.rand(4, 2, 1, 5, 5) < 0.5).float()
    upstream = torch.randn_like(h)
    literal, exact = learned(0.9, 0.1), learned(0.9, 0.1, gradient="exact")
    (_, literal_h, literal_x), (_, exact_h, exact_x) = (gradients(gate, h, x, upstream) for gate in (literal, exact))
    assert torch.equal(literal.weight.grad, exact.weight.grad)  # type: ignore[arg-type]
    assert torch.equal(literal.bias.grad, exact.bias.grad)  # type: ignore[arg-type]
    assert torch.equal(literal_x, exact_x)
    assert not torch.equal(literal_h, exact_h)


def saved_by(function: Callable[[Tensor, Tensor], Tensor], h: Tensor, x: Tensor) -> set[int]:
    """Addresses of the distinct activations that autograd keeps."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        function(h, x)
    return {t.data_ptr() for t in saved if t.numel() == h.numel()}


@pytest.mark.parametrize("name", [*TRUTH, "bsg_star"])
def test_gates_save_no_more_than_their_inputs_and_no_more_for_exact_gradients(name: str) -> None:
    h, x = torch.ones(4, 2, 3, 5, 5, requires_grad=True), torch.ones(4, 2, 3, 5, 5, requires_grad=True)
    kept = set() if name == "add" else {h.data_ptr(), x.data_ptr()}
    literal, exact = (build_gate(name, 3, 0.5, surrogate.ATan(), gradient) for gradient in ("literal", "exact"))
    assert saved_by(literal, h, x) == saved_by(exact, h, x) == kept
    in_reference = len(saved_by(literal.reference_forward, h, x))
    assert len(saved_by(exact.reference_forward, h, x)) <= in_reference
    assert name == "add" or in_reference >= 2


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_the_learned_gate_are_summed_in_fp64_where_the_network_is_fp64(gradient: GateGradient) -> None:
    """A sum in fp32 would lose what a thousand small terms add up to."""
    torch.manual_seed(0)
    gate = build_gate("bsg_star", 2, 0.5, surrogate.ATan(), gradient).double()
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
