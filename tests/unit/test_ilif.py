"""I-LIF is the recurrence of its paper and released code: same integers, same gradients, one byte an element saved."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from spikingjelly.activation_based import functional, monitor, neuron, surrogate
from torch import Tensor, nn

from spikefleet_models import build_model, model_config
from spikefleet_models.gates import build_gate
from spikefleet_models.health import SpikeMonitor
from spikefleet_models.kernels import CpuForm
from spikefleet_models.membrane import TILE_ELEMENTS
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import ILIF, build_neuron, spiking_nodes
from spikefleet_models.spiking_unit import SpikingUnit, use_implementation
from support.cpu_forms import chosen_form

GEN1 = {"leak": 0.5, "input_scale": 0.5}


@pytest.fixture(params=["lean", "native"], autouse=True)
def form(request: pytest.FixtureRequest) -> Iterator[tuple[CpuForm, Counter[str]]]:
    """The chosen form, and calls of each; fp64 and fp16 take the lean one whichever is chosen."""
    chosen: CpuForm = request.param
    with chosen_form(chosen) as ran:
        yield chosen, ran
    assert chosen == "native" or not ran["native"]


class Emission(torch.autograd.Function):
    """The released quantiser, written from its description: clip, round half to even; gradient 1 on [0, D]."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, bound: int) -> Tensor:
        ctx.save_for_backward((u >= 0) & (u <= bound))
        return torch.minimum(torch.maximum(u, torch.zeros_like(u)), torch.full_like(u, bound)).round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None


def literal(x: Tensor, bound: int, leak: float = 0.25, input_scale: float = 1.0) -> Tensor:
    """[T, ...] -> [T, ...] by the formula, one step at a time."""
    u = input_scale * x[0]
    emitted = [Emission.apply(u, bound)]
    for current in x[1:]:
        u = (u - emitted[-1].detach()) * leak + input_scale * current
        emitted.append(Emission.apply(u, bound))
    return torch.stack(emitted)


