"""Gradient flow: norms, order and rates of layers against plain autograd, verdicts, and the size of a step."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spikefleet_models import build_model, list_models, model_config
from spikefleet_models.gradient_flow import (
    GradientFlow,
    LayerGradient,
    first_to_last,
    judge,
    largest_relative_step,
)
from spikefleet_models.health import SpikeMonitor
from spikefleet_models.sg_resnet_config import SGResNetConfig

TRUNK = SGResNetConfig.trunk


def followed(rate: float = 0.1, **fields: object) -> tuple[nn.Module, list[LayerGradient]]:
    torch.manual_seed(0)
    network = build_model(model_config("sg_resnet18", width=0.125, in_channels=1, **{"decoder": "rate", **fields}))
    images, targets = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    with GradientFlow(network) as flow:
        F.cross_entropy(network(images), targets).backward()
    return network, flow.layers(rate)


@pytest.mark.parametrize("connection", ["bsg", "post_add", "add", "ann"])
def test_norms_are_those_of_plain_autograd(connection: str) -> None:
    network, layers = followed(connection=connection)
    torch.manual_seed(0)
    twin = build_model(network.config)
    images, targets = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    with SpikeMonitor(twin) as monitor:
        F.cross_entropy(twin(images), targets).backward()
    assert {row.layer for row in layers} == {
        name.removesuffix(".weight") for name, p in twin.named_parameters() if p.ndim > 1
    }
    for row in layers:
        weight = twin.get_parameter(f"{row.layer}.weight")
        assert weight.grad is not None
        assert row.gradient_norm == pytest.approx(weight.grad.norm().item(), rel=1e-4)
        assert row.weight_norm == pytest.approx(weight.detach().norm().item(), rel=1e-5)
        assert row.relative_step == pytest.approx(0.1 * row.gradient_norm / row.weight_norm)
    rates = {row["layer"]: row["rate"] for row in monitor.table()}
    assert {row.firing_rate for row in layers} - {None} == set(rates.values())
    fed = {row.layer: row.firing_rate for row in layers}
    if connection != "ann":
        assert fed["stem.conv"] == rates["stem.unit.neuron"]
        assert fed["stages.1.0.convs.1"] == rates["stages.1.0.units.1.neuron"]


def test_layers_stand_in_the_order_of_the_forward_pass() -> None:
    _, layers = followed()
    names = [row.layer for row in layers]
    assert names[0] == "stem.conv"
    assert names[-1] == "classifier"
    assert (
        names.index("stages.1.0.shortcut.conv") < names.index("stages.1.0.convs.0") < names.index("stages.1.1.convs.0")
    )
    assert layers[-1].firing_rate is None


@pytest.mark.parametrize(("connection", "rates"), [("bsg", True), ("post_add", False)])
def test_a_layer_feeds_the_neurons_directly_behind_it(connection: str, rates: bool) -> None:
    """Where the shortcut is added before the neurons, they are those of another layer."""
    _, layers = followed(connection=connection)
    (shortcut,) = [row for row in layers if row.layer == "stages.1.0.shortcut.conv"]
    assert (shortcut.firing_rate is not None) == rates


def test_nothing_stays_behind() -> None:
    network, _ = followed()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_weights_without_a_gradient_have_no_row() -> None:
    torch.manual_seed(0)
    network = build_model(model_config("sg_resnet_tiny"))
    network.stem.conv.requires_grad_(False)
    with GradientFlow(network) as flow:
        network(torch.randn(4, 1, 8, 8)).sum().backward()
    assert "stem.conv" not in {row.layer for row in flow.layers(0.1)}


@pytest.mark.parametrize("name", [name for name in list_models() if name.endswith("tiny")])
def test_every_family_names_its_trunk(name: str) -> None:
    torch.manual_seed(0)
    config = model_config(name)
    network = build_model(config)
    with GradientFlow(network) as flow:
        output = network(torch.randn(2, config.in_channels, 64, 64))
        sum(level.square().mean() for level in (output if isinstance(output, tuple) else (output,))).backward()
    layers = flow.layers(0.1)
    inside = [row for row in layers if row.layer.startswith(config.trunk)]
    assert inside[0] is layers[0]
    assert 0 < len(inside) < len(layers)
    assert math.isfinite(first_to_last(layers, config.trunk))


# ------------------------------------------------------------------------------------------------ verdicts


def rows(*norms: float, rates: tuple[float | None, ...] | None = None) -> list[LayerGradient]:
    rates = rates or (0.3,) * len(norms)
    return [
        LayerGradient(f"l{i}", norm, 1.0, norm, rate) for i, (norm, rate) in enumerate(zip(norms, rates, strict=True))
    ]


def test_a_network_within_two_orders_of_magnitude_is_well() -> None:
    assert judge(rows(99.0, 0.011, 1.0)) is None
    assert first_to_last(rows(99.0, 0.011, 1.0)) == 99.0


def test_the_layer_is_named_where_the_gradient_leaves_the_range_on_its_way_down() -> None:
    assert judge(rows(1e5, 1e3, 50.0, 1.0)) == "explodes at l1: gradient norm 1e+03, 1e+03 times that of l3"
    assert judge(rows(1e-9, 1e-4, 1.0)) == "vanishes at l1: gradient norm 0.0001, 0.0001 times that of l2"


def test_layers_that_feed_no_neurons_are_not_compared() -> None:
    assert judge(rows(1.0, 1e5, 1.0, 1e-9, rates=(0.3, None, 0.3, None))) is None
    assert judge(rows(1.0, 1e5, 1.0, rates=(None, None, None))) is not None


def test_layers_outside_the_trunk_are_not_compared() -> None:
    assert judge(rows(1.0, 1.0, 1e9), trunk=("l0", "l1")) is None
    assert judge(rows(1.0, 1.0, 1e9)) is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_named_wherever_it_is(bad: float) -> None:
    assert judge(rows(1.0, bad, 1.0), trunk=("l0",)) == "the gradient is not finite at l1"


def test_a_gradient_of_zero_vanishes() -> None:
    assert judge(rows(0.0, 1.0)) == "vanishes at l0: its gradient is 0"
    assert judge(rows(0.0, 0.0, 1.0)) == "vanishes at l1: its gradient is 0"
    assert judge(rows(0.0, 0.0)) == "vanishes at l1: its gradient is 0"
    assert first_to_last(rows(0.0, 1.0)) == first_to_last([]) == 0.0
    assert judge([]) == "no layer has a gradient"


def test_layers_that_the_gradient_passes_by_are_not_compared() -> None:
    assert judge(rows(1.0, 0.0, 2.0, 0.0)) is None
    assert first_to_last(rows(1.0, 0.0, 2.0, 0.0)) == 0.5
    assert judge(rows(1.0, 0.0, 1e-3, 0.0)) == "explodes at l0: gradient norm 1, 1e+03 times that of l2"


@pytest.mark.parametrize("connection", ["bsg", "bsg_star", "add", "and", "iand"])
def test_identity_at_first_keeps_34_layers_trainable(connection: str) -> None:
    fields = {"connection": connection, "stages": (3, 4, 6, 3), "gate_gradient": "exact"}
    _, layers = followed(**fields, zero_init_residual=True)
    assert judge(layers, TRUNK) is None
    assert {row.gradient_norm for row in layers if row.layer == "stages.3.1.convs.1"} == {0.0}
    _, plain = followed(**fields)
    assert (judge(plain, TRUNK) is None) == (connection != "and")  # drawn at random, AND silences the network


SHORTCUT_NEURON = {"kind": "lif", "tau": 4 / 3, "decay_input": False, "v_threshold": 0.5, "detach_reset": False}


@pytest.mark.parametrize(
    ("surrogate", "alpha", "verdict"),
    [
        ("piecewise_quadratic", 2.0, "explodes"),
        ("piecewise_quadratic", None, None),
        ("dspike", None, "explodes"),
        ("rect", 2.0, "explodes"),
        ("atan", None, None),
        ("piecewise_exp", 0.5, "vanishes"),
    ],
)
def test_surrogates_at_34_layers(surrogate: str, alpha: float | None, verdict: str | None) -> None:
    neuron = {**SHORTCUT_NEURON, "surrogate": surrogate, "alpha": alpha}
    _, layers = followed(connection="post_add", stages=(3, 4, 6, 3), neuron=neuron)
    problem = judge(layers, TRUNK)
    assert (problem is None) == (verdict is None), problem
    assert problem is None or problem.startswith(f"{verdict} at stages.")


def test_an_exact_gate_gradient_grows_less_with_depth() -> None:
    literal, exact = (
        first_to_last(followed(stages=(3, 4, 6, 3), gate_gradient=gradient)[1], TRUNK)
        for gradient in ("literal", "exact")
    )
    assert exact < literal / 3
    assert exact < 5


# ------------------------------------------------------------------------------------------------ steps


def test_the_largest_step_is_found_with_its_layer() -> None:
    network, layers = followed()
    found = largest_relative_step(network, 0.1)
    assert found is not None
    largest = max(layers, key=lambda row: row.relative_step)
    assert found[0] == largest.layer
    assert found[1] == pytest.approx(largest.relative_step, rel=1e-4)
    assert largest_relative_step(network, 0.2)[1] == pytest.approx(2 * found[1])


def test_the_first_step_of_adam_has_the_length_that_is_foretold() -> None:
    network, _ = followed()
    before = {name: p.detach().clone() for name, p in network.named_parameters() if p.ndim > 1}
    found = largest_relative_step(network, 1e-3, adaptive=True)
    assert found is not None
    layer, relative = found
    torch.optim.Adam(network.parameters(), lr=1e-3).step()
    moved = {name: float((p.detach() - before[name]).norm() / before[name].norm())
             for name, p in network.named_parameters() if p.ndim > 1}  # fmt: skip
    largest = max(moved, key=moved.__getitem__)
    assert largest.rpartition(".")[0] == layer
    assert moved[largest] == pytest.approx(relative, rel=0.02)
    assert largest_relative_step(network, 1e-3)[1] != pytest.approx(relative, rel=0.02), "SGD's is another"


def test_without_gradients_or_weights_no_step_is_large() -> None:
    network = nn.Linear(2, 2)
    assert largest_relative_step(network, 1.0) is None
    nn.init.zeros_(network.weight)
    network(torch.ones(1, 2)).sum().backward()
    assert largest_relative_step(network, 1.0) == ("", 0.0)
