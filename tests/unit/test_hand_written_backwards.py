"""Every hand-written backward against the forward it belongs to; models/README.md has the table of them.

Oracles are finite differences where the forward is smooth, discrete differences where it is Boolean, and plain autograd
in fp64 where a surrogate stands for a derivative.
"""

import ast
import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional as F

from spikefleet_models.gates import build_gate
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import build_neuron
from spikefleet_models.shortcut import ShortcutLogits, shortcut_loss
from spikefleet_models.shortcut_config import ShortcutConfig
from spikefleet_models.spike_yolo.blocks import _PadFunction
from spikefleet_models.spiking_unit import SpikingUnit, use_implementation

MODELS = Path(__file__).parents[2] / "models"
HEADING = "## Every hand-written backward"


def autograd_functions(source: str) -> list[str]:
    """Classes that derive from torch.autograd.Function."""
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    return [
        node.name for node in classes if any(ast.unparse(base).endswith("autograd.Function") for base in node.bases)
    ]


def table() -> str:
    return (MODELS / "README.md").read_text().partition(HEADING)[2].partition("\n## ")[0]


def test_the_table_has_every_function_with_a_backward_of_its_own() -> None:
    found = [
        name for path in sorted(MODELS.rglob("*.py")) for name in autograd_functions(path.read_text(encoding="utf-8"))
    ]
    assert len(found) >= 6
    listed = table()
    assert [name for name in found if f"`{name}`" not in listed] == []


def test_the_search_for_functions_finds_one() -> None:
    assert autograd_functions("class A(torch.autograd.Function): ...\nclass B(nn.Module): ...") == ["A"]
    assert "`_NoSuchFunction`" not in table()