def run(function: object, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    emitted = function(x)
    (emitted * weights).sum().backward()
    assert x.grad is not None
    return emitted.detach(), x.grad


def currents(T: int, bound: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T * 100 + bound)
    shape = (T, 3, 8, 5, 5)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * bound + 0.4 * bound
    return x.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_at_the_edges(dtype: torch.dtype) -> None:
    u = [-0.2, 0.0, 0.49, 0.5, 0.51, 1.5, 2.5, 3.5, 4.0, 4.2]
    emitted, grad = run(build_neuron(NeuronConfig(kind="ilif")), torch.tensor([u], dtype=dtype), torch.ones(1))
    assert emitted.dtype == grad.dtype == dtype
    assert emitted[0].tolist() == [0, 0, 0, 0, 1, 2, 2, 4, 4, 4]
    assert grad[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("bound", [1, 4])
def test_the_gradient_is_one_at_both_ends_on_every_path(bound: int) -> None:
    u = torch.tensor([[-0.1, 0.0, bound / 2, bound, bound + 0.1]])
    node = build_neuron(NeuronConfig(kind="ilif", bound=bound))
    recording = ILIF(bound)
    recording.store_v_seq = True
    single = ILIF(bound, step_mode="s")
    paths = {
        "multi-step": node,
        "reference": node.reference_forward,
        "recorded": recording,
        "single step": lambda x: single(x[0])[None],
        "one neuron": lambda x: torch.stack([node(one) for one in x.unbind(1)], dim=1),
    }
    for name, path in paths.items():
        _, grad = run(path, u, torch.ones(1))
        assert grad[0].tolist() == [0, 1, 1, 1, 0], name


@pytest.mark.parametrize("kind", ["if", "lif", "plif", "ilif"])
def test_one_neuron_over_time_is_a_batch_of_one(kind: str) -> None:
    x = torch.randn(5, generator=torch.Generator().manual_seed(0)) + 0.5
    node = build_neuron(NeuronConfig(kind=kind))
    assert torch.equal(node(x), node(x[:, None])[:, 0])
    node.keep_state = True
    first, second = node(x[:2]), node(x[2:])
    node.reset()
    assert torch.equal(torch.cat([first, second]), node(x))


@pytest.mark.parametrize("constants", [{}, GEN1, {"leak": 0.3, "input_scale": 1.7}], ids=["coco", "gen1", "odd"])
@pytest.mark.parametrize("bound", [1, 2, 4, 8])
@pytest.mark.parametrize("T", [1, 2, 4])
def test_equals_the_literal_recurrence(T: int, bound: int, constants: dict[str, float]) -> None:
    x, weights = currents(T, bound)
    node = build_neuron(NeuronConfig(kind="ilif", bound=bound, **constants))
    emitted, grad = run(node, x, weights)
    expected, expected_grad = run(lambda x: literal(x, bound, **constants), x, weights)
    assert set(expected.unique().tolist()) == set(range(bound + 1))
    assert torch.equal(emitted, expected)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)
    reference, reference_grad = run(node.reference_forward, x, weights)
    assert torch.equal(reference, expected)
    torch.testing.assert_close(reference_grad, expected_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "other",
    [{"bound": 3}, {"bound": 5}, {"leak": 0.26}, {"input_scale": 0.99}],
)
def test_the_comparison_notices_another_neuron(other: dict[str, float]) -> None:
    x, weights = currents(4, 4)
    emitted, grad = run(build_neuron(NeuronConfig(kind="ilif", **other)), x, weights)
    expected, expected_grad = run(lambda x: literal(x, 4), x, weights)
    assert not torch.equal(emitted, expected)
    assert not torch.allclose(grad, expected_grad)


def test_the_first_step_has_no_leak_and_the_scale_acts_on_it() -> None:
    node = build_neuron(NeuronConfig(kind="ilif", **GEN1))
    assert node(torch.tensor([[3.2], [2.0]])).flatten().tolist() == [2, 1]  # 1.6 -> 2; (1.6 - 2) / 2 + 1 = 0.8 -> 1


@pytest.mark.parametrize("bound", [1, 2, 4, 8])
@pytest.mark.parametrize("T", [1, 2, 4])
def test_equals_spikingjelly(T: int, bound: int, form: tuple[CpuForm, Counter[str]]) -> None:
    theirs = neuron.ILIFNode(
        tau=4 / 3, surrogate_function=surrogate.MultiLevelSpikeCount(bound), detach_reset=True, step_mode="m"
    )
    x, weights = currents(T, bound, torch.float32)
    emitted, grad = run(build_neuron(NeuronConfig(kind="ilif", bound=bound)), x, weights)
    expected, expected_grad = run(theirs, x, weights)
    assert torch.equal(emitted, expected)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)
    chosen, ran = form
    assert ran == {chosen: 1}


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_input_keeps_an_fp32_membrane(T: int, dtype: torch.dtype) -> None:
    x, weights = currents(T, 8, dtype)
    node = build_neuron(NeuronConfig(kind="ilif", bound=8, leak=0.9, input_scale=0.7))
    emitted, grad = run(node, x, weights)
    expected, expected_grad = run(node, x.float(), weights.float())
    assert emitted.dtype == grad.dtype == dtype
    assert torch.equal(emitted.float(), expected)
    torch.testing.assert_close(grad.float(), expected_grad, rtol=2**-7, atol=1e-2)
    if T > 1 and dtype == torch.bfloat16:
        sixteen = literal(x, 8, 0.9, 0.7)
        assert not torch.equal(sixteen, emitted)  # what a 16-bit membrane would have emitted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(3, 4, 3)
    node = build_neuron(NeuronConfig(kind="ilif"))
    with torch.autocast("cpu", dtype=dtype):
        z = conv(torch.rand(4, 3, 8, 8)) * 4
        emitted = node(z.unflatten(0, (2, 2)))
    assert z.dtype == emitted.dtype == dtype
    assert torch.equal(emitted.float(), literal(z.float().unflatten(0, (2, 2)), 4))


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("layout", ["channels_last", "repeated", "transposed"])
def test_every_memory_layout_gives_the_same(T: int, layout: str) -> None:
    x, weights = currents(T, 4)
    if layout == "repeated":
        x = x[:1].expand_as(x)
    expected, expected_grad = run(lambda x: literal(x, 4), x.contiguous(), weights)
    if layout == "channels_last":
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (T, 3))
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    leaf = x.detach().requires_grad_()
    emitted = build_neuron(NeuronConfig(kind="ilif"))(leaf)
    (emitted * weights).sum().backward()
    assert torch.equal(emitted, expected)
    torch.testing.assert_close(leaf.grad, expected_grad, rtol=1e-12, atol=1e-12)
    if layout == "channels_last":
        assert emitted.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_tiles_join(form: tuple[CpuForm, Counter[str]]) -> None:
    x = torch.randn(2, 5, TILE_ELEMENTS // 8) * 3
    x[0, 3] += 1
    expected = literal(x, 4)
    assert torch.equal(build_neuron(NeuronConfig(kind="ilif"))(x), expected)
    chosen, ran = form
    assert ran == {chosen: 1}


@pytest.mark.parametrize("T", [1, 4])
def test_saves_one_byte_an_element(T: int) -> None:
    saved: list[Tensor] = []
    x = torch.randn(T, 2, 3, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    node = build_neuron(NeuronConfig(kind="ilif"))
    use_implementation(node, "lean")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        node(x)
    assert [(tensor.dtype, tensor.shape) for tensor in saved] == [(torch.bool, x.shape)]


def test_each_call_starts_from_rest_unless_state_is_kept() -> None:
    node = build_neuron(NeuronConfig(kind="ilif", leak=1.0))
    x = torch.full((1, 2, 3), 0.4)
    assert node(x).sum() == node(x).sum() == 0
    node.keep_state = True
    assert node(x).sum() == 0
    assert node(x).sum() == 6  # 0.4 + 0.4 rounds to 1
    node(x)
    functional.reset_net(node)
    assert node(x).sum() == 0


@pytest.mark.parametrize("constants", [{}, GEN1])
@pytest.mark.parametrize("cut", [1, 3])
def test_kept_state_equals_one_long_run_and_carries_gradients(cut: int, constants: dict[str, float]) -> None:
    config = NeuronConfig(kind="ilif", **constants)
    x, weights = currents(4, 4)
    expected, expected_grad = run(build_neuron(config), x, weights)
    node = build_neuron(config)
    node.keep_state = True
    emitted, grad = run(lambda x: torch.cat([node(x[:cut]), node(x[cut:])]), x, weights)
    assert torch.equal(emitted, expected)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


def test_is_a_spikingjelly_node() -> None:
    node = build_neuron(NeuronConfig(kind="ilif", bound=8, leak=0.5, input_scale=0.5))
    assert isinstance(node, ILIF)
    assert isinstance(node, neuron.BaseNode)
    assert (node.bound, node.leak, node.input_scale) == (8, 0.5, 0.5)
    assert "bound=8, leak=0.5, input_scale=0.5" in repr(node)
    net = nn.Sequential(node)
    assert list(spiking_nodes(net)) == ["0"]
    with monitor.OutputMonitor(net, neuron.BaseNode) as records:
        net(torch.randn(4, 2, 3))
    assert len(records.records) == 1
    node.store_v_seq = True
    x = torch.tensor([[3.2], [2.0]], dtype=torch.bfloat16)
    assert node(x).dtype == torch.bfloat16
    torch.testing.assert_close(node.v_seq, torch.tensor([[-0.4], [-0.2]]), rtol=0, atol=0.01)


@pytest.mark.parametrize("bad", [{"bound": 0}, {"bound": 256}, {"leak": -0.1}, {"leak": 1.1}, {"input_scale": 0.0}])
def test_bad_constants_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        NeuronConfig(kind="ilif", **bad)


def test_health_counts_in_shares_of_the_bound() -> None:
    # [T=2, B=3, C=1, H=1, W=4]: never; always D; D at the second step only; 1 for one sample once.
    x = torch.zeros(2, 3, 1, 1, 4)
    x[:, :, 0, 0, 1] = 9.0
    x[1, :, 0, 0, 2] = 9.0
    x[0, 1, 0, 0, 3] = 1.0
    net = nn.Sequential(build_neuron(NeuronConfig(kind="ilif", leak=0.0)))
    with SpikeMonitor(net) as record:
        net(x)
    (row,) = record.table()
    assert row["rate"] == pytest.approx((6 * 4 + 3 * 4 + 1) / (24 * 4))
    assert row["dead"] == row["saturated"] == 0.25
    assert row["rate_per_step"] == pytest.approx([(3 * 4 + 1) / 48, (3 * 4 + 3 * 4) / 48])


@pytest.mark.parametrize("gate", ["bsg", "bsg_star", "and", "iand"])
def test_gates_of_spikes_refuse_integers(gate: str) -> None:
    def unit(bound: int) -> SpikingUnit:
        node = build_neuron(NeuronConfig(kind="ilif", bound=bound))
        return SpikingUnit(nn.BatchNorm2d(4), node, 2, build_gate(gate, 4, 0.5, surrogate.ATan()))

    shortcut = torch.randint(2, (2, 2, 4, 3, 3)).float()
    assert unit(1)(torch.randn(4, 4, 3, 3), shortcut).unique().tolist() == [0, 1]
    with pytest.raises(ValueError, match=f"gate {gate} needs binary spikes.*bound=2") as caught:
        unit(2)
    assert str(caught.value).endswith("set neuron.bound=1"), "ADD and post-addition could never be proved"


@pytest.mark.parametrize("connection", ["add", "post_add"])
def test_residual_networks_train_with_integers(connection: str) -> None:
    torch.manual_seed(0)
    config = model_config("sg_resnet_tiny", connection=connection, neuron=NeuronConfig(kind="ilif"), timesteps=2)
    model = build_model(config)
    images = torch.randn(4, 1, 8, 8)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(images).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    with SpikeMonitor(model) as record:
        model(images)
    assert all(0 < row["rate"] < 1 for row in record.table())
    ours = gradients()
    use_implementation(model, "reference")
    for gradient, expected in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
