"""The lean neurons are SpikingJelly's neurons: same spikes, same gradients, less memory."""

import itertools
import re

import pytest
import torch
from pydantic import ValidationError
from spikingjelly.activation_based import functional, monitor, neuron, surrogate
from torch import Tensor, nn

from spikefleet_models.membrane import Dynamics, charge
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import build_neuron, node_arguments, spiking_nodes
from spikefleet_models.surrogates import SURROGATES

LEAKS = [("if", True), ("lif", True), ("lif", False), ("plif", True), ("plif", False)]
KINDS = {"if": neuron.IFNode, "lif": neuron.LIFNode, "plif": neuron.ParametricLIFNode}


def spikingjelly_twin(config: NeuronConfig) -> neuron.BaseNode:
    return KINDS[config.kind](**node_arguments(config))


def run(node: nn.Module, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    spikes = node(x)
    (spikes * weights).sum().backward()
    assert x.grad is not None
    return spikes.detach(), x.grad, [p.grad for p in node.parameters() if p.grad is not None]


def currents(T: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (T, 3, 8, 5, 5)
    return torch.randn(shape, generator=generator) * 1.5 + 0.3, torch.randn(shape, generator=generator)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("v_reset", [0.0, -0.2, None])
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize(("kind", "decay_input"), LEAKS)
def test_equals_spikingjelly(T: int, v_reset: float | None, detach_reset: bool, kind: str, decay_input: bool) -> None:
    config = NeuronConfig(kind=kind, tau=2.5, decay_input=decay_input, v_reset=v_reset, detach_reset=detach_reset)
    x, weights = currents(T)
    spikes, grad, grad_parameters = run(build_neuron(config), x, weights)
    expected, expected_grad, expected_parameters = run(spikingjelly_twin(config), x, weights)
    assert 0.03 < expected.mean() < 0.95
    assert torch.equal(spikes, expected)
    assert_close(grad, expected_grad)
    assert len(grad_parameters) == len(expected_parameters) == (kind == "plif")
    for ours, theirs in zip(grad_parameters, expected_parameters, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", list(SURROGATES))
def test_every_surrogate_equals_spikingjelly(name: str) -> None:
    config = NeuronConfig(surrogate=name, alpha=1.3, v_threshold=0.8)
    x, weights = currents(4)
    spikes, grad, _ = run(build_neuron(config), x, weights)
    expected, expected_grad, _ = run(spikingjelly_twin(config), x, weights)
    assert torch.equal(spikes, expected)
    assert_close(grad, expected_grad)


@pytest.mark.parametrize(
    "change", [{"alpha": 2.1}, {"v_threshold": 1.01}, {"v_reset": None}, {"detach_reset": False}, {"kind": "lif"}]
)
def test_comparison_notices_a_different_neuron(change: dict[str, object]) -> None:
    x, weights = currents(4)
    _, grad, _ = run(build_neuron(NeuronConfig()), x, weights)
    _, other, _ = run(spikingjelly_twin(NeuronConfig(**change)), x, weights)
    assert (grad - other).abs().max() > 1e-3 * other.abs().max()


@pytest.mark.parametrize("kind", list(KINDS))
def test_reference_forward_equals_lean_forward(kind: str) -> None:
    node = build_neuron(NeuronConfig(kind=kind, detach_reset=False))
    x, weights = currents(4)
    spikes, grad, grad_parameters = run(node, x, weights)
    node.zero_grad()
    node.forward = node.reference_forward
    expected, expected_grad, expected_parameters = run(node, x, weights)
    assert torch.equal(spikes, expected)
    assert_close(grad, expected_grad)
    for ours, theirs in zip(grad_parameters, expected_parameters, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(("kind", "dtype"), list(itertools.product(KINDS, [torch.bfloat16, torch.float16])))
def test_sixteen_bit_input_keeps_an_fp32_membrane(kind: str, dtype: torch.dtype) -> None:
    # 1200 currents of 1/1024 reach the threshold of 1 in fp32; a bf16 membrane stops growing below it.
    node = build_neuron(NeuronConfig(kind=kind, tau=1e6, decay_input=False))
    x = torch.full((1200, 1, 4), 1 / 1024, dtype=dtype)
    spikes = node(x)
    assert spikes.dtype == dtype
    assert torch.equal(spikes.float(), node(x.float()))
    assert spikes.sum() > 0
    if dtype == torch.bfloat16 and kind == "if":
        v = torch.zeros((), dtype=dtype)
        for current in x[:, 0, 0]:
            v = v + current
        assert v < 1  # what a 16-bit membrane would have reached


def test_sixteen_bit_gradient_equals_fp32_rounded() -> None:
    x, weights = currents(4)
    x, weights = x.bfloat16(), weights.bfloat16()
    node = build_neuron(NeuronConfig())
    _, grad, _ = run(node, x, weights)
    _, expected, _ = run(node, x.float(), weights.float())
    assert torch.equal(grad, expected.bfloat16())


def test_double_input_stays_double() -> None:
    x, _ = currents(4)
    node = build_neuron(NeuronConfig(kind="lif"))
    assert node(x.double()).dtype == torch.float64
    assert charge(node.dynamics(), None, None, x[0].double(), x[0].double()).dtype == torch.float64


def test_each_call_starts_from_rest_unless_state_is_kept() -> None:
    node = build_neuron(NeuronConfig())
    x = torch.full((1, 2, 3), 0.6)
    assert node(x).sum() == node(x).sum() == 0
    node.keep_state = True
    assert node(x).sum() == 0
    assert node(x).sum() == 6  # 0.6 + 0.6 reaches the threshold
    node(x)
    functional.reset_net(node)
    assert node(x).sum() == 0


@pytest.mark.parametrize("kind", list(KINDS))
def test_kept_state_equals_one_long_run_and_carries_gradients(kind: str) -> None:
    config = NeuronConfig(kind=kind, detach_reset=False)
    x, weights = currents(6)
    whole = build_neuron(config)
    expected, expected_grad, _ = run(whole, x, weights)
    node = build_neuron(config)
    node.keep_state = True
    x = x.clone().requires_grad_()
    spikes = torch.cat([node(x[:2]), node(x[2:])])
    (spikes * weights).sum().backward()
    assert torch.equal(spikes, expected)
    assert_close(x.grad, expected_grad)


def test_voltages_can_be_recorded() -> None:
    node = build_neuron(NeuronConfig(v_threshold=100.0))
    node.store_v_seq = True
    x, _ = currents(4)
    node(x)
    torch.testing.assert_close(node.v_seq, x.cumsum(0))
    node(x)
    torch.testing.assert_close(node.v_seq, x.cumsum(0))


def test_saves_its_input_only() -> None:
    saved: list[Tensor] = []
    x = torch.randn(4, 2, 3, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        build_neuron(NeuronConfig())(x)
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "repeated", "transposed"])
def test_every_memory_layout_gives_the_same(layout: str) -> None:
    x, weights = currents(4)
    if layout == "repeated":
        x = x[:1].expand_as(x)
    expected, expected_grad, _ = run(spikingjelly_twin(NeuronConfig()), x.contiguous(), weights)
    if layout == "channels_last":
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 3))
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    leaf = x.detach().requires_grad_()
    spikes = build_neuron(NeuronConfig())(leaf)
    (spikes * weights).sum().backward()
    assert torch.equal(spikes, expected)
    assert_close(leaf.grad, expected_grad)


def test_nodes_are_spikingjelly_nodes() -> None:
    for kind, base in KINDS.items():
        node = build_neuron(NeuronConfig(kind=kind))
        assert isinstance(node, base)
        assert node.step_mode == "m"
        assert isinstance(node.surrogate_function, surrogate.ATan)
    net = nn.Sequential(build_neuron(NeuronConfig()), build_neuron(NeuronConfig(kind="plif")))
    assert list(spiking_nodes(net)) == ["0", "1"]
    with monitor.OutputMonitor(net, neuron.BaseNode) as records:
        net(torch.randn(4, 2, 3))
    assert len(records.records) == 2


def test_every_field_reaches_the_node() -> None:
    config = NeuronConfig(
        kind="lif",
        tau=3.5,
        decay_input=False,
        v_threshold=0.7,
        v_reset=-0.1,
        detach_reset=False,
        surrogate="erf",
        alpha=1.7,
    )
    node = build_neuron(config)
    for name in ("tau", "decay_input", "v_threshold", "v_reset", "detach_reset"):
        assert getattr(node, name) == getattr(config, name)
    assert isinstance(node.surrogate_function, surrogate.Erf)
    assert node.surrogate_function.alpha == 1.7


def test_paper_defaults() -> None:
    assert NeuronConfig().model_dump() == {
        "kind": "if",
        "tau": 2.0,
        "decay_input": True,
        "v_threshold": 1.0,
        "v_reset": 0.0,
        "detach_reset": True,
        "surrogate": "atan",
        "alpha": 2.0,
        "bound": 4,
        "leak": 0.25,
        "input_scale": 1.0,
    }


def test_plif_starts_at_tau() -> None:
    node = build_neuron(NeuronConfig(kind="plif", tau=4.0))
    assert node.w.sigmoid().item() == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    "bad", [{"tau": 1.0}, {"kind": "izhikevich"}, {"surrogate": "relu"}, {"alpha": 0.0}, {"leak": 1}]
)
def test_bad_configurations_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        NeuronConfig(**bad)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "ilif", "v_threshold": 0.5, "surrogate": "erf"}, "v_threshold=0.5, surrogate='erf'"),
        ({"kind": "ilif", "v_reset": None}, "v_reset=None"),
        ({"bound": 2}, "bound=2"),
        ({"kind": "lif", "leak": 0.5, "tau": 3.0}, "'lif' does not use leak=0.5;"),
    ],
)
def test_a_field_of_another_kind_is_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(named)):
        NeuronConfig(**fields)


def test_dynamics_describe_the_node() -> None:
    assert build_neuron(NeuronConfig(kind="lif", tau=3.0)).dynamics().tau == 3.0
    node = build_neuron(NeuronConfig(v_reset=None))
    assert isinstance(node.dynamics(), Dynamics)
    assert node.dynamics().rest == 0.0