def test_every_test_that_the_table_names_exists() -> None:
    named = {word.strip("`,;") for word in table().split() if word.strip("`,;").startswith("test_")}
    assert len(named) >= 8
    sources = {path.name: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")}
    for name in named:
        file, _, function = name.partition("::")
        assert file in sources, name
        assert not function or f"def {function}(" in sources[file], name


# ------------------------------------------------------------------------------------------------ the unit


T, B, C, SIZE = 3, 2, 4, 5
FORMS: dict[str, dict[str, Any]] = {
    "if": {},
    "lif": {"kind": "lif", "detach_reset": False},
    "plif": {"kind": "plif", "detach_reset": False, "v_reset": None},
    "dspike": {"kind": "lif", "tau": 4 / 3, "decay_input": False, "v_threshold": 0.5, "surrogate": "dspike"},
    "post_add": {"post_add": True},
    **{
        f"{gate} {gradient}": {"gate": gate, "gradient": gradient}
        for gate, gradient in itertools.product(("bsg", "bsg_star", "add", "and", "iand"), ("literal", "exact"))
    },
}


def unit(gate: Any = None, gradient: Any = "literal", post_add: bool = False, **neuron: Any) -> SpikingUnit:
    torch.manual_seed(1)
    bn = nn.BatchNorm2d(C)
    nn.init.uniform_(bn.weight, 0.5, 2.0)
    nn.init.normal_(bn.bias)
    module = None if gate is None else build_gate(gate, C, 0.5, surrogate.ATan(), gradient)
    return SpikingUnit(bn, build_neuron(NeuronConfig(**neuron)), T, module, post_add).double()


def gradients(module: SpikingUnit) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(T * B, C, SIZE, SIZE, generator=generator, dtype=torch.float64).mul_(2).add_(1).requires_grad_()
    x = (torch.rand(T, B, C, SIZE, SIZE, generator=generator) < 0.4).double().requires_grad_()
    weights = torch.randn(T, B, C, SIZE, SIZE, generator=generator, dtype=torch.float64)
    takes_shortcut = module.gate is not None or module.post_add
    module.zero_grad()
    (module(z, x if takes_shortcut else None) * weights).sum().backward()
    found = [z.grad, *(p.grad for p in module.parameters()), *([x.grad] if takes_shortcut else [])]
    assert all(isinstance(gradient, Tensor) for gradient in found)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("form", list(FORMS))
def test_the_unit_is_plain_autograd_in_fp64(form: str, lean_form: None) -> None:
    """Of the formulas, with the surrogate for the derivative of the spike."""
    lean = unit(**FORMS[form])
    reference = copy.deepcopy(lean)
    use_implementation(reference, "reference")
    for ours, theirs in zip(gradients(lean), gradients(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_fp64_notices_a_surrogate_that_is_a_millionth_wider() -> None:
    lean, other = gradients(unit()), gradients(unit(alpha=2.000002))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(lean[0], other[0], rtol=1e-9, atol=1e-11)


def test_batch_norm_of_the_unit_is_its_derivative() -> None:
    """Finite differences through the statistics of the batch, by currents that no spike interrupts."""
    module = unit(v_threshold=1e6, surrogate="sigmoid", alpha=1e-6)
    z = torch.randn(T * B, C, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(T, B, C, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaf = z.clone().requires_grad_()
    (module(leaf) * weights).sum().backward()
    assert leaf.grad is not None

    def membranes(z: Tensor) -> Tensor:
        """sum of weights * surrogate'(0) * h[t], whose derivative the backward is while nothing fires."""
        x = F.batch_norm(z, None, None, module.bn.weight, module.bn.bias, training=True).unflatten(0, (T, B))
        slope = surrogate.Sigmoid.backward(torch.ones_like(x), x.cumsum(0) - 1e6, 1e-6).detach()
        return (x.cumsum(0) * weights * slope).sum()

    slopes = torch.zeros_like(z)
    for place in itertools.product(*map(range, z.shape)):
        step = torch.zeros_like(z)
        step[place] = 1e-4
        slopes[place] = (membranes(z + step) - membranes(z - step)) / 2e-4
    torch.testing.assert_close(leaf.grad, slopes, rtol=1e-4, atol=1e-10)


# ------------------------------------------------------------------------------------------------ other pieces


def test_max_pooling_of_spikes_gives_one_spike_of_a_window_what_is_shared_by_all() -> None:
    """A deviation that torch's pooling brings: right where one spike is alone, else all goes to the window's first."""
    right = []
    for bits in itertools.product([0.0, 1.0], repeat=4):
        window = torch.tensor(bits).view(1, 1, 2, 2).requires_grad_()
        F.max_pool2d(window, 2).sum().backward()
        assert window.grad is not None
        given = window.grad.flatten().tolist()
        others = [max(bits[:i] + bits[i + 1 :]) for i in range(4)]
        discrete = [1.0 - other for other in others]  # Y(bit = 1) - Y(bit = 0): 1 where no other spike is there
        if sum(bits) == 1:
            assert given == discrete
        else:
            first = bits.index(max(bits))
            assert given == [float(i == first) for i in range(4)]
        right.append(given == discrete)
    assert sum(right) == 4


def test_straight_through_rounding_of_i_lif_is_the_derivative_of_the_clip() -> None:
    """Rounding counts as the identity; finite differences of clip(u, 0, D) between the ends, and 1 at both ends."""
    bound, node = 3, build_neuron(NeuronConfig(kind="ilif", bound=3))
    u = torch.tensor([[-0.4, 0.2, 0.5, 1.7, 2.9, 3.3]], dtype=torch.float64, requires_grad=True)
    node(u).sum().backward()
    assert u.grad is not None
    step = 1e-6
    clip = ((u.detach() + step).clamp(0, bound) - (u.detach() - step).clamp(0, bound)) / (2 * step)
    torch.testing.assert_close(u.grad, clip)
    ends = torch.tensor([[0.0, 3.0]], requires_grad=True)
    node(ends).sum().backward()
    assert ends.grad.tolist() == [[1.0, 1.0]]


def test_the_border_is_a_derivative_of_the_inside_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    value = torch.randn(3, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: _PadFunction.apply(x, value), (x,))
    inside = value.clone().requires_grad_()
    _PadFunction.apply(x, inside).square().sum().backward()
    assert inside.grad is None
    eps = 1e-6
    moved = [_PadFunction.apply(x.detach(), value + sign * eps).square().sum() for sign in (1, -1)]
    assert abs(float(moved[0] - moved[1]) / (2 * eps)) > 1  # what is left out is not nothing


COMBINATIONS = [
    ("add", "summed_logits"),
    ("add", "sum_losses"),
    ("add", "own_and_summed"),
    ("convex", "summed_logits"),
    ("convex", "sum_losses"),
]


def combination(combine: Any, loss: Any) -> tuple[Any, list[Tensor]]:
    """(own logits, branches' logits) -> loss, and logits for it."""
    config = ShortcutConfig(where="stage", combine=combine, loss=loss)
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(4, 5, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)]
    targets = torch.randint(5, (4,), generator=generator)
    return lambda main, *sides: shortcut_loss(ShortcutLogits(main, sides), targets, 0.25, config), outputs


@pytest.mark.parametrize(("combine", "loss"), COMBINATIONS)
def test_the_combination_of_side_branches_is_its_derivative(combine: str, loss: str) -> None:
    combined, outputs = combination(combine, loss)
    assert torch.autograd.gradcheck(combined, tuple(outputs))


def test_a_detached_combination_is_its_derivative_to_the_branches_alone() -> None:
    combined, (main, *sides) = combination("add", "own_and_summed_detached")
    assert torch.autograd.gradcheck(lambda *sides: combined(main, *sides), tuple(sides))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda main: combined(main, *sides), (main,))
